// int8 activations, many tokens: a stretch of a strip's columns is unpacked once, into a panel that
// stays in the cache, and multiplied with six tokens at a time; then comes the next stretch.
//
// With very many tokens the panel is longer than the L1 cache: it is read in order, for which L2 is
// fast enough, and totals are loaded and stored less often. With fewer tokens, what comes next is
// better asked for in smaller portions.
//
// A panel is laid out as 8-bit codes are, so these need no unpacking. Six tokens x two blocks make
// twelve chains of VPDPBUSD and twelve totals: 24 of the 32 registers. Where all rows have the same
// zero, which is an integer, the integer sums start from -zero * (sum of a) instead of 0: the same
// number as the fma of tiles.h gives, exactly, and one instruction less on the busiest ports.
#pragma once

#include "tile_avx512_decode.h"

namespace vnni {
namespace {

constexpr int64_t kPanelColumns = 2048;  // at most: 64 KB of codes, from the L2 cache
constexpr int64_t kPanelPieces = kPanelColumns / kUnitColumns;  // at most
constexpr int64_t kPanelTokens = 6;

// Columns of a stretch, a multiple of kMaxPiece.
constexpr int64_t stretch_columns(int64_t tokens) { return tokens < 64 ? 512 : kPanelColumns; }

// What a thread keeps for a strip.
struct Panel {
  uint8_t codes[kPanelColumns * ql::kStripRows];
  float scales[kPanelPieces][ql::kStripRows];
  float zeros[kPanelPieces][ql::kStripRows];
};
constexpr int64_t kZerosAfter = kPanelPieces * ql::kStripRows;  // scales in Panel

// A stretch of a segment's columns in a strip, ready to be multiplied.
struct Stretch {
  const uint8_t* codes;  // 8 bits each
  const Panel* panel;    // scales and zeros
  SegmentInput in;       // from the stretch's first column and piece on
  int64_t first;         // the stretch's first column in the segment
  int64_t columns, piece;
  float zero;            // of all rows, when they have the same one
};

// How zeros and activation groups enter the sums.
enum class Terms {
  kSameZero,  // one zero for all rows, an integer
  kZeros,     // a zero for each row
  kGroups,    // the same, and each activation group has its own scale
};

// What the tile's tokens have, and what to ask memory for meanwhile.
struct TileView {
  float (*totals)[ql::kStripRows];
  const uint8_t* ahead;  // codes that come next
  int64_t ahead_step;    // bytes of them to ask for, for every unit of columns
};

// Dot products of a piece; on entry, `dots` holds what they start from.
template <int tokens, int blocks>
inline const uint8_t* panel_dots(const uint8_t* codes, const int8_t* values, int64_t stride,
                                 int64_t columns, const uint8_t* ahead, int64_t ahead_step,
                                 DotLanes (&dots)[tokens][blocks]) {
  const int64_t block_bytes = block_code_bytes(columns, 8);
  const int8_t* const end = values + columns;
  do {
    prefetch_to_l2(ahead);
    prefetch_to_l2(ahead + 64);
    ahead += ahead_step;
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
      __m512i rows[blocks];
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b) {
        rows[b] = _mm512_loadu_si512(codes + 64 * c + b * block_bytes);
      }
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const __m512i four = four_values(values + t * stride + ql::kChunkColumns * c);
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) dots[t][b] = dot4(dots[t][b], rows[b], four);
      }
    }
    codes += 64 * kUnitChunks;
    values += kUnitColumns;
  } while (values < end);
  return ahead;
}

// -zero * sum, for every token and piece of a stretch.
template <int tokens>
inline void integer_shifts(const Stretch& s, const float* sums, int64_t stride,
                           int32_t (&shifts)[tokens][kPanelPieces]) {
  const __m512 factor = _mm512_set1_ps(-s.zero);
  const int64_t pieces = (s.columns + s.piece - 1) / s.piece;
  for (int64_t p = 0; p < pieces; p += 16) {
    const __mmask16 mask = lanes_below(pieces - p);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const __m512 some = _mm512_maskz_loadu_ps(mask, sums + t * stride + p);
      _mm512_store_si512(shifts[t] + p, _mm512_cvtps_epi32(_mm512_mul_ps(some, factor)));
    }
  }
}

// Adds a stretch's share to the totals of a tile, whose first token is `token`.
template <int tokens, int blocks, Terms terms>
__attribute__((noinline)) void panel_tile(const Stretch& s, int64_t token, const TileView& tile) {
  const SegmentInput in = s.in;
  const int8_t* values = in.values + token * in.value_stride;
  const float* sums = in.sums + token * in.sum_stride;
  alignas(64) int32_t shifts[tokens][kPanelPieces];
  if constexpr (terms == Terms::kSameZero) integer_shifts(s, sums, in.sum_stride, shifts);
  float* const sink = tile.totals[0];
  __m512 totals[tokens][blocks];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) totals[t][b] = _mm512_load_ps(sink + 32 * t + 16 * b);
  }
  const uint8_t *codes = s.codes, *ahead = tile.ahead;
  const float* scales = s.panel->scales[0];
  const int32_t* shift = shifts[0];
  for (int64_t k = 0; k < s.columns; k += s.piece) {
    const int64_t columns = smaller(s.piece, s.columns - k);
    DotLanes dots[tokens][blocks] = {};
    if constexpr (terms == Terms::kSameZero) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) {
          dots[t][b] = reinterpret_cast<DotLanes>(_mm512_set1_epi32(shift[kPanelPieces * t]));
        }
      }
      ++shift;
    }
    ahead = panel_dots(codes, values + k, in.value_stride, columns, ahead, tile.ahead_step, dots);
    codes += blocks * block_code_bytes(columns, 8);
    const float* group = terms == Terms::kGroups ? in.scale_at(s.first + k) : nullptr;
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      const __m512 scale = _mm512_load_ps(scales + 16 * b);
      const __m512 zero = _mm512_load_ps(scales + kZerosAfter + 16 * b);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        __m512 term = floats_of(dots[t][b]);
        if constexpr (terms != Terms::kSameZero) {
          term = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[t * in.sum_stride]), term);
        }
        if constexpr (terms == Terms::kGroups) {
          term = _mm512_mul_ps(term, _mm512_set1_ps(group[(token + t) * in.scale_stride]));
        }
        totals[t][b] = _mm512_fmadd_ps(term, scale, totals[t][b]);
      }
    }
    scales += ql::kStripRows;
    ++sums;
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) _mm512_store_ps(sink + 32 * t + 16 * b, totals[t][b]);
  }
}

// Multiplies a stretch with all tokens, in tiles of nearly the same size.
template <int blocks, Terms terms>
void panel_tiles(const Stretch& s, int64_t tokens, const uint8_t* next, int64_t next_bytes,
                 float (*totals)[ql::kStripRows]) {
  const int64_t tiles = (tokens + kPanelTokens - 1) / kPanelTokens;
  const int64_t units = s.columns / kUnitColumns;
  const int64_t step = (next_bytes + tiles * units - 1) / (tiles * units);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t token = i * tokens / tiles, last = (i + 1) * tokens / tiles;
    const TileView tile{totals + token, next + i * units * step, step};
    with_constant<1, kPanelTokens>(last - token, [&](auto count) {
      panel_tile<count.value, blocks, terms>(s, token, tile);
    });
  }
}

// Unpacks `columns` x `blocks` blocks to bytes: in the order they are in, so a piece is nothing
// special.
template <class Codes>
__attribute__((noinline)) void fill_codes(const Codes& codes, const uint8_t* packed, int64_t units,
                                          uint8_t* out) {
  for (int64_t i = 0; i < units; ++i) {
    __m512i chunks[kUnitChunks];
    codes.template unpack<1>(packed, chunks);
    for (int c = 0; c < kUnitChunks; ++c) _mm512_store_si512(out + 64 * c, chunks[c]);
    packed += unit_bytes(Codes::kBits);
    out += 64 * kUnitChunks;
  }
}

inline void fill_meta(const ql::TileSegment& s, const uint8_t* meta, int64_t row, int64_t blocks,
                      int64_t pieces, Panel& panel) {
  const AnyMeta reader(s);
  const int64_t bytes = block_meta_bytes(s);
  for (int64_t b = 0; b < blocks; ++b) {
    const float* factors = s.factors + row + 16 * b;
    for (int64_t p = 0; p < pieces; ++p) {
      const BlockMeta own = reader.read(meta + (p * blocks + b) * bytes, factors);
      _mm512_store_ps(panel.scales[p] + 16 * b, own.scale);
      _mm512_store_ps(panel.zeros[p] + 16 * b, own.zero);
    }
  }
}

template <int blocks>
void panel_segment(const ql::TileSegment& s, const SegmentInput& in, int64_t tokens, int64_t strip,
                   Panel& panel, float (*totals)[ql::kStripRows]) {
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t span = stretch_columns(tokens), step = span / s.piece;
  for (int64_t k = 0, piece = 0; k < s.padded; k += span, piece += step) {
    const int64_t columns = smaller(span, s.padded - k);
    const int64_t pieces = smaller(step, s.pieces - piece);
    const int64_t bytes = blocks * block_code_bytes(columns, s.bits);
    Stretch stretch{panel.codes, &panel, in, k, columns, s.piece, s.zero_constant};
    stretch.in.values += k;
    stretch.in.sums += piece;
    if (s.bits == 8) {
      stretch.codes = packed;
    } else {
      with_codes(s, [&](const auto& codes) {
        fill_codes(codes, packed, blocks * columns / kUnitColumns, panel.codes);
      });
    }
    fill_meta(s, meta, strip * ql::kStripRows, blocks, pieces, panel);
    packed += bytes;
    const int64_t meta_bytes = blocks * pieces * block_meta_bytes(s);
    meta += meta_bytes;
    for (int64_t line = 0; line < meta_bytes; line += 64) prefetch_to_l2(meta + line);
    if (in.scales) {
      panel_tiles<blocks, Terms::kGroups>(stretch, tokens, packed, bytes, totals);
    } else if (s.zero_kind != ql::ZERO_NONE) {
      panel_tiles<blocks, Terms::kZeros>(stretch, tokens, packed, bytes, totals);
    } else {
      panel_tiles<blocks, Terms::kSameZero>(stretch, tokens, packed, bytes, totals);
    }
  }
}

inline int64_t panel_scratch_bytes(int64_t tokens) {
  return static_cast<int64_t>(sizeof(Panel)) +
         tokens * ql::kStripRows * static_cast<int64_t>(sizeof(float));
}

// All of a strip's outputs, for all tokens of `in`.
void panel_strip(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 int64_t strip, uint8_t* scratch) {
  Panel& panel = *reinterpret_cast<Panel*>(scratch);
  float(*totals)[ql::kStripRows] =
      reinterpret_cast<float(*)[ql::kStripRows]>(scratch + sizeof(Panel));
  for (int64_t t = 0; t < in.tokens; ++t) {
    for (int h = 0; h < 2; ++h) _mm512_store_ps(totals[t] + 16 * h, _mm512_setzero_ps());
  }
  const int64_t blocks = tile_blocks(w, strip);
  InputCursor cursor(in, 0);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const SegmentInput input = cursor.next(s);
    with_constant<1, 2>(blocks, [&](auto count) {
      panel_segment<count.value>(s, input, in.tokens, strip, panel, totals);
    });
  }
  for (int64_t t = 0; t < in.tokens; ++t) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = strip * ql::kStripRows + b * ql::kBlockRows;
      store_rows(w, in, out, row, t, _mm512_load_ps(totals[t] + 16 * b));
    }
  }
}

}  // namespace
}  // namespace vnni
