// Few tokens with int8 activations on AVX2: codes are used as they are read, strip by strip, memory
// being what limits it. First the dot products of some columns, then their runs' scales and zeros:
// together they would need more registers than there are.
#pragma once

#include <type_traits>

#include "tile_avx2_runs.h"
#include "tile_avx2_words.h"
#include "tile_exact.h"

namespace {

constexpr int64_t kFewColumns = ql::kWholeRun;  // of a strip at once: whole pieces
constexpr int64_t kFewRuns = kFewColumns / 16;  // of one of its blocks, at most

// Activations of all segments as words, where a segment has use for them.
struct Words {
  int16_t* of;     // [token][padded column]
  int64_t stride;  // from token to token
};

inline int64_t word_scratch_bytes(const ql::TiledWeight& w) {
  return kWordTokens * tile_padded_columns(w) * static_cast<int64_t>(sizeof(int16_t));
}

// Tokens, if there are few enough of them, as words in scratch.
inline Words words_of(const ql::TiledWeight& w, const ql::TileInput& in, uint8_t* scratch) {
  const Words words = {reinterpret_cast<int16_t*>(scratch), tile_padded_columns(w)};
  for (int64_t t = 0; t < in.tokens && in.tokens <= kWordTokens; ++t) {
    int64_t k = 0;
    for (int64_t i = 0; i < w.segment_count; k += w.segments[i++].padded) {
      const ql::TileSegment& s = w.segments[i];
      const int8_t* values = in.values + t * in.value_stride + k;
      if (has_words(s)) fill_words(values, s.padded, s.bits, words.of + t * words.stride + k);
    }
  }
  return words;
}

// Codes of a segment times few tokens: of_run(codes, columns, k, dots) from column k on.
template <class Bytes, class Dot>
struct ByteProducts {
  static constexpr int kOffset = Dot::kOffset;
  Bytes bytes;
  const int8_t* values;
  int64_t stride, unit_bytes;

  template <int tokens>
  void of_run(const uint8_t* codes, int64_t columns, int64_t k, IntLanes (&dots)[tokens]) const {
    Dot::of_block(bytes, codes, unit_bytes, columns, values + k, stride, dots);
  }
};

template <int bits>
struct WordProducts {
  static constexpr int kOffset = 0;
  const int16_t* words;
  int64_t stride;

  template <int tokens>
  void of_run(const uint8_t* codes, int64_t columns, int64_t k, IntLanes (&dots)[tokens]) const {
    WordDots<bits>::of_block(codes, columns, words + k, stride, dots);
  }
};

// Calls f(products) for the format of a segment and `tokens` tokens.
template <int tokens, class Function>
inline void with_products(const ql::TileSegment& s, const SegmentInput& in, const Words& words,
                          const Function& f) {
  if constexpr (tokens <= kWordTokens) {
    const int16_t* own = words.of + (in.values - in.all->values);
    if (has_words(s) && s.bits == 3) return f(WordProducts<3>{own, words.stride});
    if (has_words(s) && s.bits == 5) return f(WordProducts<5>{own, words.stride});
    if (has_words(s) && s.bits == 6) return f(WordProducts<6>{own, words.stride});
  }
  with_bytes(s, [&](const auto& bytes, auto dot) {
    using Products = ByteProducts<std::decay_t<decltype(bytes)>, decltype(dot)>;
    f(Products{bytes, in.values, in.all->value_stride, 32 * s.bits});
  });
}

// The scales and zeros of `pieces` pieces: metas[block][run].
inline void few_metas(const ql::TileSegment& s, const SegmentInput& in, const uint8_t* meta,
                      const float* factors, int64_t blocks, int64_t pieces,
                      RunMeta (&metas)[2][kFewRuns]) {
  for (int64_t p = 0; p < pieces; ++p) {
    for (int64_t b = 0; b < blocks; ++b, meta += block_meta_bytes(s)) {
      read_metas(s, in, meta, factors + b * kLanes, &metas[b][p * in.runs]);
    }
  }
}

// The dot products of columns `first` .. `end`: dots[block][run][token].
template <int tokens, class Products>
__attribute__((noinline)) void few_dots(const ql::TileSegment& s, const Products& products,
                                        int64_t run, const uint8_t* codes, int64_t blocks,
                                        int64_t first, int64_t end,
                                        IntLanes (&dots)[2][kFewRuns][tokens]) {
  for (int64_t k = first; k < end; k += s.piece) {
    const int64_t piece_end = smaller_of(k + s.piece, end);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t at = k; at < piece_end; at += run) {
        const int64_t columns = smaller_of(run, piece_end - at);
        const int64_t size = block_code_bytes(columns, s.bits);
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(codes + i + kPrefetchBytes);
        products.of_run(codes, columns, at, dots[b][(at - first) / run]);
        codes += size;
      }
    }
  }
}

// What dot products lack whose codes were less by `offset`.
template <int tokens>
inline void add_offsets(const SegmentInput& in, int offset, int64_t first, int64_t end,
                        IntLanes (&dots)[kFewRuns][tokens]) {
  for (int64_t k = first, r = 0; k < end; k += in.run, ++r) {
    for (int t = 0; t < tokens; ++t) {
      const int32_t sum = static_cast<int32_t>(in.sum(t, k / in.run));
      dots[r][t] = dots[r][t] + broadcast_int(offset * sum);
    }
  }
}

// One segment of a strip of `blocks` blocks, read from its beginning to its end. Sums are
// [token][row].
template <int tokens, class Products>
void add_few(const ql::TileSegment& s, const Products& products, int64_t strip, int64_t blocks,
             const SegmentInput& in, int32_t* whole, float* totals) {
  const uint8_t* codes = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const float* factors = s.factors + strip * ql::kStripRows;
  const int64_t step = kFewColumns / s.piece;
  for (int64_t piece = 0; piece < s.pieces; piece += step) {
    const int64_t pieces = smaller_of(step, s.pieces - piece), first = piece * s.piece;
    const int64_t end = smaller_of(first + pieces * s.piece, s.padded);
    RunMeta metas[2][kFewRuns];
    IntLanes dots[2][kFewRuns][tokens];
    few_metas(s, in, meta, factors, blocks, pieces, metas);
    few_dots(s, products, in.run, codes, blocks, first, end, dots);
    meta += pieces * blocks * block_meta_bytes(s);
    codes += blocks * block_code_bytes(end - first, s.bits);
    for (int64_t b = 0; b < blocks; ++b) {
      if (Products::kOffset) add_offsets(in, Products::kOffset, first, end, dots[b]);
      add_dots<tokens>(in, 0, first, end - first, metas[b], dots[b][0], whole + b * kLanes,
                       totals + b * kLanes);
      if (ends_run(s, in, end)) {
        end_runs(s, factors + b * kLanes, tokens, whole + b * kLanes, totals + b * kLanes);
      }
    }
  }
}

template <int tokens>
void int8_few(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
              int64_t strip, const Words& words) {
  const int64_t first = strip * ql::kStripRows, blocks = tile_blocks(w, strip);
  Lanes results[2][tokens];
  for (int64_t b = 0; b < 2; ++b) {
    const int64_t row = first + b * kLanes;
    for (int t = 0; t < tokens; ++t) results[b][t] = bias_of(out, row, w.rows - row);
  }
  for_segments(w, in, 0, [&](const ql::TileSegment& s, const SegmentInput& part) {
    alignas(32) float totals[tokens][ql::kStripRows];
    alignas(32) int32_t whole[tokens][ql::kStripRows];
    for (int t = 0; t < tokens; ++t) {
      for (int64_t b = 0; b < 2; ++b) {
        store(totals[t] + b * kLanes, zero_lanes());
        store_int(whole[t] + b * kLanes, broadcast_int(0));
      }
    }
    with_products<tokens>(s, part, words, [&](const auto& products) {
      add_few<tokens>(s, products, strip, blocks, part, whole[0], totals[0]);
    });
    for (int t = 0; t < tokens; ++t) {
      const Lanes scale = broadcast(segment_scale(in, t, part.index));
      for (int64_t b = 0; b < 2; ++b) {
        results[b][t] = fma(load(totals[t] + b * kLanes), scale, results[b][t]);
      }
    }
  });
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = first + b * kLanes;
    for (int t = 0; t < tokens; ++t) store_rows(out, t, row, w.rows - row, results[b][t]);
  }
}

}  // namespace
