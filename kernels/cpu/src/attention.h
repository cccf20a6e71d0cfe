// Attention on a KV cache (kv_cache.h), read as it is packed: what an instruction set offers.
//
// The arithmetic is fixed, so that every instruction set and number of threads, a token alone or in
// a prompt, and a packed cache or a float32 cache of the numbers it stands for, give the same bits.
// For a query at position t of a sequence, which sees [max(0, t - window + 1), t]:
//
//   q'        = q * scale, rotated when the keys are
//   score[i]  = sum of q'[c] * k[i][c]: one fma per column, in order; softcap * tanh(./softcap)
//   in *splits* of 256 positions, counted from position 0, and in these in blocks of 64:
//     m' = max(m, scores); p[i] = exp(score[i] - m')
//     l = fma(l, exp(m - m'), sum of p)    in 16 lanes: position i in lane i % 16
//     o = o * exp(m - m'), then one fma per position p[i] * v[i], in order
//   splits are merged from the left; output = o / (sum of the lanes of l), rotated back when the
//   values are
//
// With `integer`, what is packed (8 or 4 bits) is multiplied in integers: codes with numbers n of
// 16 bits, x ~ n * step with step = max|x| / 32512 and n = rint(x * (32512 / max|x|)); everything
// is 0 where max|x| < 2^-100, and NaN where one is not finite. Sums of products are exact then:
//
//   x = q', one step a query:
//   score[i]  = step * (fma(fma(-zero[i], sum of n, sum of n * code[i]), scale[i], . ) over groups)
//   x = p[i] * scale[i] over what is seen of a block, one step a query, block and group of columns:
//   o[c]      = fma(sum of n * code[c] - sum of n * zero, step, o[c] * exp(m - m'))
//               the second sum in 16 lanes of float32, position i in lane i % 16
//
// instead of the sums above; all else stays.
//
// Units of work: prefill and short contexts take (sequence, KV head, block of tokens), one after
// the other from the left; decode takes (sequence, KV head, split) and merges after a barrier.
// Query heads that share a KV head are computed together, so that it is read once.
#pragma once

#include "kv_cache.h"

namespace ql {

constexpr int64_t kSplitPositions = 256;
constexpr int64_t kAttentionRows = 96;  // queries (tokens x heads) of a unit

struct AttentionShape {
  int64_t heads;   // query heads, 1 to 96 for each KV head
  int64_t window;  // positions a query sees, itself included; 0: all
  float scale;
  float softcap;  // 0: none
  int32_t integer;  // 1: packed keys and values are multiplied in integers
  int32_t reserved;
};

// All functions are for one sequence and one KV head of a layer; rows of q, k, v and out have
// head_dim floats per head, head after head, and are `stride` floats apart. `scratch` has
// scratch_bytes bytes, 64-byte aligned, and its contents do not matter. Positions are the caller's
// to check against the capacity.
struct AttentionKernels {
  // Stores positions [first, first + count). `key` and `value` point to this KV head's columns of
  // the first of them. Different KV heads or sequences may be appended at the same time.
  void (*append)(const KvLayer& cache, int64_t sequence, int64_t kv_head, int64_t first,
                 int64_t count, const float* key, int64_t key_stride, const float* value,
                 int64_t value_stride);

  int64_t (*scratch_bytes)(const KvLayer& cache);

  // The heads of this KV head for `tokens` tokens (at most attention_tokens) at positions first and
  // on, which have been appended. `query` and `out` point to row 0, column 0 of all heads.
  void (*attend_tokens)(const KvLayer& cache, const AttentionShape& shape, int64_t sequence,
                        int64_t kv_head, int64_t first, int64_t tokens, const float* query,
                        int64_t query_stride, float* out, int64_t out_stride, uint8_t* scratch);

  // Part of the same for one token at `position`: one split of attention_splits, numbered from 0.
  // `query` points to the token's row. `partial` has partial_floats floats.
  void (*attend_split)(const KvLayer& cache, const AttentionShape& shape, int64_t sequence,
                       int64_t kv_head, int64_t position, int64_t split, const float* query,
                       float* partial, uint8_t* scratch);

  // `partials` of all splits, partial_floats apart; `out` points to the token's row.
  void (*merge_splits)(const KvLayer& cache, const AttentionShape& shape, int64_t kv_head,
                       int64_t splits, const float* partials, float* out, uint8_t* scratch);

  // The numbers that positions [first, first + count) stand for (what a query sees, rotated back):
  // `key` and `value` as in append.
  void (*dequantize)(const KvLayer& cache, int64_t sequence, int64_t kv_head, int64_t first,
                     int64_t count, float* key, int64_t key_stride, float* value,
                     int64_t value_stride, uint8_t* scratch);
};

// One table per translation unit; the VNNI variants share that of their vector width.
extern const AttentionKernels portable_attention;
extern const AttentionKernels avx2_attention;  // where build.py compiles them
extern const AttentionKernels avx512_attention;

// The table of a QlIsa (kv_api.cpp); null when this processor does not have it.
const AttentionKernels* attention_of(int32_t isa);

}  // namespace ql

namespace {

// Tokens of a unit of attend_tokens.
inline int64_t attention_tokens(const ql::KvLayer& cache, const ql::AttentionShape& shape) {
  const int64_t tokens = ql::kAttentionRows * cache.kv_heads / shape.heads;
  return tokens > 1 ? tokens : 1;
}

// Positions [attention_begin, position] are seen from `position`.
inline int64_t attention_begin(const ql::AttentionShape& shape, int64_t position) {
  const int64_t begin = position + 1 - shape.window;
  return shape.window == 0 || begin < 0 ? 0 : begin;
}

// Units of attend_split for a token at `position`.
inline int64_t attention_splits(const ql::AttentionShape& shape, int64_t position) {
  return position / ql::kSplitPositions - attention_begin(shape, position) / ql::kSplitPositions +
         1;
}

// Floats of a partial: per query head of a KV head, padded columns, 16 lanes of l, 16 of m.
inline int64_t partial_floats(const ql::KvLayer& cache, const ql::AttentionShape& shape) {
  return shape.heads / cache.kv_heads * (kv_padded(cache.head_dim) + 32);
}

}  // namespace
