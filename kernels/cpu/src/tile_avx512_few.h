// int8 activations, three to eight tokens: codes are unpacked in registers, as for fewer tokens, and
// multiplied with all of them at once.
//
// What limits this is how fast activations are loaded: each is broadcast by a load of its own. So both
// blocks of a strip share the loads, their sums taking 16 registers for eight tokens, and totals,
// which are needed once for every piece, wait in memory.
#pragma once

#include "tile_avx512_decode.h"

namespace vnni {
namespace {

constexpr int kBlocks = 2;          // of a strip
constexpr int64_t kFewest = 2;      // tokens that tile_avx512_decode.h is for
constexpr int64_t kTileTokens = 8;  // that are multiplied at the same time

// Adds to `dots` the products of a strip's blocks with some tokens over the columns of a run. Blocks
// are block_bytes apart. With `folded`, codes are multiplied by `scale_pairs`.
template <int tokens, bool folded, class Codes>
inline void tile_dots(const Codes& codes, const uint8_t* packed, int64_t block_bytes,
                      const int8_t* values, int64_t stride, int64_t columns,
                      const __m512i (&scale_pairs)[kBlocks], DotLanes (&dots)[tokens][kBlocks]) {
  constexpr int64_t bytes = unit_bytes(Codes::kBits);
  const int8_t* const end = values + columns;
  do {
    __m512i chunks[kBlocks][kUnitChunks];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      if constexpr (asks_ahead(Codes::kBits, tokens)) {
        for (int64_t i = 0; i < bytes; i += 64) {
          prefetch_to_l2(packed + b * block_bytes + kCodesAhead + i);
        }
      }
      codes.template unpack<1>(packed + b * block_bytes, chunks[b]);
      if constexpr (folded) {
        for (__m512i& chunk : chunks[b]) chunk = fold(chunk, scale_pairs[b]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const __m512i four = four_values(values + t * stride + ql::kChunkColumns * c);
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) dots[t][b] = dot4(dots[t][b], chunks[b][c], four);
      }
    }
    packed += bytes;
    values += kUnitColumns;
  } while (values < end);
}

// A segment's totals of a strip's blocks.
template <int tokens, bool same_zero, class Codes>
__attribute__((noinline)) void add_few(const ql::TileSegment& s, const Codes& codes,
                                       const SegmentInput& in, int64_t strip,
                                       __m512 (&totals)[2][tokens]) {
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const float* factors = s.factors + strip * ql::kStripRows;
  const float* sums = in.sums;
  const int32_t* terms = in.terms;
  const AnyMeta reader(s);
  for (int64_t begin = 0; begin < s.padded; begin += s.piece, ++terms) {
    const int64_t end = smaller(begin + s.piece, s.padded);
    const int64_t block_bytes = block_code_bytes(end - begin, Codes::kBits);
    prefetch(meta + kMetaAhead);
    int64_t k = begin;
    do {  // once, but for short activation groups
      const int64_t run = same_zero ? end - begin : smaller(in.run, end - k);
      DotLanes dots[tokens][kBlocks];
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const __m512i start = same_zero ? _mm512_set1_epi32(terms[t * in.term_stride])
                                        : _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) dots[t][b] = reinterpret_cast<DotLanes>(start);
      }
      tile_dots<tokens, false>(codes, packed + block_code_bytes(k - begin, Codes::kBits),
                                       block_bytes, in.values + k, in.value_stride, run, {}, dots);
      const float* group = same_zero ? nullptr : in.scale_at(k);
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        const BlockMeta own =
            reader.read(meta + b * block_meta_bytes(s), factors + ql::kBlockRows * b);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          __m512 value = floats_of(dots[t][b]);
          if constexpr (!same_zero) {
            value = _mm512_fnmadd_ps(own.zero, _mm512_set1_ps(sums[t * in.sum_stride]), value);
            if (group) value = _mm512_mul_ps(value, _mm512_set1_ps(group[t * in.scale_stride]));
          }
          totals[b][t] = _mm512_fmadd_ps(value, own.scale, totals[b][t]);
        }
      }
      k += run;
      ++sums;
    } while (k < end);
    packed += kBlocks * block_bytes;
    meta += kBlocks * block_meta_bytes(s);
  }
}

// The same for whole sums.
template <int tokens, bool folded, class Codes>
__attribute__((noinline)) void add_few_whole(const ql::TileSegment& s, const Codes& codes,
                                             const SegmentInput& in, int64_t strip,
                                             __m512 (&totals)[2][tokens]) {
  constexpr int64_t kMostPairs = ql::kWholeRun / 32;
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const float* factors = s.factors + strip * ql::kStripRows;
  const int64_t meta_bytes = block_meta_bytes(s);
  const int32_t* terms = in.terms;
  const WholeReader reader(s);
  const __m512i units = _mm512_set1_epi32(s.code_units);
  for (int64_t begin = 0; begin < s.padded; begin += ql::kWholeRun) {
    const int64_t end = smaller(begin + ql::kWholeRun, s.padded);
    DotLanes sums[tokens][kBlocks] = {};
    __m512i zeros[kMostPairs][kBlocks];
    int64_t piece = 0;
    for (int64_t k = begin; k < end; k += s.piece, ++piece) {
      const int64_t columns = smaller(s.piece, end - k);
      const int64_t block_bytes = block_code_bytes(columns, Codes::kBits);
      __m512i scales[kBlocks];
      prefetch(meta + kMetaAhead);
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b, meta += meta_bytes) {
        const WholeMeta own = reader.read(meta);
        scales[b] = folded ? in_pairs(own.scale) : _mm512_mullo_epi32(own.scale, units);
        __m512i& pair = zeros[piece / 2][b];
        pair = piece % 2 ? _mm512_or_si512(pair, _mm512_slli_epi32(own.zero, 16)) : own.zero;
      }
      if constexpr (folded) {
        tile_dots<tokens, true>(codes, packed, block_bytes, in.values + k, in.value_stride,
                                        columns, scales, sums);
      } else {
        DotLanes dots[tokens][kBlocks] = {};
        tile_dots<tokens, false>(codes, packed, block_bytes, in.values + k,
                                         in.value_stride, columns, scales, dots);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
          for (int b = 0; b < kBlocks; ++b) sums[t][b] += times(dots[t][b], scales[b]);
        }
      }
      packed += kBlocks * block_bytes;
    }
    if constexpr (folded) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) sums[t][b] = times(sums[t][b], units);
      }
    }
    for (int64_t pair = 0; 2 * pair < piece; ++pair, ++terms) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const __m512i term = _mm512_set1_epi32(terms[t * in.term_stride]);
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) sums[t][b] = dot2(sums[t][b], zeros[pair][b], term);
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 factor = whole_factor(s, factors + ql::kBlockRows * b);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        totals[b][t] = _mm512_fmadd_ps(floats_of(sums[t][b]), factor, totals[b][t]);
      }
    }
  }
}

// A segment's totals, by the fastest way; on entry they are 0.
template <int tokens>
void add_few_any(const ql::TileSegment& s, const SegmentInput& in, int64_t strip,
                 __m512 (&totals)[2][tokens]) {
  const Terms terms = terms_of(s, in.act_group);
  with_codes(s, [&](const auto& codes) {
    using Codes = typename Bare<decltype(codes)>::Type;
    if constexpr (Codes::kPlain) {
      if constexpr (Codes::kBits <= kFoldedBits) {
        if (terms == Terms::kWhole && is_folded(s)) {
          return add_few_whole<tokens, true>(s, codes, in, strip, totals);
        }
      }
      if (terms == Terms::kWhole) {
        return add_few_whole<tokens, false>(s, codes, in, strip, totals);
      }
    }
    if (terms == Terms::kSameZero) {
      return add_few<tokens, true>(s, codes, in, strip, totals);
    }
    add_few<tokens, false>(s, codes, in, strip, totals);
  });
}

// All outputs of a strip of two blocks (or of any, for one or two tokens) for some tokens, from `first`
// on.
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
    if constexpr (tokens > kFewest) {
      add_few_any<tokens>(s, input, strip, totals);
    } else if (blocks == 1) {
      add_any_segment<tokens, 1>(s, input, strip, totals);
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
