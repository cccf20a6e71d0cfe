// int8 activations, many tokens: stretches of a strip's columns are unpacked once, into a panel that
// stays in the cache, and multiplied with six tokens at a time; then come the next ones. Where the
// panel holds all segments, a tile goes through all of them, and its totals never leave the L1 cache.
//
// With very many tokens the panel is longer than the L1 cache: it is read in order, for which L2 is
// fast enough, and totals are loaded and stored less often. With fewer tokens, what comes next is
// better asked for in smaller portions.
//
// A panel is laid out as 8-bit codes are, so these need no unpacking. Six tokens x two blocks make
// twelve chains of VPDPBUSD and twelve totals: 24 of the 32 registers. With whole sums whose products
// of code and scale code fit a byte, the panel holds these: a run then has no groups, and each block's
// part of it lies in one piece.
#pragma once

#include "tile_avx512_panel_whole.h"

namespace vnni {
namespace {

// Adds a stretch's share to the totals of a tile, whose first token is `token`.
template <int tokens, int blocks, bool same_zero, bool grouped>
__attribute__((noinline)) void panel_tile(const Stretch& s, int64_t token, const TileView& tile) {
  const SegmentInput in = s.in;
  const int8_t* values = in.values + token * in.value_stride;
  const float* sums = in.sums + token * in.sum_stride;
  const int32_t* start = in.terms + token * in.term_stride;
  float* const sink = tile.totals[0];
  __m512 totals[tokens][blocks];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      totals[t][b] = _mm512_maskz_load_ps(tile.begun, sink + 32 * t + 16 * b);
    }
  }
  const uint8_t *codes = s.codes, *ahead = tile.ahead;
  const float* scales = s.scales;
  for (int64_t begin = 0; begin < s.columns; begin += s.piece) {
    const int64_t columns = smaller(s.piece, s.columns - begin), end = begin + columns;
    const int64_t block_bytes = block_code_bytes(columns, 8);
    int64_t k = begin;
    do {  // once, but for short activation groups
      const int64_t run = grouped ? smaller(in.run, end - k) : columns;
      DotLanes dots[tokens][blocks] = {};
      if constexpr (same_zero) {
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
          for (int b = 0; b < blocks; ++b) {
            dots[t][b] = reinterpret_cast<DotLanes>(_mm512_set1_epi32(start[t * in.term_stride]));
          }
        }
        ++start;
      }
      ahead = panel_dots(codes + block_code_bytes(k - begin, 8), block_bytes, values + k,
                         in.value_stride, smaller(run, s.used - k), ahead, s.ahead_step, dots);
      const float* group = grouped ? in.scale_at(s.first + k) : nullptr;
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b) {
        const __m512 scale = _mm512_load_ps(scales + 16 * b);
        const __m512 zero = _mm512_load_ps(scales + kZerosAfter + 16 * b);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          __m512 term = floats_of(dots[t][b]);
          if constexpr (!same_zero) {
            term = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[t * in.sum_stride]), term);
          }
          if constexpr (grouped) {
            term = _mm512_mul_ps(term, _mm512_set1_ps(group[(token + t) * in.scale_stride]));
          }
          totals[t][b] = _mm512_fmadd_ps(term, scale, totals[t][b]);
        }
      }
      ++sums;
      k += run;
    } while (k < end);
    codes += blocks * block_bytes;
    scales += ql::kStripRows;
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) _mm512_store_ps(sink + 32 * t + 16 * b, totals[t][b]);
  }
}

using Rows = float[ql::kStripRows];

// A strip at work. Totals of the segment at hand, and results of those before it, are kept for every
// token, where a tile cannot keep them to itself.
struct Strip {
  const ql::TiledWeight* weight;
  const ql::TileInput* in;
  const ql::TileOutput* out;
  int64_t index;
  bool streamed;
  Panel* panel;
  Rows *totals, *results;
};

// Stretches that the panel holds at the same time.
struct Batch {
  static constexpr int kMost = 4;
  Stretch stretches[kMost];
  int count = 0;
  int64_t columns = 0, pieces = 0;
};

template <int tokens, int blocks>
inline void multiply_tile(const Stretch& s, int64_t token, const TileView& tile) {
  with_constant<0, static_cast<int>(Kind::kFolded)>(static_cast<int>(s.kind), [&](auto number) {
    constexpr Kind kind = static_cast<Kind>(number.value);
    if constexpr (kind == Kind::kWhole || kind == Kind::kFolded) {
      whole_tile<tokens, blocks, kind == Kind::kFolded>(s, token, tile);
    } else {
      constexpr bool same_zero = kind == Kind::kSameZero || kind == Kind::kSameZeroGroups;
      constexpr bool grouped = kind == Kind::kSameZeroGroups || kind == Kind::kZerosGroups;
      panel_tile<tokens, blocks, same_zero, grouped>(s, token, tile);
    }
  });
}

// Ends a segment for tokens [first, last): totals become results, which the next segment goes on
// from, or after the last one outputs. `totals` and `results` are those of token `first` and on.
template <int blocks>
inline void end_segment(const Strip& strip, int64_t segment, int64_t first, int64_t last,
                        const Rows* totals, Rows* results) {
  const ql::TiledWeight& w = *strip.weight;
  const ql::TileOutput& out = *strip.out;
  const bool ends = segment + 1 == w.segment_count;
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
    const int64_t at = b * ql::kBlockRows, row = strip.index * ql::kStripRows + at;
    const __m512 bias = bias_of(w, out, row);
    for (int64_t t = first; t < last; ++t) {
      const __m512 before = segment ? _mm512_load_ps(results[t - first] + at) : bias;
      const __m512 total = _mm512_load_ps(totals[t - first] + at);
      const __m512 result = with_total(*strip.in, t, segment, total, before);
      if (!ends) {
        _mm512_store_ps(results[t - first] + at, result);
      } else if (strip.streamed) {
        _mm512_stream_ps(out.y + t * out.y_stride + row, result);
      } else {
        write_rows(w, out, row, t, result);
      }
    }
  }
}

// Multiplies the stretches of a batch with all tokens, in tiles of nearly the same size. `alone`:
// these are all stretches of the strip.
template <int blocks>
void multiply_batch(const Strip& strip, const Batch& batch, bool alone) {
  alignas(64) Rows totals_of_tile[kPanelTokens], results_of_tile[kPanelTokens];
  const int64_t tokens = strip.in->tokens, tiles = (tokens + kPanelTokens - 1) / kPanelTokens;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t token = i * tokens / tiles, last = (i + 1) * tokens / tiles;
    Rows* const totals = alone ? totals_of_tile : strip.totals + token;
    Rows* const results = alone ? results_of_tile : strip.results + token;
    for (int j = 0; j < batch.count; ++j) {
      const Stretch& s = batch.stretches[j];
      const uint8_t* ahead = s.ahead + i * (s.columns / kUnitColumns) * s.ahead_step;
      const TileView tile{totals, static_cast<__mmask16>(s.begins ? 0 : 0xFFFF), ahead};
      with_constant<1, kPanelTokens>(last - token, [&](auto count) {
        multiply_tile<count.value, blocks>(s, token, tile);
      });
      if (s.ends) end_segment<blocks>(strip, s.segment, token, last, totals, results);
    }
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
                      int64_t pieces, float* scales) {
  const AnyMeta reader(s);
  const int64_t bytes = block_meta_bytes(s);
  for (int64_t b = 0; b < blocks; ++b) {
    const float* factors = s.factors + row + 16 * b;
    for (int64_t p = 0; p < pieces; ++p) {
      const BlockMeta own = reader.read(meta + (p * blocks + b) * bytes, factors);
      float* to = scales + p * ql::kStripRows + 16 * b;
      _mm512_store_ps(to, own.scale);
      _mm512_store_ps(to + kZerosAfter, own.zero);
    }
  }
}

// Unpacks columns [k, k + columns) of a segment to the panel, behind what the batch has. `in` is that
// of the whole segment.
template <int blocks>
void add_stretch(const Strip& strip, int64_t segment, const SegmentInput& in, int64_t k,
                 int64_t columns, Batch& batch) {
  const ql::TileSegment& s = strip.weight->segments[segment];
  const int64_t piece = k / s.piece, pieces = (columns + s.piece - 1) / s.piece;
  const int64_t bytes = blocks * block_code_bytes(columns, s.bits);
  const int64_t meta_bytes = blocks * pieces * block_meta_bytes(s), runs = piece * (s.piece / in.run);
  const uint8_t* packed =
      s.codes + strip.index * s.codes_stride + blocks * block_code_bytes(k, s.bits);
  const uint8_t* meta =
      s.meta + strip.index * s.meta_stride + blocks * piece * block_meta_bytes(s);
  uint8_t* const codes = strip.panel->codes + batch.columns * ql::kStripRows;
  float* const scales = strip.panel->scales[batch.pieces];
  const Kind kind = kind_of(s, in.act_group);
  const bool folded = kind == Kind::kFolded, whole = folded || kind == Kind::kWhole;
  if (whole) {
    fill_whole_meta(s, meta, blocks, pieces, scales);
  } else {
    fill_meta(s, meta, strip.index * ql::kStripRows, blocks, pieces, scales);
  }
  for (int64_t line = 0; line < meta_bytes; line += 64) prefetch_to_l2(meta + meta_bytes + line);
  if (s.bits != 8) {
    with_codes(s, [&](const auto& reader) {
      using Codes = typename Bare<decltype(reader)>::Type;
      if constexpr (Codes::kPlain && Codes::kBits <= kFoldedBits) {
        if (folded) return fill_folded<blocks>(reader, packed, scales, columns, s.piece, codes);
      }
      fill_codes(reader, packed, blocks * columns / kUnitColumns, codes);
    });
  }
  const int64_t tiles = (strip.in->tokens + kPanelTokens - 1) / kPanelTokens;
  const int64_t units = tiles * (columns / kUnitColumns);
  const int64_t chunks = (s.length + ql::kChunkColumns - 1) / ql::kChunkColumns;
  Stretch& stretch = batch.stretches[batch.count++];
  stretch = {s.bits == 8 ? packed : codes,
             scales,
             s.factors + strip.index * ql::kStripRows,
             in,
             k,
             columns,
             s.piece,
             smaller(chunks * ql::kChunkColumns - k, columns),
             s.code_units,
             kind,
             segment,
             k == 0,
             k + columns == s.padded,
             packed + bytes,
             (bytes + units - 1) / units};
  stretch.in.values += k;
  stretch.in.sums += runs;
  stretch.in.terms += whole ? piece / 2 : runs;
  batch.columns += columns;
  batch.pieces += pieces;
}

template <int blocks>
void panel_blocks(const Strip& strip, const int32_t* terms) {
  const int64_t span = stretch_columns(strip.in->tokens);
  InputCursor cursor(*strip.weight, *strip.in, terms, 0);
  Batch batch;
  bool alone = true;
  for (int64_t i = 0; i < strip.weight->segment_count; ++i) {
    const ql::TileSegment& s = strip.weight->segments[i];
    const SegmentInput in = cursor.next(s);
    for (int64_t k = 0; k < s.padded; k += span) {
      const int64_t columns = smaller(span, s.padded - k);
      if (batch.columns + columns > span || batch.count == Batch::kMost) {
        alone = false;
        multiply_batch<blocks>(strip, batch, alone);
        batch = Batch();
      }
      add_stretch<blocks>(strip, i, in, k, columns, batch);
    }
  }
  multiply_batch<blocks>(strip, batch, alone);
}

inline int64_t panel_scratch_bytes(int64_t tokens) {
  return static_cast<int64_t>(sizeof(Panel)) +
         2 * tokens * ql::kStripRows * static_cast<int64_t>(sizeof(float));
}

// All of a strip's outputs, for all tokens of `in`.
void panel_strip(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 const int32_t* terms, int64_t index, uint8_t* scratch) {
  Panel* const panel = reinterpret_cast<Panel*>(scratch);
  Rows* const totals = reinterpret_cast<Rows*>(scratch + sizeof(Panel));
  const bool streamed = is_streamed(w, in, out);
  const Strip strip{&w, &in, &out, index, streamed, panel, totals, totals + in.tokens};
  with_constant<1, 2>(tile_blocks(w, index),
                      [&](auto count) { panel_blocks<count.value>(strip, terms); });
  if (streamed) _mm_sfence();  // else other threads might see that we are done before our outputs
}

}  // namespace
}  // namespace vnni
