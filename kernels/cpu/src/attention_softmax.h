// The softmax of attention, over one block of positions after the other: scores become weights, and
// the sums over different positions are joined. Needs lanes.h.
#pragma once

#include "attention_tile.h"
#include "kv_cache.h"

namespace {

constexpr float kNothing = -__builtin_inff();

// What rows of a tile see of a block: positions [begin, end) of each row, counted from the block.
struct Sight {
  int64_t begin[kTileRows];
  int64_t end[kTileRows];
  int64_t first;  // of any row
  int64_t last;
};

inline LaneMask between(int64_t vector, int64_t begin, int64_t end) {
  alignas(64) constexpr float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  // Lane i is position 16 * vector + i, compared with the middle of the range: no tie is possible.
  const Lanes i = load(kCount) + broadcast(static_cast<float>(16 * vector));
  const Lanes low = broadcast(static_cast<float>(begin) - 0.5f);
  const Lanes high = broadcast(static_cast<float>(end) - 0.5f);
  return less(abs_of(i - (low + high) * broadcast(0.5f)), (high - low) * broadcast(0.5f));
}

// The highest lane, none of them a NaN: the order does not matter then, and the processor's is
// faster.
inline float highest_number(Lanes a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.v);
#else
  return highest(a);
#endif
}

// Caps and masks the scores of a row; returns the highest.
inline float finish_scores(float* scores, int64_t vectors, int64_t begin, int64_t end,
                           float softcap) {
  Lanes top = broadcast(kNothing);
  for (int64_t v = 0; v < vectors; ++v) {
    Lanes x = load(scores + 16 * v);
    const bool masked = begin > 16 * v || end < 16 * v + 16;
    if (softcap != 0.0f) {
      const Lanes e = exp_of(x * broadcast(2.0f / softcap));
      x = broadcast(softcap) * (broadcast(1.0f) - broadcast(2.0f) / (broadcast(1.0f) + e));
    }
    if (masked) x = select(between(v, begin, end), x, broadcast(kNothing));
    if (masked || softcap != 0.0f) store(scores + 16 * v, x);
    top = max_of(x, top);  // NaNs do not enter: they come out of the sum of weights
  }
  return highest_number(top);
}

// Scores [rows][64] become weights; `sums` and the factors of what was summed before follow.
inline void soften(float* scores, int64_t rows, const Sight& sight, float softcap, float* highest,
                   float* weights, float* carry) {
  const int64_t vectors = (sight.last + 15) / 16;
  alignas(64) float before[16] = {}, bases[16] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const float top =
        finish_scores(scores + r * ql::kKvBlock, vectors, sight.begin[r], sight.end[r], softcap);
    before[r] = highest[r];
    if (top > highest[r]) highest[r] = top;
    bases[r] = highest[r] > kNothing ? highest[r] : 0.0f;
  }
  store(carry, exp_of(load(before) - load(bases)));
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ql::kKvBlock;
    Lanes sum = zero_lanes();
    for (int64_t v = 0; v < vectors; ++v) {
      const Lanes weight = exp_of(load(row + 16 * v) - broadcast(bases[r]));
      store(row + 16 * v, weight);
      sum = sum + weight;
    }
    store(weights + 16 * r, fma(load(weights + 16 * r), broadcast(carry[r]), sum));
  }
}

// total += more, for one row: both over different positions.
inline void merge_row(float* highest, float* weights, float* values, float more_highest,
                      const float* more_weights, const float* more_values, int64_t padded) {
  const float top = more_highest > *highest ? more_highest : *highest;
  const Lanes base = broadcast(top > kNothing ? top : 0.0f);
  const Lanes a = exp_of(broadcast(*highest) - base), b = exp_of(broadcast(more_highest) - base);
  store(weights, fma(load(more_weights), b, load(weights) * a));
  for (int64_t at = 0; at < padded; at += 16) {
    store(values + at, fma(load(more_values + at), b, load(values + at) * a));
  }
  *highest = top;
}

}  // namespace
