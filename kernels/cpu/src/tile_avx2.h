// Linear with int8 activations on AVX2, with and without AVX-VNNI (the int8 mode of tiles.h).
//
// A block's 16 rows are two vectors of eight. Up to four tokens: codes become bytes in registers
// and are used at once, strip by strip, memory being what limits it. More: the bytes of 128 columns
// of a strip are written to a panel in the first-level cache, which several tokens at a time go
// through.
#pragma once

#include "tile_avx2_codes.h"
#include "tile_avx2_dot.h"
#include "tile_exact.h"

namespace {

#ifdef __AVXVNNI__
constexpr int kInt8Tokens = 6;  // at once, from a panel: twelve sums
#else
constexpr int kInt8Tokens = 8;  // eight sums of one half, and 16 bit sums beside them
#endif
constexpr int64_t kInt8Totals = 32 * kInt8Tokens;  // tokens whose totals are kept beside a panel

// Calls f(bytes, dot) for the format of a segment.
template <class Function>
inline void with_bytes(const ql::TileSegment& s, const Function& f) {
  if (s.integer_values) {
    if (s.bits == 4) return f(CodeBytes<4, true>(s), Dots<dots_width(24)>());
    return f(CodeBytes<6, true>(s), Dots<dots_width(120)>());
  }
  switch (s.bits) {
    case 2:
      return f(CodeBytes<2, false>(s), Dots<dots_width(3)>());
    case 3:
      return f(CodeBytes<3, false>(s), Dots<dots_width(7)>());
    case 4:
      return f(CodeBytes<4, false>(s), Dots<dots_width(15)>());
    case 5:
      return f(CodeBytes<5, false>(s), Dots<dots_width(31)>());
    case 6:
      return f(CodeBytes<6, false>(s), Dots<dots_width(63)>());
    case 7:
      return f(CodeBytes<7, false>(s), Dots<dots_width(127)>());
    default:
      return f(CodeBytes<8, false>(s), Dots<dots_width(255)>());
  }
}

// The activations of one segment, from the first of some tokens on.
struct SegmentInput {
  const int8_t* values;
  const float* sums;    // of the segment's pieces
  const float* scales;  // of its activation groups
  const ql::TileInput* all;

  float sum(int64_t token, int64_t piece) const { return sums[token * all->sum_stride + piece]; }
  float scale(const ql::TileSegment& s, int64_t token, int64_t piece) const {
    return scales[token * all->scale_stride + piece * s.piece / all->act_group];
  }
};

// Calls f(segment, its activations from `token` on) for each segment.
template <class Function>
inline void for_segments(const ql::TiledWeight& w, const ql::TileInput& in, int64_t token,
                         const Function& f) {
  const int8_t* values = in.values + token * in.value_stride;
  const float* sums = in.sums + token * in.sum_stride;
  const float* scales = in.scales + token * in.scale_stride;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    f(s, SegmentInput{values, sums + sum_offset(s.padded, s.piece), scales, &in});
    values += s.padded;
    sums += sum_count(s.padded);
    if (in.act_group) scales += act_group_count(s.padded, in.act_group);
  }
}

inline BlockMeta int8_meta(const ql::TileSegment& s, const uint8_t* meta, const float* factors) {
  BlockMeta decoded = block_meta(s, meta, factors);
  decoded.scale = decoded.scale * broadcast(s.integer_unit);
  return decoded;
}

// total + the dot product of a piece, less zero * sum, times the scales.
template <class Dot>
inline Lanes add_piece(Dot, const ql::TileSegment& s, const SegmentInput& in, int64_t token,
                       int64_t piece, const BlockMeta& meta, IntLanes dot, Lanes total) {
  const float sum = in.sum(token, piece);
  Lanes t = floats_of(dot);
  if (Dot::kOffset) t = fma(broadcast(Dot::kOffset), broadcast(sum), t);  // whole: exact
  t = fma(meta.zero, broadcast(-sum), t);
  if (in.all->act_group) t = t * broadcast(in.scale(s, token, piece));
  return fma(t, meta.scale, total);
}

inline float int8_token_scale(const ql::TileInput& in, int64_t token) {
  return in.act_group ? 1.0f : in.scales[token * in.scale_stride];
}

// One segment of a strip of `blocks` blocks, read from its beginning to its end.
template <int tokens, class Bytes, class Dot>
inline void decode_bytes(const ql::TileSegment& s, const Bytes& bytes, Dot dot, int64_t strip,
                         int64_t blocks, const SegmentInput& in, Lanes (&totals)[2][tokens]) {
  const uint8_t* codes = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const float* factors = s.factors + strip * ql::kStripRows;
  for (int64_t piece = 0; piece < s.pieces; ++piece) {
    const int64_t columns = piece_columns(s, piece), size = block_code_bytes(columns, s.bits);
    for (int64_t b = 0; b < blocks; ++b, codes += size, meta += block_meta_bytes(s)) {
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(codes + i + kPrefetchBytes);
      IntLanes dots[tokens];
      Dot::of_block(bytes, codes, 32 * s.bits, columns, in.values + piece * s.piece,
                    in.all->value_stride, dots);
      const BlockMeta decoded = int8_meta(s, meta, factors + b * kLanes);
      for (int t = 0; t < tokens; ++t) {
        totals[b][t] = add_piece(dot, s, in, t, piece, decoded, dots[t], totals[b][t]);
      }
    }
  }
}

template <int tokens>
void int8_few(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
              int64_t first, int64_t last) {
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t blocks = tile_blocks(w, strip);
    Lanes totals[2][tokens];
    for (int t = 0; t < tokens; ++t) totals[0][t] = totals[1][t] = zero_lanes();
    for_segments(w, in, 0, [&](const ql::TileSegment& s, const SegmentInput& part) {
      with_bytes(s, [&](const auto& bytes, auto dot) {
        decode_bytes(s, bytes, dot, strip, blocks, part, totals);
      });
    });
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = strip * ql::kStripRows + b * kLanes;
      for (int t = 0; t < tokens; ++t) {
        finish_rows(out, t, row, w.rows - row, int8_token_scale(in, t), totals[b][t]);
      }
    }
  }
}

// 128 columns of a strip in scratch.
struct Int8Panel {
  uint8_t* bytes;  // [block][16 columns][chunk][64]
  float* meta;     // [block][piece]: 16 scales, 16 zeros
  float* totals;   // [token][block][row]
};

constexpr int64_t kPanelBlockBytes = ql::kMaxPiece * kLanes;
constexpr int64_t kMetaFloats = 2 * kLanes;

inline Int8Panel int8_panel_in(uint8_t* scratch) {
  Int8Panel panel;
  panel.bytes = scratch;
  panel.meta = reinterpret_cast<float*>(scratch + 2 * kPanelBlockBytes);
  panel.totals = panel.meta + 2 * kPanelPieces * kMetaFloats;
  return panel;
}

int64_t int8_scratch_bytes(const ql::TiledWeight&, int64_t) {
  const int64_t floats = 2 * kPanelPieces * kMetaFloats + kInt8Totals * ql::kStripRows;
  return 2 * kPanelBlockBytes + floats * static_cast<int64_t>(sizeof(float));
}

// Pieces `first` .. `last` of one block of a strip.
template <class Bytes>
void fill_bytes(const ql::TiledWeight& w, const ql::TileSegment& s, const Bytes& bytes,
                int64_t block, int64_t first, int64_t last, uint8_t* to, float* metas) {
  const BlockPlace place(w, s, block);
  for (int64_t piece = first; piece < last; ++piece, metas += kMetaFloats) {
    const BlockMeta meta = int8_meta(s, place.meta_of(s, piece), place.factors);
    store(metas, meta.scale);
    store(metas + kLanes, meta.zero);
    const uint8_t* codes = place.codes_of(s, piece);
    for (int64_t k = 0; k < piece_columns(s, piece); k += kUnitColumns, to += 256) {
      for (int half = 0; half < 2; ++half) {
        __m256i unit[4];
        bytes(codes + 2 * k * s.bits, half, unit);
        for (int c = 0; c < 4; ++c) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * c + 32 * half), unit[c]);
        }
      }
    }
  }
}

// Pieces `first` .. `last` of a block of the panel times `tokens` tokens from `token` on.
template <int tokens, class Dot>
void multiply_bytes(Dot dot, const ql::TileSegment& s, const SegmentInput& in, int64_t token,
                    int64_t first, int64_t last, const uint8_t* bytes, const float* metas,
                    float* totals) {
  const int8_t* a = in.values + token * in.all->value_stride + first * s.piece;
  const RawBytes<8> panel_bytes;
  for (int64_t piece = first; piece < last; ++piece, metas += kMetaFloats) {
    const int64_t columns = piece_columns(s, piece);
    IntLanes dots[tokens];
    Dot::of_block(panel_bytes, bytes, 256, columns, a, in.all->value_stride, dots);
    const BlockMeta meta = {load(metas), load(metas + kLanes)};
    for (int t = 0; t < tokens; ++t) {
      float* total = totals + t * ql::kStripRows;
      store(total, add_piece(dot, s, in, token + t, piece, meta, dots[t], load(total)));
    }
    bytes += columns * kLanes;
    a += columns;
  }
}

template <class Dot>
inline void multiply_any(Dot dot, const ql::TileSegment& s, const SegmentInput& in, int64_t token,
                         int64_t tokens, int64_t first, int64_t last, const uint8_t* bytes,
                         const float* metas, float* totals) {
  switch (tokens) {
    case 1:
      return multiply_bytes<1>(dot, s, in, token, first, last, bytes, metas, totals);
    case 2:
      return multiply_bytes<2>(dot, s, in, token, first, last, bytes, metas, totals);
    case 3:
      return multiply_bytes<3>(dot, s, in, token, first, last, bytes, metas, totals);
    case 4:
      return multiply_bytes<4>(dot, s, in, token, first, last, bytes, metas, totals);
    case 5:
      return multiply_bytes<5>(dot, s, in, token, first, last, bytes, metas, totals);
    case 6:
      return multiply_bytes<6>(dot, s, in, token, first, last, bytes, metas, totals);
    case 7:
      return multiply_bytes<7>(dot, s, in, token, first, last, bytes, metas, totals);
    default:
      return multiply_bytes<8>(dot, s, in, token, first, last, bytes, metas, totals);
  }
}

// One segment of a strip: panel after panel, with all tokens each.
template <class Bytes, class Dot>
void add_strip_segment(const ql::TiledWeight& w, const ql::TileSegment& s, const Bytes& bytes,
                       Dot dot, int64_t strip, const SegmentInput& in, int64_t tokens,
                       const Int8Panel& panel) {
  const int64_t step = ql::kMaxPiece / s.piece, blocks = tile_blocks(w, strip);
  const int64_t block_floats = kPanelPieces * kMetaFloats;
  for (int64_t piece = 0; piece < s.pieces; piece += step) {
    const int64_t last = smaller_of(piece + step, s.pieces);
    for (int64_t b = 0; b < blocks; ++b) {
      fill_bytes(w, s, bytes, 2 * strip + b, piece, last, panel.bytes + b * kPanelBlockBytes,
                 panel.meta + b * block_floats);
    }
    for (int64_t t = 0; t < tokens; t += kInt8Tokens) {
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* from = panel.bytes + b * kPanelBlockBytes;
        const float* metas = panel.meta + b * block_floats;
        float* totals = panel.totals + t * ql::kStripRows + b * kLanes;
        multiply_any(dot, s, in, t, smaller_of(tokens - t, kInt8Tokens), piece, last, from, metas,
                     totals);
      }
    }
  }
}

void int8_many(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
               int64_t strip, int64_t first_token, int64_t tokens, const Int8Panel& panel) {
  memset(panel.totals, 0, static_cast<size_t>(tokens * ql::kStripRows) * sizeof(float));
  for_segments(w, in, first_token, [&](const ql::TileSegment& s, const SegmentInput& part) {
    with_bytes(s, [&](const auto& bytes, auto dot) {
      add_strip_segment(w, s, bytes, dot, strip, part, tokens, panel);
    });
  });
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t b = 0; b < tile_blocks(w, strip); ++b) {
      const int64_t row = strip * ql::kStripRows + b * kLanes, token = first_token + t;
      finish_rows(out, token, row, w.rows - row, int8_token_scale(in, token),
                  load(panel.totals + t * ql::kStripRows + b * kLanes));
    }
  }
}

void int8_strips(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 int64_t first, int64_t last, uint8_t* scratch) {
  switch (in.tokens) {
    case 1:
      return int8_few<1>(w, in, out, first, last);
    case 2:
      return int8_few<2>(w, in, out, first, last);
    case 3:
      return int8_few<3>(w, in, out, first, last);
    case 4:
      return int8_few<4>(w, in, out, first, last);
    default:
      break;
  }
  const Int8Panel panel = int8_panel_in(scratch);
  for (int64_t strip = first; strip < last; ++strip) {
    for (int64_t token = 0; token < in.tokens; token += kInt8Totals) {
      int8_many(w, in, out, strip, token, smaller_of(in.tokens - token, kInt8Totals), panel);
    }
  }
}

}  // namespace
