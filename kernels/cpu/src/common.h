// What every kernel needs whatever the instruction set: reading the packed rows, scales and zero
// points of one output row, and rounding activations. Included by the ISA units, hence the
// anonymous namespace (see kernels.h).
//
// Inside a kernel a segment's K is padded with zero activations to a multiple of 64, so that ragged
// shapes need no special case in the loops: the codes under the padding do not matter.
#pragma once

#include <cstring>

#include "kernels.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

using ql::Problem;

constexpr int64_t kPad = 64;
// Integer sums are flushed to float at least this often: 255 * 127 * 16384 < 2^30 cannot overflow.
constexpr int64_t kMaxPiece = 16384;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
inline int64_t padded(const QlSegment& s) { return round_up(s.length, kPad); }
inline int64_t group_span(const QlSegment& s) { return s.group_size ? s.group_size : padded(s); }

// A piece is the run of K that is summed in integers: one group, or kMaxPiece of a longer one.
inline int64_t piece_span(const QlSegment& s) { return smaller(group_span(s), kMaxPiece); }
inline int64_t pieces(const QlSegment& s) {
  return (padded(s) + piece_span(s) - 1) / piece_span(s);
}

// A piece is shorter than its group only when that is the only one. Past the last group, which may
// be ragged, there is padding.
inline int64_t group_of_piece(const QlSegment& s, int64_t piece) {
  return smaller(piece, s.groups - 1);
}

inline int64_t padded_columns(const QlWeight& w) {
  int64_t total = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) total += padded(w.segments[i]);
  return total;
}

inline int64_t total_pieces(const QlWeight& w) {
  int64_t total = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) total += pieces(w.segments[i]);
  return total;
}

inline int64_t most_groups(const QlWeight& w) {
  int64_t most = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    most = most > w.segments[i].groups ? most : w.segments[i].groups;
  }
  return most;
}

// Hands out 64-byte aligned parts of a scratch buffer; counts bytes when the buffer is null.
struct Arena {
  uint8_t* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

template <class T>
inline T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}

inline float float_of_bits(uint32_t bits) { return load<float>(&bits); }

inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude < 0x0400u) {  // subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_of_bits(load<uint32_t>(&value) | sign);
  }
  const uint32_t exponent_shift = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  return float_of_bits(((magnitude << 13) + exponent_shift) | sign);
}

inline void halves_to_floats(const uint8_t* halves, int64_t count, float* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 2 * i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
  }
#endif
  for (; i < count; ++i) out[i] = half_to_float(load<uint16_t>(halves + 2 * i));
}

// Eight codes of `bits` bits fill `bits` bytes. Spreads them to one code per byte: the inverse of
// the three moves of quantlib/formats/packing.py (4+4, 2+2, 1+1 codes), without a loop over codes
// and for every width alike.
struct Spread {
  int bits;
  uint64_t low1, low2, low4;

  explicit Spread(int width) : bits(width) {
    low1 = ((1ull << bits) - 1) * 0x0001000100010001ull;
    low2 = ((1ull << 2 * bits) - 1) * 0x0000000100000001ull;
    low4 = (1ull << 4 * bits) - 1;
  }
  uint64_t operator()(uint64_t word) const {
    word = (word & low4) | ((word >> 4 * bits) & low4) << 32;
    word = (word & low2) | ((word >> 2 * bits) & low2) << 16;
    return (word & low1) | ((word >> bits) & low1) << 8;
  }
};

// Writes round_up(count, 8) codes, one per byte. Bytes past `bytes` are not read and count as zero.
template <class Spreader>
inline void unpack_row(const uint8_t* packed, int64_t bytes, int bits, int64_t count,
                       uint8_t* codes) {
  const Spreader spread(bits);
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t offset = i / 8 * bits;
    uint64_t word = 0;
    if (offset + 8 <= bytes) {
      word = load<uint64_t>(packed + offset);
    } else if (offset < bytes) {
      memcpy(&word, packed + offset, static_cast<size_t>(bytes - offset));
    }
    word = spread(word);
    memcpy(codes + i, &word, 8);
  }
}

inline float row_factor(const QlSegment& s, int64_t row) {
  const int64_t at = row * s.row_scale_stride;
  if (s.row_scale_kind == QL_ROW_SCALE_F32) return load<float>(s.row_scale + 4 * at);
  return half_to_float(load<uint16_t>(s.row_scale + 2 * at));
}

// How many scales and zero points are written per row: whole vectors, zero past the last group.
inline int64_t group_slots(int64_t groups) { return round_up(groups, 16) + 16; }

// The scales of one row as floats. `codes` is scratch for group_slots bytes.
inline void row_scales(const QlSegment& s, int64_t row, float* out, uint8_t* codes) {
  const uint8_t* stored = s.scale + row * s.scale_row_bytes;
  if (!s.scale_book) {
    halves_to_floats(stored, s.groups, out);
  } else {
    unpack_row<Spread>(stored, (s.groups * static_cast<int64_t>(s.scale_bits) + 7) / 8,
                       s.scale_bits, s.groups, codes);
    for (int64_t g = 0; g < s.groups; ++g) out[g] = s.scale_book[codes[g]];
  }
  if (s.row_scale_kind != QL_ROW_SCALE_NONE) {
    const float factor = row_factor(s, row);
    for (int64_t g = 0; g < s.groups; ++g) out[g] *= factor;
  }
  for (int64_t g = s.groups; g < group_slots(s.groups); ++g) out[g] = 0.0f;
}

// The zero points of one row, in codes. They are packed along N, so those of one row lie at one bit
// position of consecutive words, one word per group.
inline void row_zeros(const QlSegment& s, int64_t row, float* out) {
  for (int64_t g = s.groups; g < group_slots(s.groups); ++g) out[g] = 0.0f;
  if (!s.zero_point) {
    for (int64_t g = 0; g < s.groups; ++g) out[g] = static_cast<float>(1 << (s.bits - 1));
    return;
  }
  // One scale for all rows comes with one zero point.
  const int64_t bit = s.scale_row_bytes ? row * s.zero_bits : 0;
  const int shift = static_cast<int>(bit % 32);
  const uint32_t mask = (1u << s.zero_bits) - 1;
  const uint8_t* words = s.zero_point + bit / 32 * s.groups * 4;
  const bool straddles = shift + s.zero_bits > 32;
  for (int64_t g = 0; g < s.groups; ++g) {
    uint32_t value = load<uint32_t>(words + 4 * g) >> shift;
    if (straddles) value |= load<uint32_t>(words + 4 * (s.groups + g)) << (32 - shift);
    out[g] = static_cast<float>(value & mask) * s.zero_step;
  }
}

// Whether zero points can be other than whole numbers of codes.
inline bool has_rest(const QlSegment& s) {
  return s.zero_point && static_cast<float>(static_cast<int32_t>(s.zero_step)) != s.zero_step;
}

// Scales and zero points of one output row in one segment, decoded.
struct RowGroups {
  uint8_t*
      codes;  // scratch: the stored scale codes, then most_codes bytes for the kernel's own use
  float* __restrict scales;
  float* __restrict zeros;
  // A zero point is a whole number, subtracted in integers, and what is left of it, times the
  // scale.
  int32_t* __restrict whole;
  float* __restrict rest;

  RowGroups(const QlWeight& w, Arena& arena, int64_t most_codes = 0) {
    const int64_t slots = group_slots(most_groups(w));
    codes = arena.take<uint8_t>(most_codes > slots ? most_codes : slots);
    scales = arena.take<float>(slots);
    zeros = arena.take<float>(slots);
    whole = arena.take<int32_t>(slots);
    rest = arena.take<float>(slots);
  }
  void decode(const QlSegment& s, int64_t row) const {
    row_scales(s, row, scales, codes);
    row_zeros(s, row, zeros);
  }
  void decode_and_split(const QlSegment& s, int64_t row) const {
    const int64_t slots = group_slots(s.groups);
    if (!s.zero_point) {
      row_scales(s, row, scales, codes);
      for (int64_t g = 0; g < slots; ++g) whole[g] = 1 << (s.bits - 1);
      for (int64_t g = 0; g < slots; ++g) rest[g] = 0.0f;
      return;
    }
    decode(s, row);
    for (int64_t g = 0; g < slots; ++g) {
      whole[g] = static_cast<int32_t>(zeros[g] + 0.5f);
      rest[g] = scales[g] * (zeros[g] - static_cast<float>(whole[g]));
    }
  }
};

// amax / 127 of one token; NaN when a value is not finite, so that the whole output row says so.
inline float token_scale(const float* x, int64_t count) {
  // Bits of magnitudes order like the magnitudes, with NaNs above infinity.
  int32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t bits = load<int32_t>(x + k) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7F800000) return float_of_bits(0x7FC00000u);
  return load<float>(&largest) / 127.0f;
}

// x / scale rounded to nearest, ties to even, within +-127; zeros when the scale is 0 or NaN.
template <class T>
inline void round_token(const float* x, int64_t count, float scale, T* out) {
  if (!(scale > 0.0f)) {
    for (int64_t k = 0; k < count; ++k) out[k] = 0;
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    float value = x[k] / scale;
    value = value > 127.0f ? 127.0f : value;
    value = value < -127.0f ? -127.0f : value;
    // Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits.
    const float shifted = value + 0x1.8p23f;
    out[k] = static_cast<T>(load<int32_t>(&shifted) - 0x4B400000);
  }
}

// Sums of a prepared token's values over the pieces of all segments.
template <class T, class Sum>
inline void sum_pieces(const QlWeight& w, const T* values, Sum* sums) {
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    for (int64_t k = 0; k < padded(s); k += piece_span(s)) {
      int32_t sum = 0;
      for (int64_t j = k; j < smaller(k + piece_span(s), padded(s)); ++j) sum += values[j];
      *sums++ = static_cast<Sum>(sum);
    }
    values += padded(s);
  }
}

// Copies a token segment by segment, each padded with zeros.
inline void pad_token(const QlWeight& w, const float* x, float* out) {
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    memcpy(out, x + s.start, static_cast<size_t>(s.length) * sizeof(float));
    for (int64_t k = s.length; k < padded(s); ++k) out[k] = 0.0f;
    out += padded(s);
  }
}

// Rounds a token segment by segment, each padded with zeros; returns the scale.
template <class T>
inline float round_padded_token(const QlWeight& w, const float* x, T* out) {
  const float scale = token_scale(x, w.columns);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    round_token(x + s.start, s.length, scale, out);
    for (int64_t k = s.length; k < padded(s); ++k) out[k] = 0;
    out += padded(s);
  }
  return scale;
}

}  // namespace
