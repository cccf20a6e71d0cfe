// int8 activations, few tokens: codes are multiplied as they are unpacked, and never stored.
//
// What limits one token is memory: the loops ask for codes well ahead (the hardware's own prefetch
// stops at every page), and four chains of VPDPBUSD hide its latency. With more tokens, every
// unpacked vector is used for all of them; a block's sums stay in registers.
#pragma once

#include "tile_avx512.h"

namespace vnni {
namespace {

constexpr int64_t kTileTokens = 8;  // that are multiplied at the same time
constexpr int64_t kPrefetchBytes = 4096;  // how far ahead codes are asked for
constexpr int64_t kMetaPrefetchBytes = 256;

inline void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

inline void prefetch_to_l2(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// How many chains of VPDPBUSD share the sums of a block and token: enough, with all blocks and tokens
// at hand, to hide its latency.
constexpr int chains_of(int tokens) {
  return tokens <= 2 ? 2 : 1;
}

// Blocks whose sums are kept in registers at the same time.
constexpr int blocks_together(int tokens) { return tokens <= 6 ? 2 : 1; }

// Dot products of `blocks` times 16 rows with some tokens over the columns of a piece.
template <int tokens, int blocks, class Codes>
inline void block_dots(const Codes& codes, const uint8_t* packed, const int8_t* values,
                       int64_t stride, int64_t columns, DotLanes (&dots)[blocks][tokens]) {
  constexpr int chains = chains_of(tokens);
  constexpr int64_t bytes = unit_bytes(Codes::kBits);
  const int64_t block_bytes = block_code_bytes(columns, Codes::kBits);
  DotLanes parts[blocks][chains][tokens] = {};
  const int8_t* const end = values + columns;
  do {
    __m512i chunks[blocks][kUnitChunks];
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      const uint8_t* from = packed + b * block_bytes;
      for (int64_t line = 0; line < bytes; line += 64) prefetch(from + kPrefetchBytes + line);
      codes.template unpack<chains>(from, chunks[b]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const __m512i four = four_values(values + t * stride + ql::kChunkColumns * c);
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) {
          DotLanes& part = parts[b][c % chains][t];
          part = dot4(part, chunks[b][c], four);
        }
      }
    }
    packed += bytes;
    values += kUnitColumns;
  } while (values < end);
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      dots[b][t] = parts[b][0][t];
#pragma GCC unroll 4
      for (int c = 1; c < chains; ++c) {
        dots[b][t] += parts[b][c][t] >> Codes::template shift_of<chains>(c);
      }
    }
  }
}

// Adds a segment's share to the totals of a strip's blocks.
template <int tokens, int blocks, class Codes, class Meta>
__attribute__((noinline)) void add_segment(const ql::TileSegment& s, const Codes& codes,
                                           const Meta& reader, const SegmentInput& in,
                                           int64_t strip, __m512 (&sums)[2][tokens]) {
  constexpr int together = blocks < blocks_together(tokens) ? blocks : blocks_together(tokens);
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t meta_bytes = block_meta_bytes(s);
  const float* factors = s.factors + strip * ql::kStripRows;
  __m512 totals[blocks][tokens];
  __builtin_memcpy(totals, sums, sizeof(totals));
  const float* piece_sums = in.sums;
  for (int64_t k = 0; k < s.padded; k += s.piece) {
    const int64_t columns = smaller(s.piece, s.padded - k);
    const float* group = in.scale_at(k);
    prefetch(meta + kMetaPrefetchBytes);
#pragma GCC unroll 2
    for (int first = 0; first < blocks; first += together) {
      DotLanes dots[together][tokens];
      block_dots(codes, packed, in.values + k, in.value_stride, columns, dots);
#pragma GCC unroll 2
      for (int b = 0; b < together; ++b) {
        const BlockMeta own = reader.read(meta, factors + ql::kBlockRows * (first + b));
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const __m512 sum = _mm512_set1_ps(piece_sums[t * in.sum_stride]);
          __m512 term = _mm512_fnmadd_ps(own.zero, sum, floats_of(dots[b][t]));
          if (group) term = _mm512_mul_ps(term, _mm512_set1_ps(group[t * in.scale_stride]));
          __m512& total = totals[first + b][t];
          total = _mm512_fmadd_ps(term, own.scale, total);
        }
        packed += block_code_bytes(columns, Codes::kBits);
        meta += meta_bytes;
      }
    }
    ++piece_sums;
  }
  __builtin_memcpy(sums, totals, sizeof(totals));
}

// All of a strip's outputs for some tokens, from `first` on.
template <int tokens>
void decode_tile(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 int64_t strip, int64_t first) {
  const int64_t blocks = tile_blocks(w, strip);
  __m512 totals[2][tokens] = {};
  InputCursor cursor(in, first);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const SegmentInput input = cursor.next(s);
    with_codes(s, [&](const auto& codes) {
      if (blocks == 1) {
        add_segment<tokens, 1>(s, codes, AnyMeta(s), input, strip, totals);
      } else if constexpr (tokens <= 2) {
        with_meta(s, [&](const auto& meta) {
          add_segment<tokens, 2>(s, codes, meta, input, strip, totals);
        });
      } else {
        add_segment<tokens, 2>(s, codes, AnyMeta(s), input, strip, totals);
      }
    });
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = strip * ql::kStripRows + b * ql::kBlockRows;
    for (int t = 0; t < tokens; ++t) store_rows(w, in, out, row, first + t, totals[b][t]);
  }
}

// All of a strip's outputs, in tiles of nearly the same number of tokens.
void decode_strip(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                  int64_t strip) {
  const int64_t tiles = (in.tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * in.tokens / tiles, last = (i + 1) * in.tokens / tiles;
    with_constant<1, kTileTokens>(
        last - first, [&](auto count) { decode_tile<count.value>(w, in, out, strip, first); });
  }
}

}  // namespace
}  // namespace vnni
