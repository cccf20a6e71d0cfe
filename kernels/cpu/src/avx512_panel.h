// int8 activations, many tokens: 32 rows are decoded once, transposed into a panel in which a
// vector holds four consecutive codes of 16 rows, and multiplied with six tokens at a time. Lanes
// are output rows here, so there is nothing to add up across lanes at the end.
#pragma once

#include "avx512_int8.h"

namespace {

constexpr int64_t kPanelRows = 32;
constexpr int64_t kPanelTokens = 6;  // 6 x 2 sums as int32 and as float: 24 of the 32 registers

struct Panel {
  RowGroups groups;
  uint8_t* codes;   // [padded columns / 4][kPanelRows][4]
  float* scales;    // [pieces of all segments][kPanelRows]
  int32_t* wholes;  // likewise
  float* rests;     // likewise

  Panel(const QlWeight& w, Arena& arena) : groups(w, arena) {
    codes = arena.take<uint8_t>(kPanelRows * padded_columns(w));
    scales = arena.take<float>(kPanelRows * total_pieces(w));
    wholes = arena.take<int32_t>(kPanelRows * total_pieces(w));
    rests = arena.take<float>(kPanelRows * total_pieces(w));
  }
};

// Transposes a 16 x 16 matrix of int32, one row per vector: interleave rows by ones, by twos, then
// move quarters.
inline void transpose(__m512i (&v)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  }
  // b[4 i + j] holds, in quarter q, column 4 q + j of rows 4 i .. 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
    v[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    v[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
}

// Rows past the last one are read as empty: codes 0.
template <int bits>
void fill_panel_codes(const QlSegment& s, int64_t row, int64_t count, uint8_t* out) {
  for (int64_t half = 0; half < kPanelRows; half += 16) {
    for (int64_t k = 0; k < padded(s); k += kChunk) {
      __m512i v[16];
      for (int64_t r = 0; r < 16; ++r) {
        const bool exists = half + r < count;
        const uint8_t* packed = s.packed + (exists ? row + half + r : row) * s.row_bytes;
        v[r] = Codes<bits>(packed, exists ? s.row_bytes : 0).at(k);
      }
      transpose(v);
      for (int64_t j = 0; j < 16; ++j) {
        _mm512_store_si512(out + (k / 4 + j) * kPanelRows * 4 + half * 4, v[j]);
      }
    }
  }
}

void fill_panel(const QlWeight& w, int64_t row, int64_t count, const Panel& panel) {
  uint8_t* codes = panel.codes;
  int64_t base = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    with_constant<2, 8>(s.bits,
                        [&](auto bits) { fill_panel_codes<bits.value>(s, row, count, codes); });
    for (int64_t r = 0; r < kPanelRows; ++r) {
      panel.groups.decode_and_split(s, row + smaller(r, count - 1));
      for (int64_t piece = 0; piece < pieces(s); ++piece) {
        const int64_t group = group_of_piece(s, piece), at = (base + piece) * kPanelRows + r;
        panel.scales[at] = panel.groups.scales[group];
        panel.wholes[at] = panel.groups.whole[group];
        panel.rests[at] = panel.groups.rest[group];
      }
    }
    codes += padded(s) * kPanelRows;
    base += pieces(s);
  }
}

// Dot products of `tokens` tokens, `stride` bytes apart, with the panel's 32 rows over `count`
// columns.
template <int tokens>
inline void dot_piece(const uint8_t* codes, const int8_t* values, int64_t stride, int64_t count,
                      Lanes (&dots)[tokens][2]) {
  const int8_t* const end = values + count;
  do {
    const __m512i low = _mm512_load_si512(codes);
    const __m512i high = _mm512_load_si512(codes + 64);
    for (int t = 0; t < tokens; ++t) {
      const __m512i a = _mm512_set1_epi32(load<int32_t>(values + t * stride));
      dots[t][0] = dot4(dots[t][0], low, a);
      dots[t][1] = dot4(dots[t][1], high, a);
    }
    codes += 4 * kPanelRows;
    values += 4;
  } while (values < end);
}

template <int tokens>
void panel_tile(const Problem& p, int64_t row, int64_t count, int64_t first, const Panel& panel) {
  const QlWeight& w = *p.weight;
  const Int8Token token = token_at(p, first);  // the others follow at intervals of token_bytes
  const auto sum_of = [&](int t, int64_t piece) {
    return load<int32_t>(reinterpret_cast<const uint8_t*>(token.sums + piece) + t * p.token_bytes);
  };
  __m512 totals[tokens][2] = {};
  int64_t base = 0, index = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    const bool with_rest = has_rest(s);
    const int64_t columns = base + padded(s), span = piece_span(s);
    for (; base < columns; base += span, ++index) {
      Lanes dots[tokens][2] = {};
      dot_piece(panel.codes + base * kPanelRows, token.values + base, p.token_bytes,
                smaller(span, columns - base), dots);
      for (int h = 0; h < 2; ++h) {
        const int64_t at = index * kPanelRows + 16 * h;
        const __m512 scale = _mm512_load_ps(panel.scales + at);
        const __m512i whole = _mm512_load_si512(panel.wholes + at);
        for (int t = 0; t < tokens; ++t) {
          const __m512i sum = _mm512_set1_epi32(sum_of(t, index));
          const __m512i shift = _mm512_mullo_epi32(whole, sum);
          const __m512i dot = _mm512_sub_epi32(reinterpret_cast<__m512i>(dots[t][h]), shift);
          totals[t][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, totals[t][h]);
          if (with_rest) {
            const __m512 rest = _mm512_load_ps(panel.rests + at);
            totals[t][h] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum), rest, totals[t][h]);
          }
        }
      }
    }
    base = columns;
  }
  for (int h = 0; h < 2; ++h) {
    const __mmask16 mask = lanes_below(count - 16 * h);
    const __m512 bias =
        p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + row + 16 * h) : _mm512_setzero_ps();
    for (int t = 0; t < tokens; ++t) {
      const __m512 scale = _mm512_set1_ps(*token_at(p, first + t).scale);
      float* out = p.y + (first + t) * w.rows + row + 16 * h;
      _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(totals[t][h], scale, bias));
    }
  }
}

}  // namespace
