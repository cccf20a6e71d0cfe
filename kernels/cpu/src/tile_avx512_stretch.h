// A panel of unpacked codes, the stretches of columns that it holds, and dot products with them.
#pragma once

#include "tile_avx512_decode.h"

namespace vnni {
namespace {

constexpr int64_t kPanelColumns = 2048;  // at most: 64 KB of codes, from the L2 cache
constexpr int64_t kPanelPieces = kPanelColumns / kUnitColumns;  // at most
constexpr int64_t kPanelTokens = 6;

// Columns of a stretch, a multiple of kWholeRun.
constexpr int64_t stretch_columns(int64_t tokens) {
  return tokens < 64 ? ql::kWholeRun : kPanelColumns;
}

// What a thread keeps for a strip. With whole sums, scales and zeros are WholeMeta: of each piece, and
// of each pair of pieces.
struct Panel {
  uint8_t codes[kPanelColumns * ql::kStripRows];
  float scales[kPanelPieces][ql::kStripRows];
  float zeros[kPanelPieces][ql::kStripRows];
};
constexpr int64_t kZerosAfter = kPanelPieces * ql::kStripRows;  // scales in Panel

// What a stretch's tiles are multiplied by: Terms, with scales of activation groups or without, or
// with whole sums folded.
enum class Kind { kSameZero, kZeros, kSameZeroGroups, kZerosGroups, kWhole, kFolded };

inline Kind kind_of(const ql::TileSegment& s, int64_t act_group) {
  const Terms terms = terms_of(s, act_group);
  if (terms == Terms::kWhole) return is_folded(s) ? Kind::kFolded : Kind::kWhole;
  if (terms == Terms::kSameZero) return act_group > 0 ? Kind::kSameZeroGroups : Kind::kSameZero;
  return act_group > 0 ? Kind::kZerosGroups : Kind::kZeros;
}

// A stretch of a segment's columns in a strip, ready to be multiplied.
struct Stretch {
  const uint8_t* codes;  // 8 bits each
  const float* scales;   // of its first piece, in a Panel; zeros lie kZerosAfter behind them
  const float* factors;  // of the strip's rows
  SegmentInput in;       // from the stretch's first column, run and piece on
  int64_t first;         // the stretch's first column in the segment
  int64_t columns, piece;
  int64_t used;          // columns before nothing but padding follows, whole chunks
  int32_t code_units;
  Kind kind;
  int64_t segment;
  bool begins, ends;     // whether it is the first, the last one of its segment
  const uint8_t* ahead;  // codes that come next in memory, to be asked for meanwhile:
  int64_t ahead_step;    // so many bytes for every unit of columns that a tile multiplies
};

// Where a tile's tokens keep their totals of a segment, and how far memory has been asked for.
struct TileView {
  float (*totals)[ql::kStripRows];
  __mmask16 begun;  // lanes of totals that hold something: none in a segment's first stretch
  const uint8_t* ahead;
};

// Adds dot products of chunk c with all blocks to those of all tokens.
template <int tokens, int blocks>
inline void chunk_dots(const uint8_t* codes, int64_t block_bytes, const int8_t* values,
                       int64_t stride, DotLanes (&dots)[tokens][blocks]) {
  __m512i rows[blocks];
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) rows[b] = _mm512_loadu_si512(codes + b * block_bytes);
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    const __m512i four = four_values(values + t * stride);
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) dots[t][b] = dot4(dots[t][b], rows[b], four);
  }
}

// Dot products of a run of `columns`, whole chunks, whose blocks are block_bytes apart; on entry,
// `dots` holds what they start from.
template <int tokens, int blocks>
inline const uint8_t* panel_dots(const uint8_t* codes, int64_t block_bytes, const int8_t* values,
                                 int64_t stride, int64_t columns, const uint8_t* ahead,
                                 int64_t ahead_step, DotLanes (&dots)[tokens][blocks]) {
  const int8_t *const end = values + columns, *const units_end = end - kUnitColumns;
  for (; values <= units_end; values += kUnitColumns, codes += 64 * kUnitChunks) {
    prefetch_to_l2(ahead);
    prefetch_to_l2(ahead + 64);
    ahead += ahead_step;
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
      chunk_dots(codes + 64 * c, block_bytes, values + ql::kChunkColumns * c, stride, dots);
    }
  }
  for (; values < end; values += ql::kChunkColumns, codes += 64) {
    chunk_dots(codes, block_bytes, values, stride, dots);
  }
  return ahead;
}

}  // namespace
}  // namespace vnni
