// Panels of segments with whole sums (has_whole_sums of tiles.h).
#pragma once

#include "tile_avx512_stretch.h"

namespace vnni {
namespace {

// The same for whole sums. `terms` and `zeros` are those of pairs of pieces.
template <int tokens, int blocks, bool folded>
__attribute__((noinline)) void whole_tile(const Stretch& s, int64_t token, const TileView& tile) {
  const SegmentInput in = s.in;
  const int8_t* values = in.values + token * in.value_stride;
  const int32_t* terms = in.terms + token * in.term_stride;
  const uint8_t *codes = s.codes, *ahead = tile.ahead;
  const float *scales = s.scales, *zeros = s.scales + kZerosAfter;
  __mmask16 begun = tile.begun;
  for (int64_t begin = 0; begin < s.columns; begin += ql::kWholeRun) {
    const int64_t end = smaller(begin + ql::kWholeRun, s.columns);
    DotLanes sums[tokens][blocks] = {};
    if constexpr (folded) {
      const int64_t block_bytes = block_code_bytes(end - begin, 8);
      ahead = panel_dots(codes, block_bytes, values + begin, in.value_stride,
                         smaller(end, s.used) - begin, ahead, s.ahead_step, sums);
      codes += blocks * block_bytes;
      const __m512i units = _mm512_set1_epi32(s.code_units);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) sums[t][b] = times(sums[t][b], units);
      }
    } else {
      for (int64_t k = begin; k < end; k += s.piece, scales += ql::kStripRows) {
        const int64_t columns = smaller(s.piece, end - k);
        const int64_t block_bytes = block_code_bytes(columns, 8);
        DotLanes dots[tokens][blocks] = {};
        ahead = panel_dots(codes, block_bytes, values + k, in.value_stride,
                           smaller(columns, s.used - k), ahead, s.ahead_step, dots);
        codes += blocks * block_bytes;
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) {
          const __m512i scale = _mm512_load_si512(scales + 16 * b);
#pragma GCC unroll 8
          for (int t = 0; t < tokens; ++t) sums[t][b] += times(dots[t][b], scale);
        }
      }
    }
    for (int64_t k = begin; k < end; k += 2 * s.piece, zeros += ql::kStripRows, ++terms) {
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b) {
        const __m512i zero = _mm512_load_si512(zeros + 16 * b);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          sums[t][b] = dot2(sums[t][b], zero, _mm512_set1_epi32(terms[t * in.term_stride]));
        }
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(s.factors + 16 * b),
                                          _mm512_set1_ps(1.0f / static_cast<float>(s.code_units)));
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        float* total = tile.totals[t] + 16 * b;
        const __m512 before = _mm512_maskz_load_ps(begun, total);
        _mm512_store_ps(total, _mm512_fmadd_ps(floats_of(sums[t][b]), factor, before));
      }
    }
    begun = 0xFFFF;
  }
}

// Codes times scale codes, each block's part of a run of whole sums after the other.
template <int blocks, class Codes>
__attribute__((noinline)) void fill_folded(const Codes& codes, const uint8_t* packed,
                                           const float* scales, int64_t columns, int64_t piece,
                                           uint8_t* out) {
  for (int64_t k = 0; k < columns; k += piece, scales += ql::kStripRows) {
    const int64_t run = k / ql::kWholeRun * ql::kWholeRun;
    const int64_t run_columns = smaller(ql::kWholeRun, columns - run);
    for (int b = 0; b < blocks; ++b) {
      const __m512i scale = in_pairs(_mm512_load_si512(scales + 16 * b));
      uint8_t* to = out + block_code_bytes(blocks * run + b * run_columns + k - run, 8);
      for (int64_t i = 0; i < smaller(piece, columns - k); i += kUnitColumns) {
        __m512i chunks[kUnitChunks];
        codes.template unpack<1>(packed, chunks);
        for (int c = 0; c < kUnitChunks; ++c) {
          _mm512_store_si512(to + 64 * c, fold(chunks[c], scale));
        }
        packed += unit_bytes(Codes::kBits);
        to += 64 * kUnitChunks;
      }
    }
  }
}

// WholeMeta of a stretch's pieces. Folded scales wait for their codes; others have code_units in
// them.
inline void fill_whole_meta(const ql::TileSegment& s, const uint8_t* meta, int64_t blocks,
                            int64_t pieces, float* scales) {
  const WholeReader reader(s);
  const int64_t bytes = block_meta_bytes(s);
  const __m512i units = _mm512_set1_epi32(is_folded(s) ? 1 : s.code_units);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t p = 0; p < pieces; ++p) {
      const WholeMeta own = reader.read(meta + (p * blocks + b) * bytes);
      _mm512_store_si512(scales + p * ql::kStripRows + 16 * b,
                         _mm512_mullo_epi32(own.scale, units));
      float* pair = scales + kZerosAfter + p / 2 * ql::kStripRows + 16 * b;
      const __m512i zeros = p % 2 ? _mm512_or_si512(_mm512_load_si512(pair),
                                                    _mm512_slli_epi32(own.zero, 16))
                                  : own.zero;
      _mm512_store_si512(pair, zeros);
    }
  }
}

}  // namespace
}  // namespace vnni
