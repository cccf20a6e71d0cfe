// The segments of an integer product along K, as kernel (b) is compiled for them.
//
// A *step* is 64 bytes of each token's codes and two *chunks* of 32 bytes, one matrix instruction
// each. What a step is in columns depends on the segment's kind:
//
//   kBytes      weights and tokens are bytes: 64 columns
//   kNibbles    both are nibbles, tokens with a sign: 128 columns (sm_80 to sm_89)
//   kUnsigned   the same with tokens of 0..15, whose zero points are taken off the sums
//   kMixed      weights are nibbles, tokens bytes: 64 columns. Nibbles become bytes of 16 times
//               their value, which costs three operations for eight of them
//
// A *span* is what shares its scales: a chunk, or `span_steps` steps, the last span of a segment
// what is left of it. kernels/cuda/segmented.py gives the macros.
#pragma once

#include "device.h"

namespace segments {

constexpr int kBytes = 0, kNibbles = 1, kUnsigned = 2, kMixed = 3;
constexpr int kCount = QL_SEGMENTS;
constexpr int kStepBytes = 64, kRowTile = 16;
constexpr int kWholeStrip = kRowTile * kStepBytes;  // bytes of 16 rows of a weight in a step

struct Segment {
  int kind, steps;
  int span_steps;  // 0: a span is a chunk
  bool zeros;      // whether weights have zero points

  __host__ __device__ constexpr bool nibbles() const {
    return kind == kNibbles || kind == kUnsigned;
  }
  __host__ __device__ constexpr int strip_bytes() const {
    return kind == kMixed ? kWholeStrip / 2 : kWholeStrip;
  }
  __host__ __device__ constexpr int spans() const {
    return span_steps == 0 ? 2 * steps : (steps + span_steps - 1) / span_steps;
  }
  // What the sum of a span's products cannot exceed, zero points taken off or not.
  __host__ __device__ constexpr int64_t largest_sum() const {
    const int weight = kind == kBytes || kind == kMixed ? 128 : 8;
    const int token = kind == kBytes || kind == kMixed ? 127 : 15;
    const int chunk_columns = nibbles() ? 64 : 32;
    const int chunks = span_steps == 0 ? 1 : 2 * (span_steps < steps ? span_steps : steps);
    return int64_t{1} * weight * token * chunk_columns * chunks;
  }
};

__host__ __device__ constexpr Segment segment(int i) {
  return i == 0   ? Segment{QL_KIND_0, QL_STEPS_0, QL_SPAN_STEPS_0, QL_ZEROS_0 != 0}
         : i == 1 ? Segment{QL_KIND_1, QL_STEPS_1, QL_SPAN_STEPS_1, QL_ZEROS_1 != 0}
                  : Segment{QL_KIND_2, QL_STEPS_2, QL_SPAN_STEPS_2, QL_ZEROS_2 != 0};
}

// Of all segments before number `end`: steps, spans, and bytes of 16 rows of the weight.
__host__ __device__ constexpr int steps_before(int end) {
  int sum = 0;
  for (int i = 0; i < end; ++i) sum += segment(i).steps;
  return sum;
}
__host__ __device__ constexpr int spans_before(int end) {
  int sum = 0;
  for (int i = 0; i < end; ++i) sum += segment(i).spans();
  return sum;
}
__host__ __device__ constexpr int64_t bytes_before(int end) {
  int64_t sum = 0;
  for (int i = 0; i < end; ++i) sum += int64_t{1} * segment(i).steps * segment(i).strip_bytes();
  return sum;
}

__host__ __device__ constexpr bool any_zeros() {
  for (int i = 0; i < kCount; ++i) {
    if (segment(i).zeros) return true;
  }
  return false;
}
__host__ __device__ constexpr bool any_of(int kind) {
  for (int i = 0; i < kCount; ++i) {
    if (segment(i).kind == kind) return true;
  }
  return false;
}
__host__ __device__ constexpr bool any_chunk_spans() {
  for (int i = 0; i < kCount; ++i) {
    if (segment(i).span_steps == 0) return true;
  }
  return false;
}

constexpr int kSteps = steps_before(kCount), kSpans = spans_before(kCount);
static_assert(kCount >= 1 && kCount <= 3 && kSteps > 0, "one to three segments");
// Whether all of a tile is one span of several steps: nothing is scaled before its end.
constexpr bool kOneSpan = kCount == 1 && segment(0).steps > 1 &&
                          segment(0).span_steps >= segment(0).steps;

// Integers become floats without a conversion, which would take four times as long: sums begin at
// the bits of 1.5 2^23, so that they are the bits of 1.5 2^23 + sum, as long as |sum| <= 2^22. The
// constant is taken off again by the fma that scales: its product with a scale of 11 bits is exact.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.f;

template <int s>
struct Conversion {
  static constexpr bool kIsMagic = segment(s).largest_sum() <= (int64_t{1} << 22);
  static constexpr int kStart = kIsMagic ? kMagicBits : 0;
};

}  // namespace segments
