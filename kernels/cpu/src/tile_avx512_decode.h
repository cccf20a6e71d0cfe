// int8 activations, few tokens: codes are multiplied as they are unpacked, and never stored.
//
// One token is limited by memory, so what matters is to read it in order and to need few
// instructions per byte. With more tokens, every unpacked vector is used for all of them, and their
// sums stay in registers.
#pragma once

#include "tile_avx512.h"

namespace vnni {
namespace {

constexpr int64_t kTileTokens = 8;  // that are multiplied at the same time
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

// Chains of VPDPBUSD that share the sums of a token, to hide its latency.
constexpr int chains_of(int tokens) { return tokens == 1 ? 4 : tokens < 4 ? 2 : 1; }

// Dot products of 16 rows with some tokens over the columns of a piece. One block after the other:
// memory likes to be read in order.
template <int tokens, class Codes>
inline void block_dots(const Codes& codes, const uint8_t* packed, const int8_t* values,
                       int64_t stride, int64_t columns, DotLanes (&dots)[tokens]) {
  constexpr int chains = chains_of(tokens);
  constexpr int64_t bytes = unit_bytes(Codes::kBits);
  DotLanes parts[chains][tokens] = {};
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
        DotLanes& part = parts[c % chains][t];
        part = dot4(part, chunks[c], four_values(values + t * stride + ql::kChunkColumns * c));
      }
    }
    packed += bytes;
    values += kUnitColumns;
  } while (values < end);
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    dots[t] = parts[0][t];
#pragma GCC unroll 4
    for (int c = 1; c < chains; ++c) {
      dots[t] += parts[c][t] >> Codes::template shift_of<chains>(c);
    }
  }
}

// Adds a segment's share to the totals of a strip's blocks.
template <int tokens, int blocks, class Codes, class Meta>
__attribute__((noinline)) void add_segment(const ql::TileSegment& s, const Codes& codes,
                                           const Meta& reader, const SegmentInput& in,
                                           int64_t strip, __m512 (&sums)[2][tokens]) {
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
    prefetch(meta + kMetaAhead);
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      DotLanes dots[tokens];
      block_dots(codes, packed, in.values + k, in.value_stride, columns, dots);
      const BlockMeta own = reader.read(meta, factors + ql::kBlockRows * b);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const __m512 sum = _mm512_set1_ps(piece_sums[t * in.sum_stride]);
        __m512 term = _mm512_fnmadd_ps(own.zero, sum, floats_of(dots[t]));
        if (group) term = _mm512_mul_ps(term, _mm512_set1_ps(group[t * in.scale_stride]));
        totals[b][t] = _mm512_fmadd_ps(term, own.scale, totals[b][t]);
      }
      packed += block_code_bytes(columns, Codes::kBits);
      meta += meta_bytes;
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
