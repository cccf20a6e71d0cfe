// int8 activations, few tokens: codes are multiplied as they are decoded, and never stored.
//
// VPDPBUSD multiplies unsigned codes with signed activations and adds fours of products into int32
// lanes, exactly. Zero points are subtracted as integers too, lane by lane, since the sum of
// (q - z) a is the sum of q a minus z times the sum of a: these two are nearly equal when
// activations have a mean, and in floats little would be left of their difference. Of a zero point
// between two codes, the nearest is subtracted so, and the rest (half a code at most) in floats.
#pragma once

#include "avx512_codes.h"

namespace {

// From here on rows are decoded once, into a panel (avx512_panel.h), instead of once per call.
constexpr int64_t kManyTokens = 5;

// Integer sums are kept per lane over a block: a piece, or 64 codes when groups are shorter.
inline int64_t lane_blocks(const QlSegment& s) {
  return piece_span(s) < kChunk ? padded(s) / kChunk : pieces(s);
}

// A prepared token: its scale; int8 values; then the sums the zero points multiply. For few tokens
// these are per block and lane; for many, per piece.
struct Int8Token {
  float* scale;
  int8_t* values;
  int32_t* sums;

  Int8Token(const QlWeight& w, int64_t tokens, Arena& arena) {
    int64_t count = 0;
    for (int64_t i = 0; i < w.segment_count; ++i) {
      count += tokens < kManyTokens ? 16 * lane_blocks(w.segments[i]) : pieces(w.segments[i]);
    }
    scale = arena.take<float>(1);
    values = arena.take<int8_t>(padded_columns(w));
    sums = arena.take<int32_t>(count);
  }
};

inline Int8Token token_at(const Problem& p, int64_t token) {
  Arena arena{p.token_data + token * p.token_bytes};
  return Int8Token(*p.weight, p.tokens, arena);
}

int64_t int8_token_bytes(const QlWeight& w, int64_t tokens) {
  Arena arena{nullptr};
  Int8Token(w, tokens, arena);
  return arena.used;
}

// Sums of 64 activations at a time, four to a lane.
inline __m512i lane_sums(const int8_t* values, int64_t count) {
  Lanes sums = {};
  for (int64_t k = 0; k < count; k += kChunk) {
    sums = dot4(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(values + k));
  }
  return reinterpret_cast<__m512i>(sums);
}

void int8_prepare(const Problem& p, int64_t index) {
  const QlWeight& w = *p.weight;
  const Int8Token token = token_at(p, index);
  *token.scale = round_padded_token(w, p.x + index * w.columns, token.values);
  if (p.tokens >= kManyTokens) return sum_pieces(w, token.values, token.sums);
  const int8_t* values = token.values;
  int32_t* sums = token.sums;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    const int64_t span = piece_span(s) < kChunk ? kChunk : piece_span(s);
    for (int64_t k = 0; k < padded(s); k += span, sums += 16) {
      _mm512_storeu_si512(sums, lane_sums(values + k, smaller(span, padded(s) - k)));
    }
    values += padded(s);
  }
}

template <int tokens>
struct LaneTotals {  // what one row has summed for each token
  const int8_t* values[tokens];
  const int32_t* sums[tokens];
  __m512 totals[tokens];

  inline void multiply(__m512i codes, int64_t k, Lanes (&dots)[tokens]) const {
    for (int t = 0; t < tokens; ++t) {
      dots[t] = dot4(dots[t], codes, _mm512_loadu_si512(values[t] + k));
    }
  }

  inline void add(const Lanes (&dots)[tokens], __m512 scale, __m512i whole, __m512 rest,
                  bool with_rest) {
    for (int t = 0; t < tokens; ++t) {
      const __m512i sum = _mm512_loadu_si512(sums[t]);
      const __m512i shift = _mm512_mullo_epi32(whole, sum);
      const __m512i dot = _mm512_sub_epi32(reinterpret_cast<__m512i>(dots[t]), shift);
      totals[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, totals[t]);
      if (with_rest) totals[t] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum), rest, totals[t]);
      sums[t] += 16;
    }
  }
};

// Groups of more than 64: one scale for all lanes, and one flush per piece.
template <int bits, int tokens>
inline void dot_wide_groups(const QlSegment& s, const Codes<bits>& codes, const RowGroups& groups,
                            LaneTotals<tokens>& lanes) {
  const int64_t columns = padded(s), span = piece_span(s);
  const bool with_rest = has_rest(s);
  for (int64_t k = 0, piece = 0; k < columns; ++piece) {
    const int64_t end = smaller(k + span, columns), group = group_of_piece(s, piece);
    Lanes dots[tokens] = {};
    do {
      const __m512i chunk = codes.at(k);
      lanes.multiply(chunk, k, dots);
      k += kChunk;
    } while (k < end);
    lanes.add(dots, _mm512_set1_ps(groups.scales[group]), _mm512_set1_epi32(groups.whole[group]),
              _mm512_set1_ps(groups.rest[group]), with_rest);
  }
}

// Groups of 16, 32 and 64: a chunk holds four, two or one, each with its own lanes.
template <int bits, int tokens>
inline void dot_narrow_groups(const QlSegment& s, const Codes<bits>& codes, const RowGroups& groups,
                              LaneTotals<tokens>& lanes) {
  const int64_t span = piece_span(s);
  const bool with_rest = has_rest(s);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const unsigned lane_bits = span == 16 ? 2 : span == 32 ? 3 : 4;
  const __m512i select = _mm512_srli_epi32(lane, lane_bits);  // lane * 4 / span
  const int64_t columns = padded(s), step = kChunk / span;
  for (int64_t k = 0, group = 0; k < columns; k += kChunk, group += step) {
    const __m512i chunk = codes.at(k);
    Lanes dots[tokens] = {};
    lanes.multiply(chunk, k, dots);
    lanes.add(dots, _mm512_permutexvar_ps(select, _mm512_loadu_ps(groups.scales + group)),
              _mm512_permutexvar_epi32(select, _mm512_loadu_si512(groups.whole + group)),
              _mm512_permutexvar_ps(select, _mm512_loadu_ps(groups.rest + group)), with_rest);
  }
}

template <int tokens>
void int8_row(const Problem& p, int64_t row, const RowGroups& groups) {
  const QlWeight& w = *p.weight;
  LaneTotals<tokens> lanes = {};
  for (int t = 0; t < tokens; ++t) {
    const Int8Token token = token_at(p, t);
    lanes.values[t] = token.values;
    lanes.sums[t] = token.sums;
  }
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    groups.decode_and_split(s, row);
    with_constant<2, 8>(s.bits, [&](auto bits) {
      const Codes<bits.value> codes(s.packed + row * s.row_bytes, s.row_bytes);
      if (piece_span(s) <= kChunk) {
        dot_narrow_groups(s, codes, groups, lanes);
      } else {
        dot_wide_groups(s, codes, groups, lanes);
      }
    });
    for (int t = 0; t < tokens; ++t) lanes.values[t] += padded(s);
  }
  for (int t = 0; t < tokens; ++t) {
    const float total = _mm512_reduce_add_ps(lanes.totals[t]) * *token_at(p, t).scale;
    p.y[t * w.rows + row] = total + (p.bias ? p.bias[row] : 0.0f);
  }
}

}  // namespace
