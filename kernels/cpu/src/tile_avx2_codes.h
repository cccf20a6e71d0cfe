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

// Four codes side by side in each lane, from bit 0 on, to one per byte: first two to each half.
template <int bits>
inline __m256i fields_to_bytes(__m256i lanes) {
  constexpr int mask = (1 << bits) - 1;
  const __m256i moved = _mm256_slli_epi32(lanes, 16 - 2 * bits);
  const __m256i pairs = _mm256_blend_epi16(lanes, moved, 0xAA);
  const __m256i even = _mm256_and_si256(pairs, _mm256_set1_epi16(mask));
  const __m256i odd = _mm256_and_si256(_mm256_slli_epi16(pairs, 8 - bits),
                                       _mm256_set1_epi16(static_cast<int16_t>(mask << 8)));
  return _mm256_or_si256(even, odd);
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

// Integer values of e2m3: bits 4 and 5 of a code choose between four shuffles.
template <>
struct CodeBytes<6, true> {
  RawBytes<6> raw;
  __m256i table[4];
  explicit CodeBytes(const ql::TileSegment& s) {
    for (int i = 0; i < 4; ++i) table[i] = ByteTables::twice(s.integer_values + 16 * i);
  }

  void operator()(const uint8_t* codes, int half, __m256i (&w)[4]) const {
    raw(codes, half, w);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m256i bit4 = _mm256_slli_epi16(w[c], 3), bit5 = _mm256_slli_epi16(w[c], 2);
      const __m256i low = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], w[c]),
                                             _mm256_shuffle_epi8(table[1], w[c]), bit4);
      const __m256i high = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], w[c]),
                                              _mm256_shuffle_epi8(table[3], w[c]), bit4);
      w[c] = _mm256_blendv_epi8(low, high, bit5);
    }
  }
};

}  // namespace
