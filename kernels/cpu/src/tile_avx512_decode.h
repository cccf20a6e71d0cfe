// int8 activations, up to eight tokens: codes are multiplied as they are unpacked, and never stored.
//
// One or two tokens are limited by memory, so what matters is to read it in order and to need few
// instructions per byte; eight by VPDPBUSD, so that its pipes should do nothing else. Blocks go one
// after the other, which leaves registers for their totals. An activation is then loaded once for
// each block, but a broadcast loads four bytes only, and two of them go with each VPDPBUSD.
#pragma once

#include "tile_avx512.h"

namespace vnni {
namespace {

constexpr int64_t kFewest = 2;      // tokens for which a strip may have one block
constexpr int64_t kTileTokens = 8;  // that are multiplied at the same time, at most
constexpr int64_t kCodesAhead = 8192, kMetaAhead = 256;  // bytes

inline void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

inline void prefetch_to_l2(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// Whether to ask for codes ahead of their use. Where a core takes them slower than memory can give
// them, this hides what the hardware's prefetch does not (it begins anew with every page); where it
// takes them faster, the additional requests cost more than they bring. Measured on Zen 4.
constexpr bool asks_ahead(int bits, int tokens) {
  return bits < (tokens <= 2 ? 4 : 2 * tokens);
}

// Chains of VPDPBUSD that share the sums of a token, to hide its latency. They are added at the end of
// a run, which costs more than they bring where runs are as short as activation groups.
constexpr int chains_of(int tokens, bool grouped) {
  if (tokens == 1) return 4;
  return tokens <= (grouped ? 3 : 6) ? 2 : 1;
}

// Adds to `dots` the products of 16 rows with some tokens over the columns of a run. One block after
// the other: memory likes to be read in order.
template <int chains, int tokens, class Codes>
inline void block_dots(const Codes& codes, const uint8_t* packed, const int8_t* values,
                       int64_t stride, int64_t columns, DotLanes (&dots)[tokens]) {
  constexpr int64_t bytes = unit_bytes(Codes::kBits);
  DotLanes others[chains][tokens] = {};  // the first is not used: it is `dots`
  const int8_t* const end = values + columns;
  do {
    if constexpr (asks_ahead(Codes::kBits, tokens)) {
      for (int64_t i = 0; i < bytes; i += 64) prefetch_to_l2(packed + kCodesAhead + i);
    }
    __m512i chunks[kUnitChunks];
    codes.template unpack<chains>(packed, chunks);
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        DotLanes& sums = c % chains ? others[c % chains][t] : dots[t];
        sums = dot4(sums, chunks[c], four_values(values + t * stride + ql::kChunkColumns * c));
      }
    }
    packed += bytes;
    values += kUnitColumns;
  } while (values < end);
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int c = 1; c < chains; ++c) {
      dots[t] += others[c][t] >> Codes::template shift_of<chains>(c);
    }
  }
}

// Adds a run's share to the totals of a block: `dots` times the scale. `sum` and `group` are of the
// first token.
template <int tokens, bool same_zero, bool grouped>
inline void add_run(const SegmentInput& in, const DotLanes (&dots)[tokens], const BlockMeta& own,
                    const float* sum, const float* group, __m512 (&totals)[tokens]) {
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    __m512 value = floats_of(dots[t]);
    if constexpr (!same_zero) {
      value = _mm512_fnmadd_ps(own.zero, _mm512_set1_ps(sum[t * in.sum_stride]), value);
    }
    if constexpr (grouped) {
      value = _mm512_mul_ps(value, _mm512_set1_ps(group[t * in.scale_stride]));
    }
    totals[t] = _mm512_fmadd_ps(value, own.scale, totals[t]);
  }
}

// What the dot products of a run start from: 0, or where all rows have the same zero its share.
template <int tokens, bool same_zero>
inline void start_run(const SegmentInput& in, const int32_t* term, DotLanes (&dots)[tokens]) {
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    dots[t] = reinterpret_cast<DotLanes>(same_zero ? _mm512_set1_epi32(term[t * in.term_stride])
                                                   : _mm512_setzero_si512());
  }
}

// A segment's totals of a strip's blocks.
template <int tokens, int blocks, bool same_zero, bool grouped, class Codes, class Meta>
__attribute__((noinline)) void add_segment(const ql::TileSegment& s, const Codes& codes,
                                           const Meta& reader, const SegmentInput& in,
                                           int64_t strip, __m512 (&sums)[2][tokens]) {
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t meta_bytes = block_meta_bytes(s), padded = s.padded, piece = s.piece;
  const float* factors = s.factors + strip * ql::kStripRows;
  const int8_t* values = in.values;
  __m512 totals[blocks][tokens] = {};
  int64_t run = 0;
  for (int64_t begin = 0; begin < padded; begin += piece) {
    const int64_t columns = smaller(piece, padded - begin);
    const int64_t runs = grouped ? (columns + in.run - 1) / in.run : 1;
    prefetch(meta + kMetaAhead);
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b, meta += meta_bytes) {
      const BlockMeta own = reader.read(meta, factors + ql::kBlockRows * b);
      for (int64_t i = 0, k = 0; i < runs; ++i) {  // once, but for short activation groups
        const int64_t some = grouped ? smaller(in.run, columns - k) : columns;
        DotLanes dots[tokens];
        start_run<tokens, same_zero>(in, in.terms + run + i, dots);
        block_dots<chains_of(tokens, grouped)>(codes, packed, values + k, in.value_stride, some,
                                               dots);
        add_run<tokens, same_zero, grouped>(in, dots, own, in.sums + run + i,
                                            grouped ? in.scale_at(begin + k) : nullptr, totals[b]);
        packed += block_code_bytes(some, Codes::kBits);
        k += some;
      }
    }
    values += columns;
    run += runs;
  }
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sums[b][t] = totals[b][t];
  }
}

// add_segment for whole sums. code_units and zero_units are left to the end of a run.
template <int tokens, int blocks, class Codes>
__attribute__((noinline)) void add_whole_segment(const ql::TileSegment& s, const Codes& codes,
                                                 const SegmentInput& in, int64_t strip,
                                                 __m512 (&totals)[2][tokens]) {
  constexpr int64_t kMostPairs = ql::kWholeRun / 32;
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t meta_bytes = block_meta_bytes(s);
  const int32_t* terms = in.terms;
  const WholeReader reader(s);
  const __m512i units = _mm512_set1_epi32(s.code_units);
  const __m512i zero_units = _mm512_set1_epi32(WholeReader::units_of_zeros(s));
  for (int64_t begin = 0; begin < s.padded; begin += ql::kWholeRun) {
    const int64_t end = smaller(begin + ql::kWholeRun, s.padded);
    DotLanes sums[blocks][tokens] = {};
    __m512i zeros[kMostPairs][blocks];
    int64_t piece = 0;
    for (int64_t k = begin; k < end; k += s.piece, ++piece) {
      const int64_t columns = smaller(s.piece, end - k);
      prefetch(meta + kMetaAhead);
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b, meta += meta_bytes) {
        DotLanes dots[tokens] = {};
        block_dots<chains_of(tokens, false)>(codes, packed, in.values + k, in.value_stride, columns,
                                             dots);
        packed += block_code_bytes(columns, Codes::kBits);
        const WholeMeta own = reader.read_codes(meta);
        __m512i& pair = zeros[piece / 2][b];
        pair = piece % 2 ? _mm512_or_si512(pair, _mm512_slli_epi32(own.zero, 16)) : own.zero;
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) sums[b][t] += times(dots[t], own.scale);
      }
    }
    const int64_t pairs = (piece + 1) / 2;
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      DotLanes lost[tokens] = {};
      for (int64_t pair = 0; pair < pairs; ++pair) {
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const __m512i term = _mm512_set1_epi32(terms[t * in.term_stride + pair]);
          lost[t] = dot2(lost[t], zeros[pair][b], term);
        }
      }
      const __m512 factor =
          whole_factor(s, s.factors + strip * ql::kStripRows + ql::kBlockRows * b);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const DotLanes sum = times(sums[b][t], units) - times(lost[t], zero_units);
        totals[b][t] = _mm512_fmadd_ps(floats_of(sum), factor, totals[b][t]);
      }
    }
    terms += pairs;
  }
}

// A segment's totals, by the fastest way.
template <int tokens, int blocks>
void add_any_segment(const ql::TileSegment& s, const SegmentInput& in, int64_t strip,
                     __m512 (&totals)[2][tokens]) {
  const Terms terms = terms_of(s, in.act_group);
  with_codes(s, [&](const auto& codes) {
    with_constant<0, 1>(in.scales ? 1 : 0, [&](auto grouped) {
      if constexpr (Bare<decltype(codes)>::Type::kPlain) {
        if constexpr (!grouped.value) {
          if (terms == Terms::kWhole) {
            return add_whole_segment<tokens, blocks>(s, codes, in, strip, totals);
          }
        }
        if (terms == Terms::kSameZero && s.scale_kind == ql::SCALE_F16) {
          return add_segment<tokens, blocks, true, grouped.value>(s, codes, HalfMeta(s), in, strip,
                                                                  totals);
        }
        add_segment<tokens, blocks, false, grouped.value>(s, codes, AnyMeta(s), in, strip, totals);
      } else {
        add_segment<tokens, blocks, true, grouped.value>(s, codes, AnyMeta(s), in, strip, totals);
      }
    });
  });
}

// All outputs of a strip for some tokens, from `first` on: of two blocks, or of any for one or two
// tokens.
template <int tokens>
void decode_tile(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 const int32_t* terms, int64_t strip, int64_t first) {
  const int64_t blocks = tile_blocks(w, strip), row = strip * ql::kStripRows;
  __m512 results[2][tokens];
  for (int64_t b = 0; b < blocks; ++b) {
    for (__m512& result : results[b]) result = bias_of(w, out, row + b * ql::kBlockRows);
  }
  InputCursor cursor(w, in, terms, first);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const SegmentInput input = cursor.next(s);
    __m512 totals[2][tokens] = {};
    if constexpr (tokens <= kFewest) {
      if (blocks == 1) {
        add_any_segment<tokens, 1>(s, input, strip, totals);
      } else {
        add_any_segment<tokens, 2>(s, input, strip, totals);
      }
    } else {
      add_any_segment<tokens, 2>(s, input, strip, totals);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      for (int t = 0; t < tokens; ++t) {
        results[b][t] = with_total(in, first + t, i, totals[b][t], results[b][t]);
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int t = 0; t < tokens; ++t) {
      write_rows(w, out, row + b * ql::kBlockRows, first + t, results[b][t]);
    }
  }
}

// All of a strip's outputs, in tiles of nearly the same number of tokens.
void decode_strip(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                  const int32_t* terms, int64_t strip) {
  const int64_t tiles = (in.tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * in.tokens / tiles, last = (i + 1) * in.tokens / tiles;
    with_constant<1, kTileTokens>(
        last - first, [&](auto count) { decode_tile<count.value>(w, in, out, terms, strip, first); });
  }
}

}  // namespace
}  // namespace vnni
