// Linear with int8 activations on AVX2, with and without AVX-VNNI (the int8 mode of tiles.h).
//
// A block's 16 rows are two vectors of eight. Up to four tokens: codes become bytes in registers
// and are used at once, strip by strip, memory being what limits it. More: the bytes of 128 columns
// of a strip are written to a panel in the first-level cache, which several tokens at a time go
// through.
#pragma once

#include "tile_avx2_runs.h"
#include "tile_exact.h"

namespace {

#ifdef __AVXVNNI__
constexpr int kInt8Tokens = 6;  // at once, from a panel: twelve sums
#else
constexpr int kInt8Tokens = 8;  // eight sums of one half, and 16 bit sums beside them
#endif
constexpr int64_t kInt8Totals = 32 * kInt8Tokens;  // tokens whose totals are kept beside a panel

// One segment of a strip of `blocks` blocks, read from its beginning to its end.
template <int tokens, class Bytes, class Dot>
inline void decode_bytes(const ql::TileSegment& s, const Bytes& bytes, Dot dot, int64_t strip,
                         int64_t blocks, const SegmentInput& in, Lanes (&totals)[2][tokens]) {
  const uint8_t* codes = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const float* factors = s.factors + strip * ql::kStripRows;
  IntLanes whole[2][tokens];
  for (int t = 0; t < tokens; ++t) whole[0][t] = whole[1][t] = broadcast_int(0);
  for (int64_t piece = 0; piece < s.pieces; ++piece) {
    const int64_t first = piece * s.piece, end = first + piece_columns(s, piece);
    for (int64_t b = 0; b < blocks; ++b, meta += block_meta_bytes(s)) {
      const RunMeta own = run_meta(s, in, meta, factors + b * kLanes);
      for (int64_t k = first, at = piece * in.runs; k < end; k += in.run, ++at) {
        const int64_t columns = smaller_of(in.run, end - k);
        const int64_t size = block_code_bytes(columns, s.bits);
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(codes + i + kPrefetchBytes);
        IntLanes dots[tokens];
        Dot::of_block(bytes, codes, 32 * s.bits, columns, in.values + k, in.all->value_stride,
                      dots);
        for (int t = 0; t < tokens; ++t) {
          add_run(dot, in, t, at, k, own, dots[t], whole[b][t], totals[b][t]);
        }
        codes += size;
      }
      if (ends_run(s, in, end)) {
        for (int t = 0; t < tokens; ++t) {
          totals[b][t] = end_run(s, factors + b * kLanes, whole[b][t], totals[b][t]);
          whole[b][t] = broadcast_int(0);
        }
      }
    }
  }
}

template <int tokens>
void int8_few(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
              int64_t first, int64_t last) {
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t blocks = tile_blocks(w, strip);
    Lanes results[2][tokens];
    for (int64_t b = 0; b < 2; ++b) {
      const int64_t row = strip * ql::kStripRows + b * kLanes;
      for (int t = 0; t < tokens; ++t) results[b][t] = bias_of(out, row, w.rows - row);
    }
    for_segments(w, in, 0, [&](const ql::TileSegment& s, const SegmentInput& part) {
      Lanes totals[2][tokens];
      for (int t = 0; t < tokens; ++t) totals[0][t] = totals[1][t] = zero_lanes();
      with_bytes(s, [&](const auto& bytes, auto dot) {
        decode_bytes(s, bytes, dot, strip, blocks, part, totals);
      });
      for (int t = 0; t < tokens; ++t) {
        const Lanes scale = broadcast(segment_scale(in, t, part.index));
        for (int b = 0; b < 2; ++b) results[b][t] = fma(totals[b][t], scale, results[b][t]);
      }
    });
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = strip * ql::kStripRows + b * kLanes;
      for (int t = 0; t < tokens; ++t) store_rows(out, t, row, w.rows - row, results[b][t]);
    }
  }
}

// 128 columns of a strip in scratch.
struct Int8Panel {
  uint8_t* bytes;  // [block][16 columns][chunk][64]
  float* meta;     // [block][piece]: RunMeta
  float* totals;   // [token][block][row]: of one segment
  float* results;  // the same: of the segments before it
  int32_t* whole;  // the same: of a run of whole sums
};

constexpr int64_t kPanelBlockBytes = ql::kMaxPiece * kLanes;
constexpr int64_t kMetaFloats = 2 * kLanes;

inline Int8Panel int8_panel_in(uint8_t* scratch) {
  Int8Panel panel;
  panel.bytes = scratch;
  panel.meta = reinterpret_cast<float*>(scratch + 2 * kPanelBlockBytes);
  panel.totals = panel.meta + 2 * kPanelPieces * kMetaFloats;
  panel.results = panel.totals + kInt8Totals * ql::kStripRows;
  panel.whole = reinterpret_cast<int32_t*>(panel.results + kInt8Totals * ql::kStripRows);
  return panel;
}

int64_t int8_scratch_bytes(const ql::TiledWeight&, int64_t) {
  const int64_t floats = 2 * kPanelPieces * kMetaFloats + 3 * kInt8Totals * ql::kStripRows;
  return 2 * kPanelBlockBytes + floats * static_cast<int64_t>(sizeof(float));
}

// Pieces `first` .. `last` of one block of a strip.
template <class Bytes>
void fill_bytes(const ql::TiledWeight& w, const ql::TileSegment& s, const SegmentInput& in,
                const Bytes& bytes, int64_t block, int64_t first, int64_t last, uint8_t* to,
                float* metas) {
  const BlockPlace place(w, s, block);
  for (int64_t piece = first; piece < last; ++piece, metas += kMetaFloats) {
    const RunMeta meta = run_meta(s, in, place.meta_of(s, piece), place.factors);
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
                    int32_t* whole, float* totals) {
  const RawBytes<8> panel_bytes;
  for (int64_t piece = first; piece < last; ++piece, metas += kMetaFloats) {
    const int64_t begin = piece * s.piece, end = begin + piece_columns(s, piece);
    const RunMeta meta = {load(metas), load(metas + kLanes)};
    for (int64_t k = begin, at = piece * in.runs; k < end; k += in.run, ++at) {
      const int64_t columns = smaller_of(in.run, end - k);
      const int8_t* a = in.values + token * in.all->value_stride + k;
      IntLanes dots[tokens];
      Dot::of_block(panel_bytes, bytes, 256, columns, a, in.all->value_stride, dots);
      for (int t = 0; t < tokens; ++t) {
        IntLanes sum = load_int(whole + t * ql::kStripRows);
        Lanes total = load(totals + t * ql::kStripRows);
        add_run(dot, in, token + t, at, k, meta, dots[t], sum, total);
        store_int(whole + t * ql::kStripRows, sum);
        store(totals + t * ql::kStripRows, total);
      }
      bytes += columns * kLanes;
    }
  }
}

template <class Dot>
inline void multiply_any(Dot dot, const ql::TileSegment& s, const SegmentInput& in, int64_t token,
                         int64_t tokens, int64_t first, int64_t last, const uint8_t* bytes,
                         const float* metas, int32_t* whole, float* totals) {
  switch (tokens) {
    case 1:
      return multiply_bytes<1>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    case 2:
      return multiply_bytes<2>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    case 3:
      return multiply_bytes<3>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    case 4:
      return multiply_bytes<4>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    case 5:
      return multiply_bytes<5>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    case 6:
      return multiply_bytes<6>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    case 7:
      return multiply_bytes<7>(dot, s, in, token, first, last, bytes, metas, whole, totals);
    default:
      return multiply_bytes<8>(dot, s, in, token, first, last, bytes, metas, whole, totals);
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
      fill_bytes(w, s, in, bytes, 2 * strip + b, piece, last, panel.bytes + b * kPanelBlockBytes,
                 panel.meta + b * block_floats);
    }
    for (int64_t t = 0; t < tokens; t += kInt8Tokens) {
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* from = panel.bytes + b * kPanelBlockBytes;
        const float* metas = panel.meta + b * block_floats;
        const int64_t row = t * ql::kStripRows + b * kLanes;
        multiply_any(dot, s, in, t, smaller_of(tokens - t, kInt8Tokens), piece, last, from, metas,
                     panel.whole + row, panel.totals + row);
      }
    }
    if (!ends_run(s, in, smaller_of(last * s.piece, s.padded))) continue;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = t * ql::kStripRows + b * kLanes;
        const float* factors = s.factors + strip * ql::kStripRows + b * kLanes;
        store(panel.totals + row,
              end_run(s, factors, load_int(panel.whole + row), load(panel.totals + row)));
        store_int(panel.whole + row, broadcast_int(0));
      }
    }
  }
}

void int8_many(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
               int64_t strip, int64_t first_token, int64_t tokens, const Int8Panel& panel) {
  const auto for_totals = [&](const auto& f) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t b = 0; b < tile_blocks(w, strip); ++b) {
        f(t, strip * ql::kStripRows + b * kLanes, t * ql::kStripRows + b * kLanes);
      }
    }
  };
  for_totals([&](int64_t, int64_t row, int64_t at) {
    store(panel.results + at, bias_of(out, row, w.rows - row));
  });
  for_segments(w, in, first_token, [&](const ql::TileSegment& s, const SegmentInput& part) {
    memset(panel.totals, 0, static_cast<size_t>(tokens * ql::kStripRows) * sizeof(float));
    memset(panel.whole, 0, static_cast<size_t>(tokens * ql::kStripRows) * sizeof(int32_t));
    with_bytes(s, [&](const auto& bytes, auto dot) {
      add_strip_segment(w, s, bytes, dot, strip, part, tokens, panel);
    });
    for_totals([&](int64_t t, int64_t, int64_t at) {
      const Lanes scale = broadcast(segment_scale(in, first_token + t, part.index));
      store(panel.results + at, fma(load(panel.totals + at), scale, load(panel.results + at)));
    });
  });
  for_totals([&](int64_t t, int64_t row, int64_t at) {
    store_rows(out, first_token + t, row, w.rows - row, load(panel.results + at));
  });
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
