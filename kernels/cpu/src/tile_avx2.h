// Linear with int8 activations on AVX2, with and without AVX-VNNI (the int8 mode of tiles.h).
//
// A block's 16 rows are two vectors of eight. Up to four tokens (tile_avx2_few.h) use codes as they
// are read. For more the bytes of 256 columns of a strip are written to a panel in the first-level
// cache, which several tokens at a time go through: first all dot products, then their runs' scales
// and zeros.
#pragma once

#include "tile_avx2_few.h"
#include "tile_exact.h"

namespace {

constexpr int kDirectTokens = 4;                   // at once, without a panel
constexpr int64_t kPanelColumns = 256;             // whole pieces; kWholeRun is a multiple
constexpr int64_t kInt8Runs = kPanelColumns / 16;  // of a panel's block, at most
constexpr int64_t kInt8Totals = 16 * kInt8Tokens;  // that go through all strips together: the
                                                   // second-level cache keeps them

template <int number>
struct Count {
  static constexpr int value = number;
};

// Calls f(Count<count>()), or f(Count<most>()) for a count above.
template <int most, class Function>
inline void with_count(int64_t count, const Function& f) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, f);
  }
  f(Count<most>());
}

// Columns of a strip in scratch.
struct Int8Panel {
  uint8_t* bytes;  // [block][chunk][plane][64]
  RunMeta* meta;   // [block][run]
  float* totals;   // [token][block][row]: of one segment
  float* results;  // the same: of the segments before it
  int32_t* whole;  // the same: of a run of whole sums
};

constexpr int64_t kPanelBlockBytes = 2 * kPanelColumns * kLanes;  // of at most two planes

inline Int8Panel int8_panel_in(uint8_t* scratch) {
  Int8Panel panel;
  panel.bytes = scratch;
  panel.meta = reinterpret_cast<RunMeta*>(scratch + 2 * kPanelBlockBytes);
  panel.totals = reinterpret_cast<float*>(panel.meta + 2 * kInt8Runs);
  panel.results = panel.totals + kInt8Totals * ql::kStripRows;
  panel.whole = reinterpret_cast<int32_t*>(panel.results + kInt8Totals * ql::kStripRows);
  return panel;
}

// A panel, or words.
int64_t int8_scratch_bytes(const ql::TiledWeight& w, int64_t) {
  constexpr int64_t metas = 2 * kInt8Runs * static_cast<int64_t>(sizeof(RunMeta));
  constexpr int64_t totals = 3 * kInt8Totals * ql::kStripRows * static_cast<int64_t>(sizeof(float));
  constexpr int64_t panel = 2 * kPanelBlockBytes + metas + totals;
  const int64_t words = word_scratch_bytes(w);
  return words > panel ? words : panel;
}

// Pieces `first` .. `last` of one block of a strip.
template <class Bytes, class Dot>
void fill_bytes(const ql::TiledWeight& w, const ql::TileSegment& s, const SegmentInput& in,
                const Bytes& bytes, Dot, int64_t block, int64_t first, int64_t last, uint8_t* to,
                RunMeta* metas) {
  const BlockPlace place(w, s, block);
  for (int64_t piece = first; piece < last; ++piece) {
    read_metas(s, in, place.meta_of(s, piece), place.factors, metas);
    metas += in.runs;
    const uint8_t* codes = place.codes_of(s, piece);
    const int64_t columns = piece_columns(s, piece), size = block_code_bytes(columns, s.bits);
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(codes + i + kPrefetchBytes);
    for (int64_t k = 0; k < columns; k += kUnitColumns, to += 256 * Dot::kPlanes) {
      for (int half = 0; half < 2; ++half) {
        __m256i unit[4];
        bytes(codes + 2 * k * s.bits, half, unit);
        Dot::to_panel(unit, half, to);
      }
    }
  }
}

// `columns` columns from `first` on of a block in the panel, times `tokens` tokens from `token` on.
template <int tokens, class Dot>
void multiply_bytes(Dot, const SegmentInput& in, int64_t token, int64_t first, int64_t columns,
                    const uint8_t* bytes, const RunMeta* metas, int32_t* whole, float* totals) {
  IntLanes dots[kInt8Runs * tokens];
  const int64_t stride = in.all->value_stride;
  const int8_t* a = in.values + token * stride + first;
  Dot::template of_panel<tokens>(bytes, columns, in.run, a, stride, dots);
  add_dots<tokens>(in, token, first, columns, metas, dots, whole, totals);
}

// Asks for `columns` columns from `first` on of tokens from `token` on, as many as go together: the
// tokens need not exist.
inline void prefetch_tokens(const SegmentInput& in, int64_t token, int64_t first, int64_t columns) {
  for (int64_t t = token; t < token + kInt8Tokens; ++t) {
    const int8_t* values = in.values + t * in.all->value_stride + first;
    for (int64_t k = 0; k < columns; k += 64) __builtin_prefetch(values + k);
  }
}

// One segment of a strip: panel after panel, with all tokens each.
template <class Bytes, class Dot>
void add_strip_segment(const ql::TiledWeight& w, const ql::TileSegment& s, const Bytes& bytes,
                       Dot dot, int64_t strip, const SegmentInput& in, int64_t tokens,
                       const Int8Panel& panel) {
  const int64_t step = kPanelColumns / s.piece, blocks = tile_blocks(w, strip);
  for (int64_t piece = 0; piece < s.pieces; piece += step) {
    const int64_t last = smaller_of(piece + step, s.pieces), first = piece * s.piece;
    const int64_t columns = smaller_of(last * s.piece, s.padded) - first;
    for (int64_t b = 0; b < blocks; ++b) {
      fill_bytes(w, s, in, bytes, dot, 2 * strip + b, piece, last,
                 panel.bytes + b * kPanelBlockBytes, panel.meta + b * kInt8Runs);
    }
    for (int64_t t = 0; t < tokens; t += kInt8Tokens) {
      prefetch_tokens(in, t + kInt8Tokens, first, columns);
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* from = panel.bytes + b * kPanelBlockBytes;
        const RunMeta* metas = panel.meta + b * kInt8Runs;
        const int64_t row = t * ql::kStripRows + b * kLanes;
        with_count<kInt8Tokens>(tokens - t, [&](auto count) {
          multiply_bytes<count.value>(dot, in, t, first, columns, from, metas, panel.whole + row,
                                      panel.totals + row);
        });
      }
    }
    for (int64_t b = 0; b < blocks && ends_run(s, in, first + columns); ++b) {
      const float* factors = s.factors + strip * ql::kStripRows + b * kLanes;
      end_runs(s, factors, tokens, panel.whole + b * kLanes, panel.totals + b * kLanes);
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

// The input without the tokens before `token`.
inline ql::TileInput from_token(ql::TileInput in, int64_t token) {
  in.values += token * in.value_stride;
  in.sums += token * in.sum_stride;
  in.scales += token * in.scale_stride;
  in.tokens -= token;
  return in;
}

// With more tokens a panel is quicker: bytes are not worth one for two times kDirectTokens.
inline int64_t most_direct_tokens(const ql::TiledWeight& w) {
  for (int64_t i = 0; i < w.segment_count; ++i) {
    if (w.segments[i].bits != 8) return kDirectTokens;
  }
  return kByteTokens;
}

void int8_strips(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 int64_t first, int64_t last, uint8_t* scratch) {
  if (in.tokens <= most_direct_tokens(w)) {
    const Words words = words_of(w, in, scratch);
    for (int64_t strip = first; strip < last; ++strip) {
      for (int64_t token = 0; token < in.tokens; token += kDirectTokens) {
        const ql::TileOutput part = {out.y + token * out.y_stride, out.y_stride, out.bias,
                                     out.accumulate};
        with_count<kDirectTokens>(in.tokens - token, [&](auto count) {
          int8_few<count.value>(w, from_token(in, token), part, strip, words);
        });
      }
    }
    return;
  }
  const Int8Panel panel = int8_panel_in(scratch);
  for (int64_t token = 0; token < in.tokens; token += kInt8Totals) {
    for (int64_t strip = first; strip < last; ++strip) {
      int8_many(w, in, out, strip, token, smaller_of(in.tokens - token, kInt8Totals), panel);
    }
  }
}

}  // namespace
