// The memory a step works in: reserved before its threads start, kept for the next one.
#pragma once

#include <vector>

#include "attention.h"
#include "engine_kernels.h"
#include "engine_prepare.h"

namespace ql {

// The kernels of one instruction set.
struct EngineIsa {
  const TileKernels* tiles;
  const EngineKernels* engine;
  const AttentionKernels* attention;
};

// 64-byte aligned memory that grows; its contents do not survive that.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  bool reserve(int64_t bytes);  // false: no memory
  uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

// Rows for all tokens of a step, shared by its threads.
struct SharedWork {
  float* hidden;  // [tokens] at hidden_stride: the residual stream; of a single token,
                  // every thread has its own
  float* delta;   // [tokens] at hidden_stride: what is to be added to it
  float* qkv;     // [tokens] at qkv_stride
  float* heads;   // [tokens] at heads_stride: what attention gives
  float* gated;   // [tokens] at gated_stride: activation(gate) * up, or, of a layer whose rows do not
                  // let a thread make both at once, gate and then up
  float* logits;    // [wanted, vocabulary]; null when the caller takes them
  float* partials;  // of attention splits
  float* angles;    // per rope, cosines then sines [tokens, count]
  uint8_t* inputs;  // prepared, of a group
  int64_t hidden_stride, qkv_stride, heads_stride, gated_stride;
};

// One thread's own.
struct ThreadWork {
  float* hidden;  // the residual stream of a single token: every thread keeps it
  float* row;     // an input vector before it is prepared
  float* made;    // [tokens]: outputs that are not yet where they belong, gate_columns of gate and
                  // then of up, or made_strips of rows that have places
  float* query;   // a row of q, rotated
  PrepareWork prepare;
  uint8_t* inputs;   // prepared, of a group, for one token
  uint8_t* scratch;  // of kernels
  int32_t* terms;    // of a group's linears (TileInput), at term_stride
  int32_t* best;     // [wanted]
};

// Strips of gate, and as many of up, that a thread makes before it combines them: few enough that
// the cache holds them for all tokens.
inline int64_t gate_strips(int64_t tokens) {
  constexpr int64_t kFloats = 1 << 15;
  const int64_t strips = kFloats / (2 * kStripRows * tokens);
  return strips > 1 ? strips : 1;
}

// Columns they take: one strip more, where those of up begin within one.
inline int64_t gate_columns(int64_t tokens) { return (gate_strips(tokens) + 1) * kStripRows; }

// Strips of rows with places that a thread makes before it puts them there: as much memory.
inline int64_t made_strips(int64_t tokens) { return 2 * gate_strips(tokens); }

// How much a step needs.
struct StepSize {
  int64_t tokens;
  int64_t wanted;
  int64_t partials;  // floats
  int64_t threads;
  bool own_logits;
};

class StepWork {
 public:
  // False: no memory; then nothing may be used. `cache` is any layer's.
  bool reserve(const Plan& plan, const EngineIsa& isa, const KvLayer& cache, const StepSize& size);
  int64_t bytes() const;

  SharedWork shared{};
  std::vector<ThreadWork> threads;
  int64_t term_stride = 0;  // of a linear, for all tokens

 private:
  bool reserve_shared(const Plan& plan, const StepSize& size);
  bool reserve_threads(const Plan& plan, const EngineIsa& isa, const KvLayer& cache,
                       const StepSize& size);

  StepSize size_{};
  Buffer shared_memory_;
  std::vector<Buffer> thread_memory_;
};

}  // namespace ql
