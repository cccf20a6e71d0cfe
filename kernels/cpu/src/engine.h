// The plain C interface of the native decoder: one call runs a whole step of a Llama-like model.
//
// Python (quantlib/runtime) describes a model with the structs below and calls; the library keeps
// copies of the structs, and the caller keeps what they point to (weights, norms, biases) alive and
// unchanged until ql_engine_destroy. All vectors are contiguous float32.
//
// What it computes, for every token, in float32 (norm(x, w) = x / sqrt(mean(x^2) + eps) * w; parts
// whose pointer is null are left out):
//
//   x      = enter(embedding[token] * embedding_scale)
//   layer:   h = norm(x, input_norm);  q, k, v = qkv(h)
//            q, k = norm of every head(q, q_norm), (k, k_norm);  rotated by the layer's rope;
//            times key_basis of the KV head;  q rounded to query_bits
//            p = softmax(softcap(q . keys * attention_scale, attention_softcap)) over the window
//            x += norm(o(p . values), attention_out_norm)
//            h = norm(x, ffn_norm);  gate, up = gate_up(h)
//            x += norm(down(activation(gate) * up), ffn_out_norm)
//   logits = softcap(head(norm(leave(x), final_norm)) * logit_scale, logit_softcap)
//
// with softcap(z, c) = c * tanh(z / c), or z when c is 0. Keys and values go through the layer's
// format of the KV cache. What happens to a linear's input is said by its form. Results do not
// depend on the number of threads, nor on which tokens share a step.
#pragma once

#include "abi.h"
#include "kv_cache.h"
#include "tiles.h"

enum QlEngineStatus : int32_t {
  QL_ENGINE_OK = 0,
  QL_ENGINE_NO_MEMORY = 1,
  QL_ENGINE_NO_SUCH_ISA = 2,
  QL_ENGINE_BAD_MODEL = 16,     // create: sizes that contradict each other; ql_engine_problem says
                                // which
  QL_ENGINE_BAD_TOKEN = 17,     // a token id outside the vocabulary
  QL_ENGINE_BAD_SEQUENCE = 18,  // a sequence outside [0, sequences), or its tokens not side by side
  QL_ENGINE_FULL = 19,          // a sequence would be longer than `capacity`; nothing was appended
  QL_ENGINE_BAD_STEP = 20       // no tokens, or `wanted` not ascending in [0, count)
};

enum QlDenseType : int32_t { QL_DENSE_F32 = 0, QL_DENSE_F16 = 1, QL_DENSE_BF16 = 2 };

// How the inputs of a linear are treated.
enum QlInputMode : int32_t {
  QL_INPUT_EXACT = 0,  // float32, as they are; the only mode of dense weights
  QL_INPUT_INT8 = 1,   // rounded to int8, multiplied in integers: integer elements, e2m1 to e2m4
  QL_INPUT_ROUNDED = 2  // rounded to int8, multiplied as floats: every tiled weight (tiles.h)
};

// y = weight * x + bias: exactly one of `tiled` and `dense` is given.
//
// A matrix whose rows are in several formats is several linears, one for each block of rows, whose
// `places` say which of the matrix's rows they are.
struct QlLinear {
  const ql::TiledWeight* tiled;
  const void* dense;  // [rows, columns] of dense_type, rows contiguous
  const float* bias;  // [rows] or null
  const ql::TileForm* form;  // null, or what is done to the input (tiles.h): rotation, order, and
                             // in the modes that round, how; linears that share a form share work
  const int32_t* places;  // [rows], ascending: which outputs of its list (QlLinears) its rows make;
                          // null: those behind the rows of the linears before it
  int64_t rows;       // N, output features
  int64_t columns;    // K, input features
  int64_t act_group;  // mode INT8 without a form: 0 for one scale per token, else columns per
                      // scale, a multiple of 128; otherwise 0
  int32_t dense_type;  // QlDenseType
  int32_t mode;        // QlInputMode
};

// Linears that read one input. Their outputs together are one vector, of which each makes its part.
struct QlLinears {
  const QlLinear* linears;  // [count]
  int64_t count;            // at most 12
};

// Rotation of q and k: pairs (i, i + count) of a head, i < count = rotary_dims / 2, by the angle
// position * inverse_frequencies[i]; the rest of the head stays. Cosine and sine are multiplied by
// `scaling` (attention_factor of YaRN and longrope, else 1).
struct QlRope {
  const float* inverse_frequencies;  // [count]
  int64_t count;                     // <= head_dim / 2
  float scaling;
  int32_t reserved;
};

// Fused inputs: the outputs of `qkv` are q (heads * head_dim), k and v (kv_heads * head_dim each),
// one after the other, however many linears share the work; likewise `gate_up` makes gate and up
// (intermediate each).
struct QlLayer {
  const float* input_norm;          // [hidden] or null
  const float* attention_out_norm;  // [hidden] or null; Gemma's post_attention_layernorm
  const float* ffn_norm;            // [hidden] or null; Llama's post_attention_layernorm, Gemma's
                                    // pre_feedforward_layernorm
  const float* ffn_out_norm;        // [hidden] or null; Gemma's post_feedforward_layernorm
  const float* q_norm;              // [head_dim] or null
  const float* k_norm;              // [head_dim] or null
  const float* key_basis;           // [kv_heads, head_dim, padded] or null: what q and k of a KV
                                    // head are multiplied by from the right, columns padded with
                                    // zeros to a multiple of 16
  QlLinears qkv;                    // K = hidden
  QlLinears o;                      // heads * head_dim -> hidden
  QlLinears gate_up;                // K = hidden
  QlLinears down;                   // intermediate -> hidden
  int64_t intermediate;
  int64_t window;  // a token sees that many positions, itself included; 0: all
  float attention_scale;
  float attention_softcap;  // 0: none
  int32_t rope;             // index into QlModel.ropes; -1: no rotation
  int32_t query_bits;       // 2..8: every head of q becomes codes within +-(2^(bits-1) - 1) times
                            // its largest magnitude / (2^(bits-1) - 1); 0: as it is
  ql::KvFormat key;         // how the cache keeps keys and values: four int32 each, see kv_cache.h
  ql::KvFormat value;
  int64_t sinks;            // 0..64 first positions of a sequence that it keeps in float32
};

enum QlActivation : int32_t { QL_SILU = 0, QL_GELU_TANH = 1 };

struct QlModel {
  const QlLayer* layers;  // [layer_count]
  const QlRope* ropes;    // [rope_count]
  const float* final_norm;  // [hidden] or null
  QlLinears embedding;      // [vocabulary, hidden]; its rows are looked up, mode and bias unused
  QlLinears head;           // hidden -> vocabulary; may be the embedding's weight
  QlLinears enter;          // hidden -> hidden, a change of basis; of no linears: none
  QlLinears leave;          // likewise, before the final norm
  int64_t layer_count;
  int64_t rope_count;
  int64_t vocabulary;
  int64_t hidden;
  int64_t heads;
  int64_t kv_heads;   // divides heads
  int64_t head_dim;
  int64_t sequences;  // how many are kept at once
  int64_t capacity;   // tokens of a sequence
  float embedding_scale;
  float norm_epsilon;
  float logit_scale;    // 1: none
  float logit_softcap;  // 0: none
  int32_t activation;   // QlActivation
  int32_t integer_attention;  // 1: packed keys and values are multiplied in integers, attention.h
};

// Tokens to append. Row i of a step is the token tokens[i] of the sequence sequences[i], at the
// position after all rows of that sequence before it: a prompt, or a part of one, is many rows of
// one sequence; decoding B sequences is one row of each; both may share a step. Rows of one
// sequence stand side by side.
struct QlStep {
  const int32_t* tokens;      // [count]
  const int32_t* sequences;   // [count]
  const float* embeddings;    // null, or [count, hidden]: instead of embedding[token] *
                              // embedding_scale, and tokens is unused
  const int64_t* wanted;      // [wanted_count] rows whose logits are asked for, ascending
  float* logits;              // [wanted_count, vocabulary], or null
  int32_t* best;              // [wanted_count], or null: the first index of the largest logit; of a
                              // NaN where there is one
  float* hidden_states;       // null, or [layer_count + 1, count, hidden]: what enters each layer,
                              // and what leaves the last one
  int64_t count;
  int64_t wanted_count;
  int32_t threads;            // at most; never changes a bit of the result
  int32_t reserved;
};

struct QlEngine;

// sizeof QlLinear, QlRope, QlLayer, QlModel, QlStep, for the other side to compare.
QL_API void ql_engine_struct_bytes(int64_t sizes[5]);

// `isa` is a QlIsa. On success *engine is to be destroyed by the caller; else it is null.
QL_API int32_t ql_engine_create(const QlModel* model, int32_t isa, QlEngine** engine);
QL_API void ql_engine_destroy(QlEngine* engine);  // null is allowed

// What was wrong with the model of this thread's last ql_engine_create; a static string.
QL_API const char* ql_engine_problem();

// Work space grows with `count` and stays: split long prompts into chunks of some 512 tokens. A
// step that fails appends nothing. Several threads may call; their steps follow one another.
QL_API int32_t ql_engine_step(QlEngine* engine, const QlStep* step);

// Tokens of a sequence so far; -1 when there is no such sequence.
QL_API int64_t ql_engine_length(const QlEngine* engine, int32_t sequence);

// Forget the tokens of a sequence from position `length` on (0: all).
QL_API int32_t ql_engine_truncate(QlEngine* engine, int32_t sequence, int64_t length);

// Give sequence `to` the tokens and the cache of `from` (a prompt shared by several answers).
QL_API int32_t ql_engine_copy(QlEngine* engine, int32_t from, int32_t to);

// Bytes of the KV cache and of the work space.
QL_API int64_t ql_engine_memory(const QlEngine* engine);
