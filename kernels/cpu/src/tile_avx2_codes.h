// Codes to bytes on AVX2: what VPMADDUBSW and VPDPBUSD multiply. Eight rows at a time: byte 4*r + j
// of a vector is column j of row r of a chunk, the form of 8-bit codes in memory.
//
//   CodeBytes<bits, looked_up> bytes(segment);
//   bytes(codes, half, w)   w[c] = rows 8*half .. of chunk c = 0..3 of the 16 columns at `codes`
#pragma once

#include <immintrin.h>

#include "tile_values.h"

namespace {

inline __m256i load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

template <int bits>
struct RawBytes {
  Codes<bits> codes_of;

  void operator()(const uint8_t* codes, int half, __m256i (&w)[4]) const {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      if constexpr (8 % bits == 0) {
        const __m256i lanes = load_bytes(codes + c * bits / 8 * 64 + 32 * half);
        const __m256i mask = _mm256_set1_epi8(static_cast<int8_t>((1 << bits) - 1));
        w[c] = _mm256_and_si256(_mm256_srli_epi32(lanes, c * bits % 8), mask);
      } else {
        w[c] = fields_to_bytes<bits>(codes_of.eight_rows(codes + (8 * c + 4 * half) * bits));
      }
    }
  }
};

template <>
inline void RawBytes<8>::operator()(const uint8_t* codes, int half, __m256i (&w)[4]) const {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) w[c] = load_bytes(codes + 64 * c + 32 * half);
}

template <int bits, bool looked_up>
struct CodeBytes : RawBytes<bits> {
  explicit CodeBytes(const ql::TileSegment&) {}
};

// Integer values of e2m1.
template <>
struct CodeBytes<4, true> {
  RawBytes<4> raw;
  __m256i table;
  explicit CodeBytes(const ql::TileSegment& s) : table(ByteTables::twice(s.integer_values)) {}

  void operator()(const uint8_t* codes, int half, __m256i (&w)[4]) const {
    raw(codes, half, w);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) w[c] = _mm256_shuffle_epi8(table, w[c]);
  }
};

// Integer values of e2m2, e2m3 and e2m4: magnitudes are looked up, bits 4 and 5 of a code choosing
// between tables of 16, and their signs are applied to them.
template <int bits>
struct CodeBytes<bits, true> {
  static constexpr int kTables = 1 << (bits - 5);
  RawBytes<bits> raw;
  __m256i zero, tables[kTables];
  explicit CodeBytes(const ql::TileSegment& s) {
    zero = _mm256_set1_epi8(static_cast<int8_t>(s.integer_values[0]));
    for (int i = 0; i < kTables; ++i) {
      tables[i] = _mm256_sub_epi8(ByteTables::twice(s.integer_values + 16 * i), zero);
    }
  }

  void operator()(const uint8_t* codes, int half, __m256i (&w)[4]) const {
    raw(codes, half, w);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m256i sign = _mm256_slli_epi16(w[c], 8 - bits);  // at the top of its byte
      const __m256i signed_one = _mm256_or_si256(sign, _mm256_set1_epi8(1));
      w[c] = _mm256_add_epi8(zero, _mm256_sign_epi8(magnitude_of(w[c]), signed_one));
    }
  }

 private:
  __m256i magnitude_of(__m256i code) const {
    if constexpr (bits == 5) {
      return _mm256_shuffle_epi8(tables[0], code);
    } else if constexpr (bits == 6) {
      return of_two(tables, code);
    } else {
      const __m256i bit5 = _mm256_slli_epi16(code, 2);
      return _mm256_blendv_epi8(of_two(tables, code), of_two(tables + 2, code), bit5);
    }
  }
  static __m256i of_two(const __m256i* two, __m256i code) {
    const __m256i bit4 = _mm256_slli_epi16(code, 3);
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(two[0], code), _mm256_shuffle_epi8(two[1], code),
                              bit4);
  }
};

}  // namespace
