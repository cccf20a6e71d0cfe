// What the AVX-512 int8 kernels on tiles share: activations, and the way from sums to outputs. The
// arithmetic is in tiles.h.
#pragma once

#include "tile_avx512_meta.h"

namespace vnni {
namespace {

// How a segment's products with sums of activations enter.
enum class Terms {
  kSameZero,  // one zero for all rows, an integer: dot products start from -zero * sum
  kZeros,     // a zero for each row
  kWhole,     // has_whole_sums
};

inline Terms terms_of(const ql::TileSegment& s, int64_t act_group) {
  if (has_whole_sums(s, act_group)) return Terms::kWhole;
  return s.zero_kind == ql::ZERO_NONE ? Terms::kSameZero : Terms::kZeros;
}

inline int64_t run_count(const ql::TileSegment& s, int64_t act_group) {
  const int64_t run = run_columns(s, act_group);
  return (s.padded + run - 1) / run;
}

// What is made of a token's sums for all strips, as integers. kSameZero: -zero * sum for each run,
// the same number as the fma of tiles.h gives, exactly. kWhole: the sums of two pieces in the halves
// of a lane, for VPDPWSSD.
class TokenTerms {
 public:
  static int64_t stride(const ql::TiledWeight& w, int64_t act_group) {
    int64_t count = 0;
    for (int64_t i = 0; i < w.segment_count; ++i) count += run_count(w.segments[i], act_group);
    return (count + 15) / 16 * 16;
  }

  static void fill(const ql::TiledWeight& w, const ql::TileInput& in, int32_t* terms) {
    const int64_t step = stride(w, in.act_group);
    for (int64_t t = 0; t < in.tokens; ++t) {
      const float* sums = in.sums + t * in.sum_stride;
      int32_t* to = terms + t * step;
      for (int64_t i = 0; i < w.segment_count; ++i) {
        const ql::TileSegment& s = w.segments[i];
        const int64_t run = run_columns(s, in.act_group), runs = run_count(s, in.act_group);
        fill_segment(s, terms_of(s, in.act_group), sums + sum_offset(s.padded, run), runs, to);
        sums += sum_count(s.padded);
        to += runs;
      }
    }
  }

 private:
  static void fill_segment(const ql::TileSegment& s, Terms terms, const float* sums, int64_t runs,
                           int32_t* to) {
    if (terms == Terms::kZeros) return;
    const __m512 factor = _mm512_set1_ps(-s.zero_constant);
    for (int64_t i = 0; i < runs; i += 16) {
      const __mmask16 mask = lanes_below(runs - i);
      const __m512 some = _mm512_maskz_loadu_ps(mask, sums + i);
      if (terms == Terms::kSameZero) {
        _mm512_mask_storeu_epi32(to + i, mask, _mm512_cvtps_epi32(_mm512_mul_ps(some, factor)));
        continue;
      }
      const __m512i low = _mm512_and_si512(_mm512_cvtps_epi32(some), _mm512_set1_epi32(0xFFFF));
      const __m512i pairs = _mm512_or_si512(low, _mm512_srli_epi64(low, 16));
      _mm512_mask_cvtepi64_storeu_epi32(
          to + i / 2, static_cast<__mmask8>(lanes_below((runs - i + 1) / 2)), pairs);
    }
  }
};

// The activations that meet one segment, from its first column on.
struct SegmentInput {
  const int8_t* values;
  const float* sums;    // over the segment's runs (tiles.h)
  const float* scales;  // of activation groups; null when there are none
  const int32_t* terms;  // of the segment's runs, or pairs of them (TokenTerms)
  int64_t value_stride;
  int64_t sum_stride;
  int64_t scale_stride;
  int64_t term_stride;
  int64_t act_group;
  int64_t run;  // columns of a run

  // Of the activation group of column k of the segment, the first token's. For segments with groups.
  const float* scale_at(int64_t k) const {
    return scales + static_cast<uint32_t>(k) / static_cast<uint32_t>(act_group);
  }
};

// Walks over the segments: where the activations of each are, from some token on.
class InputCursor {
 public:
  InputCursor(const ql::TiledWeight& w, const ql::TileInput& in, const int32_t* terms,
              int64_t token)
      : in_(in), term_stride_(TokenTerms::stride(w, in.act_group)), token_(token) {
    terms_ = terms + token * term_stride_;
  }

  // The activations of `s`, which must be the next segment.
  SegmentInput next(const ql::TileSegment& s) {
    const int8_t* values = in_.values + token_ * in_.value_stride + columns_;
    const bool grouped = in_.act_group > 0;
    const int64_t run = run_columns(s, in_.act_group);
    const float* sums = in_.sums + token_ * in_.sum_stride + sums_ + sum_offset(s.padded, run);
    const float* scales = in_.scales + token_ * in_.scale_stride + groups_;
    const SegmentInput input{values,           sums,           grouped ? scales : nullptr,
                             terms_,           in_.value_stride, in_.sum_stride,
                             in_.scale_stride, term_stride_,   in_.act_group,
                             run};
    columns_ += s.padded;
    sums_ += sum_count(s.padded);
    terms_ += run_count(s, in_.act_group);
    if (grouped) groups_ += act_group_count(s.padded, in_.act_group);
    return input;
  }

 private:
  const ql::TileInput& in_;
  int64_t term_stride_;
  int64_t token_;
  const int32_t* terms_;
  int64_t columns_ = 0, sums_ = 0, groups_ = 0;
};

// The biases of 16 rows from `row` on.
inline __m512 bias_of(const ql::TiledWeight& w, const ql::TileOutput& out, int64_t row) {
  if (!out.bias) return _mm512_setzero_ps();
  return _mm512_maskz_loadu_ps(lanes_below(w.rows - row), out.bias + row);
}

// Results -> outputs: 16 rows from `row` on, of one token.
inline void write_rows(const ql::TiledWeight& w, const ql::TileOutput& out, int64_t row,
                       int64_t token, __m512 result) {
  const __mmask16 mask = lanes_below(w.rows - row);
  float* y = out.y + token * out.y_stride + row;
  if (out.accumulate) result = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), result);
  _mm512_mask_storeu_ps(y, mask, result);
}

// Whether outputs are so many that they have left the caches before anybody reads them. They are then
// written past the caches, which saves reading their lines first.
inline bool is_streamed(const ql::TiledWeight& w, const ql::TileInput& in,
                        const ql::TileOutput& out) {
  constexpr int64_t kCached = 16 << 20;  // bytes
  const int64_t step = out.y_stride * static_cast<int64_t>(sizeof(float));
  const bool aligned = (reinterpret_cast<uintptr_t>(out.y) | static_cast<uintptr_t>(step)) % 64 == 0;
  return aligned && !out.accumulate && w.rows % ql::kBlockRows == 0 && in.tokens * step > kCached;
}

// The result of a segment's total and those before it.
inline __m512 with_total(const ql::TileInput& in, int64_t token, int64_t segment, __m512 total,
                         __m512 result) {
  return _mm512_fmadd_ps(total, _mm512_set1_ps(segment_scale(in, token, segment)), result);
}

}  // namespace
}  // namespace vnni
