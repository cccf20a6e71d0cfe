// Sixteen lanes at a time: float32 and int32 vectors of the size of a block of output rows.
//
// One source for every instruction set: the unit's flags choose whether a vector is one register
// (AVX-512), two (AVX2 with FMA and F16C) or four (any processor). Every operation gives the same
// bits on all of them. That holds because a multiplication and an addition are joined only where
// the source says `fma`: units must be built with -ffp-contract=off.
//
//   Lanes     16 x float32      load, store, broadcast, + - * /, fma, min_of, max_of, exp_of,
//                               swap_lanes, ...
//   IntLanes  16 x int32        load, broadcast, + - * & |, shifts, comparisons with `select`
//
// `_first` loads and stores touch the first `count` lanes only (0 <= count <= 16; others are 0).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

namespace {

constexpr int64_t kLanes = 16;

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline Lanes operator-(Lanes a) { return bits_as_floats(float_bits(a) ^ broadcast_int(INT32_MIN)); }
inline Lanes abs_of(Lanes a) { return bits_as_floats(float_bits(a) & broadcast_int(INT32_MAX)); }
inline Lanes zero_lanes() { return broadcast(0.0f); }

inline Lanes load_bf16(const void* from) { return bits_as_floats(load_u16(from) << 16); }

// Horizontal sum and maximum in one fixed order: lane i with i + 8, then i + 4, i + 2, i + 1.
inline float sum_of(Lanes a) {
#if defined(__AVX512F__)
  return sum_of_lanes(a);  // the same without a way through memory
#else
  float lane[16];
  store(lane, a);
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
#endif
}

// NaN lanes may be lost.
inline float highest(Lanes a) {
  float lane[16];
  store(lane, a);
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// e^x within 0.9 ulp (of the smallest step where results are subnormal): 0 below -104, infinity
// from 89 on, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2, then e^r = 1 + r + r^2 q(r) with q
// of degree 4 fitted to the least relative error (0.05 ulp), times 2^n.
inline Lanes exp_of(Lanes x) {
  // The order of the operands keeps NaNs: min_of and max_of return the second one then.
  x = max_of(broadcast(-104.0f), min_of(broadcast(89.0f), x));
  const Lanes n = round_to_even(x * broadcast(0x1.715476p+0f));
  Lanes r = fma(n, broadcast(-0x1.62e4p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  Lanes p = broadcast(0x1.6a23dp-10f);
  p = fma(p, r, broadcast(0x1.123a2p-7f));
  p = fma(p, r, broadcast(0x1.5558f2p-5f));
  p = fma(p, r, broadcast(0x1.555492p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_two(p, n);
}

// x / (1 + e^-x).
inline Lanes silu_of(Lanes x) { return x / (broadcast(1.0f) + exp_of(-x)); }

}  // namespace
