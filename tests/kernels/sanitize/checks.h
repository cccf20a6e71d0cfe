// What driver.cpp runs: each check calls the kernels on buffers of exactly the size they are given,
// compares instruction sets and numbers of threads with one another, and leaves memory errors,
// undefined behaviour and races to the sanitizer the library was compiled with.
#pragma once

#include <cstdint>

// Every format, segments of several, ragged rows, columns and tokens; packing there and back.
void check_weights(int32_t threads);

// What is not finite or huge, in activations and scales of tokens.
void check_unusual_numbers();

// KV cache formats and attention: prompts, decoding, windows, numbers that are none.
void check_attention(int32_t threads);

// A small decoder: prompts, decoding, batches, truncation, copies, refused steps.
void check_engine(int32_t threads);

// Several threads call at once: linears of shared weights, attention, one engine, allocation.
void check_callers();
