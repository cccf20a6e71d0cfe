// Activations to int8 (round_token of tiles.h), for units with vectors. Bits are those of
// tile_portable.h.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace {

// Bits of the largest magnitude among x[0..count) and `former`: they order like the magnitudes,
// with infinity and NaNs at the top.
inline int32_t largest_bits(const float* x, int64_t count, int32_t former) {
  const IntLanes magnitude = broadcast_int(INT32_MAX);
  IntLanes largest[4];
  for (int i = 0; i < 4; ++i) largest[i] = broadcast_int(former);
  int64_t k = 0;
  for (; k + 4 * kLanes <= count; k += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      largest[i] = max_int(largest[i], float_bits(load(x + k + i * kLanes)) & magnitude);
    }
  }
  for (; k < count; k += kLanes) {
    const Lanes last = load_first(x + k, smaller_of(count - k, kLanes));
    largest[0] = max_int(largest[0], float_bits(last) & magnitude);
  }
  int32_t lanes[16];
  store_int(lanes, max_int(max_int(largest[0], largest[1]), max_int(largest[2], largest[3])));
  int32_t result = lanes[0];
  for (int i = 1; i < 16; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// amax / 127; NaN when it is not finite, so that everything computed from it says so.
inline float scale_of_largest(int32_t bits) {
  if (bits >= 0x7F800000) return __builtin_nanf("");
  float largest;
  memcpy(&largest, &bits, sizeof(largest));
  return largest / 127.0f;
}

// x[0..count) / scale to the nearest integers, ties to even, within +-127; zeros when the scale is
// 0 or NaN, and from `count` to `padded`, a multiple of 16.
inline void round_values(const float* x, int64_t count, int64_t padded, float scale,
                         int8_t* values) {
  if (!(scale > 0.0f)) {
    memset(values, 0, static_cast<size_t>(padded));
    return;
  }
  const Lanes divisor = broadcast(scale), most = broadcast(127.0f), least = broadcast(-127.0f);
  for (int64_t k = 0; k < padded; k += kLanes) {
    const int64_t left = count - k;
    const Lanes a = left >= kLanes ? load(x + k) : load_first(x + k, left > 0 ? left : 0);
    store_i8(values + k, rounded_ints(max_of(least, min_of(most, a / divisor))));
  }
}

inline int32_t sum_of_16(const int8_t* values) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += values[i];
  return sum;
}

// Sums over 16 columns, then from each level the next: all are whole and below 2^24, so exact.
inline void write_sums(const int8_t* values, int64_t padded, float* sums) {
  int64_t count = padded / 16;
  for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<float>(sum_of_16(values + 16 * i));
  for (int level = 0; level < 3; ++level) {
    float* next = sums + count;
    for (int64_t i = 0; i < count / 2; ++i) next[i] = sums[2 * i] + sums[2 * i + 1];
    if (count % 2) next[count / 2] = sums[count - 1];
    sums = next;
    count = (count + 1) / 2;
  }
}

void round_token(const ql::TiledWeight& w, const float* x, int64_t act_group, int8_t* values,
                 float* sums, float* scales) {
  if (!act_group) {
    int32_t largest = 0;
    for (int64_t i = 0; i < w.segment_count; ++i) {
      largest = largest_bits(x + w.segments[i].start, w.segments[i].length, largest);
    }
    *scales = scale_of_largest(largest);
  }
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const float* from = x + s.start;
    if (!act_group) {
      round_values(from, s.length, s.padded, *scales, values);
    } else {
      for (int64_t k = 0; k < s.padded; k += act_group) {
        const int64_t count = smaller_of(s.length - k, act_group);
        const int64_t padded = smaller_of(s.padded - k, act_group);
        *scales = scale_of_largest(largest_bits(from + k, count, 0));
        round_values(from + k, count, padded, *scales++, values + k);
      }
    }
    write_sums(values, s.padded, sums);
    values += s.padded;
    sums += sum_count(s.padded);
  }
}

}  // namespace
