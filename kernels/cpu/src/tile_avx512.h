// What the AVX-512 int8 kernels on tiles share: scales and zeros of a block, activations, and the
// way from dot products to outputs. The arithmetic is in tiles.h.
#pragma once

#include "tile_avx512_codes.h"

namespace vnni {
namespace {

// Accumulators of VPDPBUSD. The compiler takes __m512i for eight int64, and when such a value lives
// across the passes of a loop it copies it on each: with the type that the instruction works on, it
// does not.
typedef int32_t DotLanes __attribute__((vector_size(64)));

// Adds to each lane four products of unsigned codes and signed activations.
inline DotLanes dot4(DotLanes sums, __m512i codes, __m512i values) {
  return reinterpret_cast<DotLanes>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, values));
}

inline __m512 floats_of(DotLanes dots) {
  return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(dots));
}

// Four activations, for all lanes.
inline __m512i four_values(const int8_t* values) {
  int32_t four;
  __builtin_memcpy(&four, values, sizeof(four));
  return _mm512_set1_epi32(four);
}

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// Calls body(Constant<n>) for n = count in [first, last].
template <int first, int last, class Body>
inline void with_constant(int64_t count, const Body& body) {
  if constexpr (first < last) {
    if (count > first) return with_constant<first + 1, last>(count, body);
  }
  body(Constant<first>{});
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The first `count` of 16 lanes, all when it is 16 or more.
inline __mmask16 lanes_below(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1);
}

// Scales and zeros of the 16 rows of a block.
struct BlockMeta {
  __m512 scale, zero;
};

inline __m512i bytes_at(const uint8_t* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

inline __m512 halves_at(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

// Three ways to read a block's meta. Where groups are short and tokens few this takes as long as
// the dot products, so that the frequent formats have readers of their own (`with_meta`).

// Halves, and the same zero for all.
class HalfMeta {
 public:
  explicit HalfMeta(const ql::TileSegment& s) : zero_(_mm512_set1_ps(s.zero_constant)) {}

  // `factors` are those of the block's rows.
  BlockMeta read(const uint8_t* meta, const float* factors) const {
    return {_mm512_mul_ps(halves_at(meta), _mm512_loadu_ps(factors)), zero_};
  }

 private:
  __m512 zero_;
};

// A scale and a zero of four bits in a byte: both are looked up, by instructions that look at four
// bits of an index and no more.
class NibbleMeta {
 public:
  explicit NibbleMeta(const ql::TileSegment& s)
      : numbers_(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        zeros_(_mm512_mul_ps(numbers_, _mm512_set1_ps(s.zero_step))) {}

  BlockMeta read(const uint8_t* meta, const float* factors) const {
    const __m512i bytes = bytes_at(meta);
    const __m512 number = _mm512_permutexvar_ps(bytes, numbers_);
    return {_mm512_mul_ps(number, _mm512_loadu_ps(factors)),
            _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), zeros_)};
  }

 private:
  __m512 numbers_, zeros_;
};

// Every form there is.
class AnyMeta {
 public:
  explicit AnyMeta(const ql::TileSegment& s)
      : scale_kind_(s.scale_kind),
        zero_kind_(s.zero_kind),
        has_unit_(s.integer_unit != 1.0f),
        scale_mask_(_mm512_set1_epi32(s.zero_kind == ql::ZERO_NIBBLE ? (1 << s.scale_bits) - 1
                                                                     : 255)),
        zero_shift_(_mm_cvtsi32_si128(s.scale_bits)),
        zero_(_mm512_set1_ps(s.zero_constant)),
        zero_step_(_mm512_set1_ps(s.zero_step)),
        unit_(_mm512_set1_ps(s.integer_unit)) {}

  BlockMeta read(const uint8_t* meta, const float* factors) const {
    BlockMeta block{_mm512_setzero_ps(), zero_};
    if (scale_kind_ == ql::SCALE_F16) {
      block.scale = halves_at(meta);
      if (zero_kind_ == ql::ZERO_BYTE) block.zero = zeros_of(bytes_at(meta + 32));
    } else {
      const __m512i bytes = bytes_at(meta);
      block.scale = numbers_of(_mm512_and_si512(bytes, scale_mask_));
      if (zero_kind_ == ql::ZERO_NIBBLE) {
        block.zero = zeros_of(_mm512_srl_epi32(bytes, zero_shift_));
      } else if (zero_kind_ == ql::ZERO_BYTE) {
        block.zero = zeros_of(bytes_at(meta + 16));
      }
    }
    block.scale = _mm512_mul_ps(block.scale, _mm512_loadu_ps(factors));
    if (has_unit_) block.scale = _mm512_mul_ps(block.scale, unit_);
    return block;
  }

 private:
  __m512 zeros_of(__m512i codes) const {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(codes), zero_step_);
  }

  __m512 numbers_of(__m512i codes) const {
    if (scale_kind_ == ql::SCALE_CODE) return _mm512_cvtepi32_ps(codes);
    if (scale_kind_ == ql::SCALE_E8M0) {  // its bits are an exponent's; 2^-127 is subnormal
      return _mm512_castsi512_ps(
          _mm512_max_epu32(_mm512_slli_epi32(codes, 23), _mm512_set1_epi32(1 << 22)));
    }
    // e4m3: its exponent and fraction, as those of a float, mean 2^-120 times the number.
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(codes, 20)),
                         _mm512_set1_ps(0x1p120f));
  }

  int32_t scale_kind_, zero_kind_;
  bool has_unit_;
  __m512i scale_mask_;
  __m128i zero_shift_;
  __m512 zero_, zero_step_, unit_;
};

// Calls body(reader) with the fastest reader for `s`.
template <class Body>
inline void with_meta(const ql::TileSegment& s, const Body& body) {
  if (!s.integer_values) {
    if (s.scale_kind == ql::SCALE_F16 && s.zero_kind == ql::ZERO_NONE) return body(HalfMeta(s));
    if (s.zero_kind == ql::ZERO_NIBBLE && s.scale_bits == 4) return body(NibbleMeta(s));
  }
  body(AnyMeta(s));
}

// The activations that meet one segment, from its first column on.
struct SegmentInput {
  const int8_t* values;
  const float* sums;    // over the segment's pieces
  const float* scales;  // of activation groups; null when there are none
  int64_t value_stride;
  int64_t sum_stride;
  int64_t scale_stride;
  int64_t act_group;

  // Of the activation group of column k of the segment, the first token's; null without groups.
  const float* scale_at(int64_t k) const { return scales ? scales + k / act_group : nullptr; }
};

// Walks over the segments: where the activations of each are, from some token on.
class InputCursor {
 public:
  InputCursor(const ql::TileInput& in, int64_t token) : in_(in), token_(token) {}

  // The activations of `s`, which must be the next segment.
  SegmentInput next(const ql::TileSegment& s) {
    const int8_t* values = in_.values + token_ * in_.value_stride + columns_;
    const float* sums = in_.sums + token_ * in_.sum_stride + sums_ + sum_offset(s.padded, s.piece);
    const float* scales = in_.scales + token_ * in_.scale_stride + groups_;
    const SegmentInput input{values,          sums,           in_.act_group ? scales : nullptr,
                             in_.value_stride, in_.sum_stride, in_.scale_stride,
                             in_.act_group};
    columns_ += s.padded;
    sums_ += sum_count(s.padded);
    if (in_.act_group) groups_ += act_group_count(s.padded, in_.act_group);
    return input;
  }

 private:
  const ql::TileInput& in_;
  int64_t token_;
  int64_t columns_ = 0, sums_ = 0, groups_ = 0;
};

// Totals -> outputs: 16 rows from `row` on, of one token.
inline void store_rows(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                       int64_t row, int64_t token, __m512 total) {
  const __mmask16 mask = lanes_below(w.rows - row);
  const float scale = in.act_group ? 1.0f : in.scales[token * in.scale_stride];
  const __m512 bias =
      out.bias ? _mm512_maskz_loadu_ps(mask, out.bias + row) : _mm512_setzero_ps();
  float* y = out.y + token * out.y_stride + row;
  __m512 result = _mm512_fmadd_ps(total, _mm512_set1_ps(scale), bias);
  if (out.accumulate) result = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), result);
  _mm512_mask_storeu_ps(y, mask, result);
}

}  // namespace
}  // namespace vnni
