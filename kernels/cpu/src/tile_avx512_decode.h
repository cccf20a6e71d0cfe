// int8 activations, one or two tokens: codes are multiplied as they are unpacked, and never stored.
//
// This is limited by memory, so what matters is to read it in order and to need few instructions per
// byte.
#pragma once

#include "tile_avx512.h"

namespace vnni {
namespace {

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
constexpr int chains_of(int tokens) { return tokens == 1 ? 4 : 2; }

// Adds to `dots` the products of 16 rows with some tokens over the columns of a run. One block after
// the other: memory likes to be read in order.
template <int tokens, class Codes>
inline void block_dots(const Codes& codes, const uint8_t* packed, const int8_t* values,
                       int64_t stride, int64_t columns, DotLanes (&dots)[tokens]) {
  constexpr int chains = chains_of(tokens);
  constexpr int64_t bytes = unit_bytes(Codes::kBits);
  DotLanes parts[chains][tokens] = {};
  __builtin_memcpy(parts[0], dots, sizeof(dots));
  const int8_t* const end = values + columns;
  do {
    if constexpr (asks_ahead(Codes::kBits, tokens)) {
      for (int64_t i = 0; i < bytes; i += 64) prefetch_to_l2(packed + kCodesAhead + i);
    }
    __m512i chunks[kUnitChunks];
    codes.template unpack<chains>(packed, chunks);
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
#pragma GCC unroll 2
      for (int t = 0; t < tokens; ++t) {
        DotLanes& part = parts[c % chains][t];
        part = dot4(part, chunks[c], four_values(values + t * stride + ql::kChunkColumns * c));
      }
    }
    packed += bytes;
    values += kUnitColumns;
  } while (values < end);
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
    dots[t] = parts[0][t];
#pragma GCC unroll 4
    for (int c = 1; c < chains; ++c) {
      dots[t] += parts[c][t] >> Codes::template shift_of<chains>(c);
    }
  }
}

// A segment's totals of a strip's blocks.
template <int tokens, int blocks, bool same_zero, class Codes, class Meta>
__attribute__((noinline)) void add_segment(const ql::TileSegment& s, const Codes& codes,
                                           const Meta& reader, const SegmentInput& in,
                                           int64_t strip, __m512 (&sums)[2][tokens]) {
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t meta_bytes = block_meta_bytes(s);
  const float* factors = s.factors + strip * ql::kStripRows;
  __m512 totals[blocks][tokens] = {};
  const float* piece_sums = in.sums;
  const int32_t* term = in.terms;
  for (int64_t begin = 0; begin < s.padded; begin += s.piece, ++term) {
    const int64_t end = smaller(begin + s.piece, s.padded);
    const float* next_sums = piece_sums;
    prefetch(meta + kMetaAhead);
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b, meta += meta_bytes) {
      next_sums = piece_sums;
      int64_t k = begin;
      do {  // once, but for short activation groups
        const int64_t columns = same_zero ? end - begin : smaller(in.run, end - k);
        const float* group = same_zero ? nullptr : in.scale_at(k);
        DotLanes dots[tokens];
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const __m512i start = same_zero ? _mm512_set1_epi32(term[t * in.term_stride])
                                          : _mm512_setzero_si512();
          dots[t] = reinterpret_cast<DotLanes>(start);
        }
        block_dots(codes, packed, in.values + k, in.value_stride, columns, dots);
        const BlockMeta own = reader.read(meta, factors + ql::kBlockRows * b);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          __m512 value = floats_of(dots[t]);
          if constexpr (!same_zero) {
            const __m512 sum = _mm512_set1_ps(next_sums[t * in.sum_stride]);
            value = _mm512_fnmadd_ps(own.zero, sum, value);
            if (group) value = _mm512_mul_ps(value, _mm512_set1_ps(group[t * in.scale_stride]));
          }
          totals[b][t] = _mm512_fmadd_ps(value, own.scale, totals[b][t]);
        }
        packed += block_code_bytes(columns, Codes::kBits);
        k += columns;
        ++next_sums;
      } while (k < end);
    }
    piece_sums = next_sums;
  }
  __builtin_memcpy(sums, totals, sizeof(totals));
}

// Adds the piece at column k of each block to whole sums: dot products to `sums`, which need
// code_units yet, zeros to `zeros`, which need zero_units. `half`: which one of a pair it is.
template <int half, int tokens, int blocks, class Codes>
inline const uint8_t* add_whole_piece(const ql::TileSegment& s, const Codes& codes,
                                      const WholeReader& reader, const SegmentInput& in,
                                      const uint8_t* packed, const uint8_t* meta, int64_t k,
                                      DotLanes (&sums)[blocks][tokens],
                                      DotLanes (&zeros)[blocks][tokens]) {
  const int64_t columns = smaller(s.piece, s.padded - k);
  const int32_t* terms = in.terms + k / s.piece / 2;
  prefetch(meta + kMetaAhead);
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
    DotLanes dots[tokens] = {};
    block_dots(codes, packed, in.values + k, in.value_stride, columns, dots);
    const WholeMeta own = reader.read_codes(meta + b * block_meta_bytes(s));
    const __m512i zero = half ? _mm512_slli_epi32(own.zero, 16) : own.zero;
#pragma GCC unroll 2
    for (int t = 0; t < tokens; ++t) {
      const __m512i pair = _mm512_set1_epi32(terms[t * in.term_stride]);
      sums[b][t] += times(dots[t], own.scale);
      zeros[b][t] = dot2(zeros[b][t], zero, pair);
    }
    packed += block_code_bytes(columns, Codes::kBits);
  }
  return packed;
}

// add_segment for whole sums.
template <int tokens, int blocks, class Codes>
__attribute__((noinline)) void add_whole_segment(const ql::TileSegment& s, const Codes& codes,
                                                 const SegmentInput& in, int64_t strip,
                                                 __m512 (&sums)[2][tokens]) {
  const uint8_t* packed = s.codes + strip * s.codes_stride;
  const uint8_t* meta = s.meta + strip * s.meta_stride;
  const int64_t meta_step = blocks * block_meta_bytes(s);
  const WholeReader reader(s);
  const __m512i units = _mm512_set1_epi32(s.code_units);
  const __m512i zero_units = _mm512_set1_epi32(WholeReader::units_of_zeros(s));
  __m512 totals[blocks][tokens] = {};
  for (int64_t run = 0; run < s.padded; run += ql::kWholeRun) {
    const int64_t end = smaller(run + ql::kWholeRun, s.padded);
    DotLanes whole[blocks][tokens] = {}, zeros[blocks][tokens] = {};
    for (int64_t k = run; k < end; k += 2 * s.piece, meta += 2 * meta_step) {
      packed = add_whole_piece<0>(s, codes, reader, in, packed, meta, k, whole, zeros);
      if (k + s.piece < end) {
        packed = add_whole_piece<1>(s, codes, reader, in, packed, meta + meta_step, k + s.piece,
                                    whole, zeros);
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      const __m512 factor =
          whole_factor(s, s.factors + strip * ql::kStripRows + ql::kBlockRows * b);
#pragma GCC unroll 2
      for (int t = 0; t < tokens; ++t) {
        const DotLanes sum = times(whole[b][t], units) - times(zeros[b][t], zero_units);
        totals[b][t] = _mm512_fmadd_ps(floats_of(sum), factor, totals[b][t]);
      }
    }
  }
  __builtin_memcpy(sums, totals, sizeof(totals));
}

// A segment's totals, by the fastest way.
template <int tokens, int blocks>
void add_any_segment(const ql::TileSegment& s, const SegmentInput& in, int64_t strip,
                     __m512 (&totals)[2][tokens]) {
  const Terms terms = terms_of(s, in.act_group);
  with_codes(s, [&](const auto& codes) {
    if constexpr (Bare<decltype(codes)>::Type::kPlain) {
      if (terms == Terms::kWhole) {
        return add_whole_segment<tokens, blocks>(s, codes, in, strip, totals);
      }
      if (terms == Terms::kSameZero && s.scale_kind == ql::SCALE_F16) {
        return add_segment<tokens, blocks, true>(s, codes, HalfMeta(s), in, strip, totals);
      }
    }
    add_segment<tokens, blocks, false>(s, codes, AnyMeta(s), in, strip, totals);
  });
}

}  // namespace
}  // namespace vnni
