// Linear with activations as they are (the exact mode of tiles.h): weights become float32, products
// are summed by fused multiply-adds in the order of K. For units with vectors (lanes.h).
//
// Few tokens: the codes of a block of each of several strips are turned into values in registers
// and used at once; independent rows hide the latency of the sums, since the order within a row is
// fixed. More tokens: the values of up to 128 columns are written to a panel that stays in the
// first-level cache, and every six tokens go through it with their sums in registers.
#pragma once

#include "tile_meta.h"
#include "tile_rounding.h"
#include "tile_rows.h"
#include "tile_values.h"

namespace {

constexpr int kDecodeStrips = kOneRegister ? 4 : 2;  // at once, for one token
constexpr int kPanelBlocks = kOneRegister ? 2 : 1;   // side by side in a panel
constexpr int kPanelTokens = 6;
constexpr int64_t kPanelPieces = ql::kMaxPiece / 16;
constexpr int64_t kTotalTokens = 43 * kPanelTokens;  // whose totals are kept beside a panel: 33 KB

constexpr int64_t kUnitColumns = 16;  // what ChunkValues reads from at once: whole lines of codes

// Calls f(ChunkValues<...>()) for the format of a segment.
template <int bits, class Function>
inline void with_integers(const ql::TileSegment& s, const Function& f) {
  if (s.zero_kind == ql::ZERO_NONE) return f(ChunkValues<bits, false, true>(s));
  f(ChunkValues<bits, false, false>(s));
}

template <class Function>
inline void with_values(const ql::TileSegment& s, const Function& f) {
  if (s.float_values) {
    switch (s.bits) {
      case 4:
        return f(ChunkValues<4, true, true>(s));
      case 5:
        return f(ChunkValues<5, true, true>(s));
      case 6:
        return f(ChunkValues<6, true, true>(s));
      case 7:
        return f(ChunkValues<7, true, true>(s));
      default:
        return f(ChunkValues<8, true, true>(s));
    }
  }
  switch (s.bits) {
    case 2:
      return with_integers<2>(s, f);
    case 3:
      return with_integers<3>(s, f);
    case 4:
      return with_integers<4>(s, f);
    case 5:
      return with_integers<5>(s, f);
    case 6:
      return with_integers<6>(s, f);
    case 7:
      return with_integers<7>(s, f);
    default:
      return with_integers<8>(s, f);
  }
}

inline float token_scale(const ql::TileInput& in, int64_t token) {
  return in.scales ? in.scales[token * in.scale_stride] : 1.0f;
}

inline int64_t tile_block_count(const ql::TiledWeight& w) {
  return (w.rows + ql::kBlockRows - 1) / ql::kBlockRows;
}

// How far ahead of their use codes are fetched.
constexpr int64_t kPrefetchBytes = 2048;

// The lines of 16 columns.
inline void prefetch_unit(const uint8_t* codes, int32_t bits) {
  for (int line = 0; line < 32 * bits; line += 64) __builtin_prefetch(codes + line);
}

// `tokens` tokens of a segment.
struct FewTokens {
  const float* x;
  int64_t stride;
};

// Adds one piece of one block of each strip to the totals: codes[i] are those of strip i.
template <int tokens, int strips, class Values>
inline void decode_piece(const Values& values, const uint8_t* const (&codes)[strips], int32_t bits,
                         const BlockMeta (&meta)[strips], FewTokens in, int64_t columns,
                         Lanes (&totals)[strips][tokens]) {
  Lanes sums[strips][tokens];
  for (int i = 0; i < strips; ++i) {
    for (int t = 0; t < tokens; ++t) sums[i][t] = zero_lanes();
  }
  for (int64_t k = 0; k < columns; k += kUnitColumns) {
    for (int i = 0; i < strips; ++i) prefetch_unit(codes[i] + 2 * k * bits + kPrefetchBytes, bits);
#pragma GCC unroll 4
    for (int chunk = 0; chunk < 4; ++chunk) {
#pragma GCC unroll 4
      for (int i = 0; i < strips; ++i) {
        Lanes column[4];
        values(codes[i] + 2 * k * bits, chunk, meta[i].zero, column);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
          for (int t = 0; t < tokens; ++t) {
            const Lanes a = broadcast(in.x[t * in.stride + k + 4 * chunk + j]);
            sums[i][t] = fma(a, column[j], sums[i][t]);
          }
        }
      }
    }
  }
  for (int i = 0; i < strips; ++i) {
    for (int t = 0; t < tokens; ++t) totals[i][t] = fma(sums[i][t], meta[i].scale, totals[i][t]);
  }
}

// Adds one segment of `strips` strips of `blocks` blocks from `first` on to the totals. Every strip
// is read from its beginning to its end.
template <int tokens, int strips, class Values>
inline void decode_segment(const ql::TileSegment& s, const Values& values, int64_t first,
                           int64_t blocks, FewTokens in, Lanes (&totals)[2][strips][tokens]) {
  const uint8_t *codes[strips], *metas[strips];
  for (int i = 0; i < strips; ++i) {
    codes[i] = s.codes + (first + i) * s.codes_stride;
    metas[i] = s.meta + (first + i) * s.meta_stride;
  }
  for (int64_t piece = 0; piece < s.pieces; ++piece) {
    const int64_t columns = piece_columns(s, piece);
    for (int64_t b = 0; b < blocks; ++b) {
      BlockMeta meta[strips];
      for (int i = 0; i < strips; ++i) {
        const int64_t row = (first + i) * ql::kStripRows + b * ql::kBlockRows;
        meta[i] = block_meta(s, metas[i], s.factors + row);
        metas[i] += block_meta_bytes(s);
      }
      decode_piece(values, codes, s.bits, meta, in, columns, totals[b]);
      for (int i = 0; i < strips; ++i) codes[i] += block_code_bytes(columns, s.bits);
    }
    in.x += columns;
  }
}

// `strips` strips from `first` on, all but the last one of two blocks.
template <int tokens, int strips>
void decode_strips(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                   int64_t first) {
  const int64_t blocks = tile_blocks(w, first + strips - 1);
  Lanes totals[2][strips][tokens] = {};
  FewTokens part = {in.floats, in.value_stride};
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    with_values(
        s, [&](const auto& values) { decode_segment(s, values, first, blocks, part, totals); });
    part.x += s.padded;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int i = 0; i < strips; ++i) {
      const int64_t row = (first + i) * ql::kStripRows + b * ql::kBlockRows;
      for (int t = 0; t < tokens; ++t) {
        finish_rows(out, t, row, w.rows - row, token_scale(in, t), totals[b][i][t]);
      }
    }
  }
}

// The more tokens, the fewer strips: both are sums that do not wait for one another.
template <int tokens>
void exact_few(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
               int64_t first, int64_t last) {
  constexpr int strips = tokens < kDecodeStrips ? kDecodeStrips / tokens : 1;
  for (; first + strips <= last && tile_blocks(w, first + strips - 1) == 2; first += strips) {
    decode_strips<tokens, strips>(w, in, out, first);
  }
  for (; first < last; ++first) decode_strips<tokens, 1>(w, in, out, first);
}

// Values of up to 128 columns, [column][block][row], and the scales of the pieces they belong to.
struct ExactPanel {
  float* values;
  float* scales;  // [piece][block][row]
  float* totals;  // [token][block][row]
};

constexpr int64_t kPanelRows = kPanelBlocks * ql::kBlockRows;

inline ExactPanel panel_in(uint8_t* scratch) {
  ExactPanel panel;
  panel.values = reinterpret_cast<float*>(scratch);
  panel.scales = panel.values + ql::kMaxPiece * kPanelRows;
  panel.totals = panel.scales + kPanelPieces * kPanelRows;
  return panel;
}

constexpr size_t kPanelBytes =
    static_cast<size_t>((ql::kMaxPiece + kPanelPieces) * kPanelRows) * sizeof(float);  // but totals

int64_t exact_scratch_bytes(const ql::TiledWeight&, int64_t) {
  return (ql::kMaxPiece + kPanelPieces + kTotalTokens) * kPanelRows *
         static_cast<int64_t>(sizeof(float));
}

// Pieces `first` .. `last` of one block.
template <class Values>
void fill_panel(const ql::TiledWeight& w, const ql::TileSegment& s, const Values& values,
                int64_t block, int64_t first, int64_t last, float* to, float* scales) {
  const BlockPlace place(w, s, block);
  for (int64_t piece = first; piece < last; ++piece, scales += kPanelRows) {
    const uint8_t* codes = place.codes_of(s, piece);
    const BlockMeta meta = block_meta(s, place.meta_of(s, piece), place.factors);
    store(scales, meta.scale);
    for (int64_t k = 0; k < piece_columns(s, piece); k += kUnitColumns) {
#pragma GCC unroll 4
      for (int chunk = 0; chunk < 4; ++chunk) {
        Lanes column[4];
        values(codes + 2 * k * s.bits, chunk, meta.zero, column);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, to += kPanelRows) store(to, column[j]);
      }
    }
  }
}

// A panel times `tokens` tokens from x on. Pieces have `piece` columns, the last one what is left.
template <int tokens>
void multiply_panel(const ExactPanel& panel, const float* x, int64_t stride, int64_t columns,
                    int64_t piece, float* totals) {
  const float* values = panel.values;
  const float* scales = panel.scales;
  for (int64_t start = 0; start < columns; start += piece, scales += kPanelRows) {
    const int64_t end = smaller_of(start + piece, columns);
    Lanes sums[tokens][kPanelBlocks];
    for (int t = 0; t < tokens; ++t) {
      for (int b = 0; b < kPanelBlocks; ++b) sums[t][b] = zero_lanes();
    }
    for (int64_t k = start; k < end; ++k, values += kPanelRows) {
      Lanes column[kPanelBlocks];
      for (int b = 0; b < kPanelBlocks; ++b) column[b] = load(values + b * kLanes);
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const Lanes a = broadcast(x[t * stride + k]);
        for (int b = 0; b < kPanelBlocks; ++b) sums[t][b] = fma(a, column[b], sums[t][b]);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      for (int b = 0; b < kPanelBlocks; ++b) {
        float* total = totals + (t * kPanelBlocks + b) * kLanes;
        store(total, fma(sums[t][b], load(scales + b * kLanes), load(total)));
      }
    }
  }
}

inline void multiply_any(const ExactPanel& panel, const float* x, int64_t stride, int64_t columns,
                         int64_t piece, int64_t tokens, float* totals) {
  switch (tokens) {
    case 1:
      return multiply_panel<1>(panel, x, stride, columns, piece, totals);
    case 2:
      return multiply_panel<2>(panel, x, stride, columns, piece, totals);
    case 3:
      return multiply_panel<3>(panel, x, stride, columns, piece, totals);
    case 4:
      return multiply_panel<4>(panel, x, stride, columns, piece, totals);
    case 5:
      return multiply_panel<5>(panel, x, stride, columns, piece, totals);
    default:
      return multiply_panel<6>(panel, x, stride, columns, piece, totals);
  }
}

// One segment of `blocks` blocks from `block` on: panel after panel, with all tokens each.
template <class Values>
void add_segment(const ql::TiledWeight& w, const ql::TileSegment& s, const Values& values,
                 int64_t block, int64_t blocks, const float* x, int64_t stride, int64_t tokens,
                 const ExactPanel& panel) {
  const int64_t step = ql::kMaxPiece / s.piece;
  for (int64_t piece = 0; piece < s.pieces; piece += step) {
    const int64_t last = smaller_of(piece + step, s.pieces);
    for (int64_t b = 0; b < blocks; ++b) {
      fill_panel(w, s, values, block + b, piece, last, panel.values + b * kLanes,
                 panel.scales + b * kLanes);
    }
    const int64_t start = piece * s.piece;
    const int64_t columns = smaller_of(s.padded - start, ql::kMaxPiece);
    for (int64_t t = 0; t < tokens; t += kPanelTokens) {
      multiply_any(panel, x + t * stride + start, stride, columns, s.piece,
                   smaller_of(tokens - t, kPanelTokens), panel.totals + t * kPanelRows);
    }
  }
}

// Rows of `blocks` blocks from `block` on, for `tokens` <= kTotalTokens tokens.
void panel_blocks(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                  int64_t block, int64_t blocks, int64_t first_token, int64_t tokens,
                  const ExactPanel& panel) {
  memset(panel.totals, 0, static_cast<size_t>(tokens * kPanelRows) * sizeof(float));
  const float* x = in.floats + first_token * in.value_stride;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    with_values(s, [&](const auto& values) {
      add_segment(w, s, values, block, blocks, x, in.value_stride, tokens, panel);
    });
    x += s.padded;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = (block + b) * ql::kBlockRows, token = first_token + t;
      finish_rows(out, token, row, w.rows - row, token_scale(in, token),
                  load(panel.totals + t * kPanelRows + b * kLanes));
    }
  }
}

void exact_strips(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                  int64_t first, int64_t last, uint8_t* scratch) {
  switch (in.tokens) {
    case 1:
      return exact_few<1>(w, in, out, first, last);
    case 2:
      return exact_few<2>(w, in, out, first, last);
    default:
      break;
  }
  if constexpr (kOneRegister) {  // elsewhere the panel is as fast
    if (in.tokens == 3) return exact_few<3>(w, in, out, first, last);
    if (in.tokens == 4) return exact_few<4>(w, in, out, first, last);
  }
  const int64_t end = smaller_of(2 * last, tile_block_count(w));
  const ExactPanel panel = panel_in(scratch);
  for (int64_t block = 2 * first; block < end; block += kPanelBlocks) {
    const int64_t blocks = smaller_of(end - block, kPanelBlocks);
    // A panel that lacks its second block, at the very end, multiplies zeros in its place.
    if (blocks < kPanelBlocks) memset(panel.values, 0, kPanelBytes);
    for (int64_t token = 0; token < in.tokens; token += kTotalTokens) {
      panel_blocks(w, in, out, block, blocks, token, smaller_of(in.tokens - token, kTotalTokens),
                   panel);
    }
  }
}

}  // namespace
