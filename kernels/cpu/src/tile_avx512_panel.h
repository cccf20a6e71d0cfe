// int8 activations, many tokens: a stretch of a strip's columns is unpacked once, into a panel that
// stays in the cache, and multiplied with six tokens at a time; then comes the next stretch.
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
  const float* scales = s.panel->scales[0];
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
                         in.value_stride, smaller(run, s.used - k), ahead, tile.ahead_step, dots);
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

// What a stretch's tiles are multiplied by: Terms, with scales of activation groups or without, or
// with whole sums folded.
enum class Kind { kSameZero, kZeros, kSameZeroGroups, kZerosGroups, kWhole, kFolded };

inline Kind kind_of(const ql::TileSegment& s, int64_t act_group) {
  const Terms terms = terms_of(s, act_group);
  if (terms == Terms::kWhole) return is_folded(s) ? Kind::kFolded : Kind::kWhole;
  if (terms == Terms::kSameZero) return act_group > 0 ? Kind::kSameZeroGroups : Kind::kSameZero;
  return act_group > 0 ? Kind::kZerosGroups : Kind::kZeros;
}

// What becomes of a segment's totals in a strip: they end up in `results`, which the next segment
// goes on from, or after the last one in the output.
struct Ending {
  const ql::TiledWeight* weight;
  const ql::TileInput* in;
  const ql::TileOutput* out;
  int64_t segment;
  int64_t row;  // the strip's first
  bool streamed;
  float (*totals)[ql::kStripRows];   // of every token, of this segment
  float (*results)[ql::kStripRows];  // of every token, of those before it
};

// Ends a segment for tokens [first, last), while their totals are in the L1 cache.
template <int blocks>
inline void end_segment(const Ending& e, int64_t first, int64_t last) {
  const bool ends = e.segment + 1 == e.weight->segment_count;
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
    const int64_t row = e.row + b * ql::kBlockRows, at = b * ql::kBlockRows;
    const __m512 bias = bias_of(*e.weight, *e.out, row);
    for (int64_t t = first; t < last; ++t) {
      const __m512 before = e.segment ? _mm512_load_ps(e.results[t] + at) : bias;
      const __m512 total = _mm512_load_ps(e.totals[t] + at);
      const __m512 result = with_total(*e.in, t, e.segment, total, before);
      if (!ends) {
        _mm512_store_ps(e.results[t] + at, result);
      } else if (e.streamed) {
        _mm512_stream_ps(e.out->y + t * e.out->y_stride + row, result);
      } else {
        write_rows(*e.weight, *e.out, row, t, result);
      }
    }
  }
}

// Multiplies a stretch with all tokens, in tiles of nearly the same size.
template <int blocks, Kind kind>
void panel_tiles(const Stretch& s, const Ending& ending, bool first_stretch, bool last_stretch,
                 const uint8_t* next, int64_t next_bytes) {
  const int64_t tokens = ending.in->tokens;
  const int64_t tiles = (tokens + kPanelTokens - 1) / kPanelTokens;
  const int64_t units = s.columns / kUnitColumns;
  const int64_t step = (next_bytes + tiles * units - 1) / (tiles * units);
  const __mmask16 begun = first_stretch ? 0 : 0xFFFF;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t token = i * tokens / tiles, last = (i + 1) * tokens / tiles;
    const TileView tile{ending.totals + token, begun, next + i * units * step, step};
    with_constant<1, kPanelTokens>(last - token, [&](auto count) {
      if constexpr (kind == Kind::kWhole || kind == Kind::kFolded) {
        whole_tile<count.value, blocks, kind == Kind::kFolded>(s, token, tile);
      } else {
        constexpr bool same_zero = kind == Kind::kSameZero || kind == Kind::kSameZeroGroups;
        constexpr bool grouped = kind == Kind::kSameZeroGroups || kind == Kind::kZerosGroups;
        panel_tile<count.value, blocks, same_zero, grouped>(s, token, tile);
      }
    });
    if (last_stretch) end_segment<blocks>(ending, token, last);
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
void panel_segment(const ql::TileSegment& s, const SegmentInput& in, const Ending& ending,
                   int64_t strip, Panel& panel) {
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t span = stretch_columns(ending.in->tokens), step = span / s.piece;
  const Kind kind = kind_of(s, in.act_group);
  const bool folded = kind == Kind::kFolded, whole = folded || kind == Kind::kWhole;
  for (int64_t k = 0, piece = 0; k < s.padded; k += span, piece += step) {
    const int64_t columns = smaller(span, s.padded - k);
    const int64_t pieces = smaller(step, s.pieces - piece);
    const int64_t bytes = blocks * block_code_bytes(columns, s.bits);
    Stretch stretch{panel.codes, &panel, s.factors + strip * ql::kStripRows,
                    in,          k,      columns,
                    s.piece,     0,      s.code_units};
    const int64_t units = (s.length + kUnitColumns - 1) / kUnitColumns;
    stretch.used = smaller(units * kUnitColumns - k, columns);
    stretch.in.values += k;
    const int64_t runs = piece * (s.piece / in.run);
    stretch.in.sums += runs;
    stretch.in.terms += whole ? piece / 2 : runs;
    if (whole) {
      fill_whole_meta(s, meta, blocks, pieces, panel);
    } else {
      fill_meta(s, meta, strip * ql::kStripRows, blocks, pieces, panel);
    }
    if (s.bits == 8) {
      stretch.codes = packed;
    } else {
      with_codes(s, [&](const auto& codes) {
        using Codes = typename Bare<decltype(codes)>::Type;
        if constexpr (Codes::kPlain && Codes::kBits <= kFoldedBits) {
          if (folded) {
            return fill_folded<blocks>(codes, packed, panel, columns, s.piece, panel.codes);
          }
        }
        fill_codes(codes, packed, blocks * columns / kUnitColumns, panel.codes);
      });
    }
    packed += bytes;
    const int64_t meta_bytes = blocks * pieces * block_meta_bytes(s);
    meta += meta_bytes;
    for (int64_t line = 0; line < meta_bytes; line += 64) prefetch_to_l2(meta + line);
    with_constant<0, static_cast<int>(Kind::kFolded)>(static_cast<int>(kind), [&](auto number) {
      panel_tiles<blocks, static_cast<Kind>(number.value)>(stretch, ending, k == 0,
                                                           k + span >= s.padded, packed, bytes);
    });
  }
}

inline int64_t panel_scratch_bytes(int64_t tokens) {
  return static_cast<int64_t>(sizeof(Panel)) +
         2 * tokens * ql::kStripRows * static_cast<int64_t>(sizeof(float));
}

// All of a strip's outputs, for all tokens of `in`.
void panel_strip(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 const int32_t* terms, int64_t strip, uint8_t* scratch) {
  Panel& panel = *reinterpret_cast<Panel*>(scratch);
  using Rows = float[ql::kStripRows];
  Rows* const totals = reinterpret_cast<Rows*>(scratch + sizeof(Panel));
  const bool streamed = is_streamed(w, in, out);
  Ending ending{&w,       &in,    &out, 0, strip * ql::kStripRows,
                streamed, totals, totals + in.tokens};
  InputCursor cursor(w, in, terms, 0);
  for (; ending.segment < w.segment_count; ++ending.segment) {
    const ql::TileSegment& s = w.segments[ending.segment];
    const SegmentInput input = cursor.next(s);
    with_constant<1, 2>(tile_blocks(w, strip), [&](auto count) {
      panel_segment<count.value>(s, input, ending, strip, panel);
    });
  }
  if (streamed) _mm_sfence();  // else other threads might see that we are done before our outputs
}

}  // namespace
}  // namespace vnni
