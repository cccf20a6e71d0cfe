// Dot products, and scales and zeros of a block, for the AVX-512 int8 kernels on tiles.
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

// Two ways to read a block's meta. Where groups are short and tokens few this takes as long as the
// dot products, so that the most frequent format has a reader of its own.

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

// The numbers of two-level scales in a piece of a block, where sums are whole: what a dot product is
// multiplied by, but for code_units, and in the low halves of lanes what a sum of activations is.
struct WholeMeta {
  __m512i scale, zero;
};

class WholeReader {
 public:
  explicit WholeReader(const ql::TileSegment& s)
      : zero_kind_(s.zero_kind),
        mask_(_mm512_set1_epi32((1 << s.scale_bits) - 1)),
        shift_(_mm512_set1_epi32(s.scale_bits)),
        zero_(_mm512_set1_epi32(static_cast<int32_t>(s.zero_constant))),
        minus_units_(_mm512_set1_epi32(0xFFFF & -units_of_zeros(s))) {}

  WholeMeta read(const uint8_t* meta) const {
    const WholeMeta own = read_codes(meta);
    return {own.scale, _mm512_mullo_epi16(own.zero, minus_units_)};
  }

  // The same but for the factor of zeros, -units_of_zeros.
  WholeMeta read_codes(const uint8_t* meta) const {
    const __m512i bytes = bytes_at(meta), scale = _mm512_and_si512(bytes, mask_);
    __m512i zero = zero_;
    if (zero_kind_ == ql::ZERO_NIBBLE) {
      zero = _mm512_srlv_epi32(bytes, shift_);
    } else if (zero_kind_ == ql::ZERO_BYTE) {
      zero = bytes_at(meta + 16);
    }
    return {scale, _mm512_mullo_epi16(zero, scale)};
  }

  static int32_t units_of_zeros(const ql::TileSegment& s) {
    return s.zero_kind == ql::ZERO_NONE ? 1 : s.zero_units;
  }

 private:
  int32_t zero_kind_;
  __m512i mask_, shift_, zero_, minus_units_;
};

// Whether the products of codes and scale codes fit bytes: then they are multiplied with activations
// as the codes of a segment without groups would be.
constexpr int kFoldedBits = 4;  // at most: scale codes have 4 bits at least
inline bool is_folded(const ql::TileSegment& s) {
  return ((1 << s.bits) - 1) * ((1 << s.scale_bits) - 1) <= 255;
}

// Bytes of a row's lane times a number that leaves them bytes: no product carries into the next one.
inline __m512i fold(__m512i codes, __m512i scale_pairs) {
  return _mm512_mullo_epi16(codes, scale_pairs);
}

// A scale in both halves of each lane.
inline __m512i in_pairs(__m512i scale) {
  return _mm512_or_si512(scale, _mm512_slli_epi32(scale, 16));
}

// Adds to each lane two products of halves.
inline DotLanes dot2(DotLanes sums, __m512i a, __m512i b) {
  return reinterpret_cast<DotLanes>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), a, b));
}

inline DotLanes times(DotLanes a, __m512i b) {
  return reinterpret_cast<DotLanes>(_mm512_mullo_epi32(reinterpret_cast<__m512i>(a), b));
}

// What float(t) is multiplied by at the end of a run of whole sums.
inline __m512 whole_factor(const ql::TileSegment& s, const float* factors) {
  return _mm512_mul_ps(_mm512_loadu_ps(factors),
                       _mm512_set1_ps(1.0f / static_cast<float>(s.code_units)));
}

}  // namespace
}  // namespace vnni
