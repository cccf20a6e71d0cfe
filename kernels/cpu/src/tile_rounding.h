// Activations to integers (TileForm and round_token of tiles.h), for every unit.
#pragma once

#include "tile_rotation.h"
#include "tiles.h"

namespace {

// What numbers that share a scale have in common.
struct Extremes {
  int32_t magnitude = 0;  // bits of the largest one: they order like the magnitudes, with infinity
                          // and NaNs at the top
  float low = 0.0f, high = 0.0f;  // with 0 among the numbers; asymmetric only
};

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
  IntLanes all = max_int(max_int(largest[0], largest[1]), max_int(largest[2], largest[3]));
  const auto fold = [&](Lanes swapped) { all = max_int(all, float_bits(swapped)); };
  fold(swap_lanes<8>(bits_as_floats(all)));
  fold(swap_lanes<4>(bits_as_floats(all)));
  fold(swap_lanes<2>(bits_as_floats(all)));
  fold(swap_lanes<1>(bits_as_floats(all)));
  int32_t lanes[16];
  store_int(lanes, all);
  return lanes[0];
}

// The largest of all lanes, in registers; not for NaNs, and of zeros it is either one.
inline float largest_lane(Lanes a) {
  a = max_of(a, swap_lanes<8>(a));
  a = max_of(a, swap_lanes<4>(a));
  a = max_of(a, swap_lanes<2>(a));
  a = max_of(a, swap_lanes<1>(a));
  float lanes[16];
  store(lanes, a);
  return lanes[0];
}

// Two chains of each, so that one waits while the other works. What is not finite is seen by its
// magnitude.
inline void widen_range(const float* x, int64_t count, Extremes& extremes) {
  Lanes low = broadcast(extremes.low), high = broadcast(extremes.high);
  Lanes second_low = low, second_high = high;
  int64_t k = 0;
  for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
    const Lanes some = load(x + k), others = load(x + k + kLanes);
    low = min_of(some, low);
    high = max_of(some, high);
    second_low = min_of(others, second_low);
    second_high = max_of(others, second_high);
  }
  for (; k < count; k += kLanes) {
    const Lanes some = load_first(x + k, smaller_of(count - k, kLanes));
    low = min_of(some, low);
    high = max_of(some, high);
  }
  extremes.low = -largest_lane(-min_of(low, second_low));
  extremes.high = largest_lane(max_of(high, second_high));
}

inline void widen(const float* x, int64_t count, bool symmetric, Extremes& extremes) {
  extremes.magnitude = largest_bits(x, count, extremes.magnitude);
  if (!symmetric) widen_range(x, count, extremes);
}

// A scale, and the codes there are.
struct Grid {
  float scale, least, most;
};

inline Grid grid_of(const ql::TileRounding& how, const Extremes& extremes) {
  if (extremes.magnitude >= 0x7F800000) return {__builtin_nanf(""), 0.0f, 0.0f};
  if (how.symmetric) {
    float largest;
    memcpy(&largest, &extremes.magnitude, sizeof(largest));
    const float most = static_cast<float>((1 << (how.bits - 1)) - 1);
    return {largest * how.clip / most, -most, most};
  }
  const float steps = static_cast<float>((1 << how.bits) - 1);
  const float low = extremes.low * how.clip, high = extremes.high * how.clip;
  const float scale = (high - low) / steps;
  if (!(scale > 0.0f)) return {scale, 0.0f, 0.0f};
  // More than `steps` only where the scale is subnormal; a code must fit an int8 even then.
  float zero = __builtin_nearbyintf(-low / scale);
  zero = zero < 127.0f ? zero : 127.0f;
  return {scale, -zero, steps - zero};
}

// x[0..count) / scale to the nearest integers, ties to even, within the grid; zeros when the scale
// is 0 or NaN, and from `count` to `padded`, a multiple of 16.
inline void round_values(const float* x, int64_t count, int64_t padded, const Grid& grid,
                         int8_t* values) {
  if (!(grid.scale > 0.0f)) {
    memset(values, 0, static_cast<size_t>(padded));
    return;
  }
  const Lanes divisor = broadcast(grid.scale);
  const Lanes most = broadcast(grid.most), least = broadcast(grid.least);
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

// Repeats a scale for what lies in padded columns [begin, end) of segment `index`.
inline void write_scales(int64_t act_group, int64_t index, int64_t begin, int64_t end, float scale,
                         float* token_scales, float* segment_scales) {
  if (act_group <= 0) {
    token_scales[act_group ? index : 0] = scale;
    return;
  }
  for (int64_t k = begin; k < end; k += act_group) segment_scales[k / act_group] = scale;
}

// Rounds a token, segment i of it as rounding_of(i) says.
template <class RoundingOf>
void round_segments(const ql::TiledWeight& w, const RoundingOf& rounding_of, int64_t act_group,
                    const float* x, int8_t* values, float* sums, float* scales) {
  float* segment_scales = scales;
  for (int64_t i = 0; i < w.segment_count;) {
    const ql::TileRounding how = rounding_of(i);
    Extremes all;
    int64_t end = i;
    do {
      const ql::TileSegment& s = w.segments[end++];
      if (!how.group) widen(x + s.start, s.length, how.symmetric, all);
    } while (end < w.segment_count && rounding_of(end).joined);
    Grid grid = grid_of(how, all);
    for (; i < end; ++i) {
      const ql::TileSegment& s = w.segments[i];
      const int64_t span = how.group ? how.group : s.padded;
      for (int64_t k = 0; k < s.padded; k += span) {
        const int64_t columns = smaller_of(s.padded - k, span);
        const int64_t left = s.length - k, count = left > 0 ? smaller_of(left, columns) : 0;
        if (how.group) {
          Extremes own;
          widen(x + s.start + k, count, how.symmetric, own);
          grid = grid_of(how, own);
        }
        round_values(x + s.start + k, count, columns, grid, values + k);
        write_scales(act_group, i, k, k + columns, grid.scale, scales, segment_scales);
      }
      write_sums(values, s.padded, sums);
      values += s.padded;
      sums += sum_count(s.padded);
      if (act_group > 0) segment_scales += act_group_count(s.padded, act_group);
    }
  }
}

// Eight bits for all; one scale, or one for every act_group columns.
void round_token(const ql::TiledWeight& w, const float* x, int64_t act_group, int8_t* values,
                 float* sums, float* scales) {
  const auto same = [&](int64_t i) { return ql::TileRounding{8, 1, 1.0f, i > 0, act_group}; };
  round_segments(w, same, act_group, x, values, sums, scales);
}

void round_token_as(const ql::TiledWeight& w, const ql::TileForm& form, const float* x, float* work,
                    int8_t* values, float* sums, float* scales) {
  const auto given = [&](int64_t i) { return form.rounding[i]; };
  round_segments(w, given, form_act_group(w, form), arranged(w, form, x, work), values, sums,
                 scales);
}

void arrange_token(const ql::TiledWeight& w, const ql::TileForm& form, const float* x, float* work,
                   float* floats) {
  const float* from = arranged(w, form, x, work);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    memcpy(floats, from + s.start, static_cast<size_t>(s.length) * sizeof(float));
    for (int64_t k = s.length; k < s.padded; ++k) floats[k] = 0.0f;
    floats += s.padded;
  }
}

}  // namespace
