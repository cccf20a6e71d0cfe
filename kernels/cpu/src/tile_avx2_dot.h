// Dot products of bytes on AVX2: unsigned codes times signed activations, exact for every width.
//
//   Dots<width>::of_block(bytes, codes, unit_bytes, columns, a, stride, dots)
//       dots[t] = products of a block with token t over `columns` columns: `bytes` reads 16 columns
//       from codes, codes + unit_bytes, ...; the tokens' activations are `stride` apart from a on
//   Dots<width>::kOffset   what was subtracted from the codes: as many times the sum of the
//                          activations is missing
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

// Four activations to every row.
inline __m256i four_activations(const int8_t* a) {
  int32_t word;
  memcpy(&word, a, sizeof(word));
  return _mm256_set1_epi32(word);
}

#ifdef __AVXVNNI__

constexpr int dots_width(int) { return 0; }

// VPDPBUSD sums four products of any codes in 32 bits.
template <int>
struct Dots {
  static constexpr int kOffset = 0;

  template <int tokens, class Bytes>
  static void of_block(const Bytes& bytes, const uint8_t* codes, int64_t unit_bytes,
                       int64_t columns, const int8_t* a, int64_t stride, IntLanes (&dots)[tokens]) {
    constexpr int chains = tokens < 3 ? 2 : 1;  // that hide the latency of a sum
    IntLanes sums[tokens][chains];
    for (int t = 0; t < tokens; ++t) {
      for (int i = 0; i < chains; ++i) sums[t][i] = broadcast_int(0);
    }
    for (int64_t k = 0; k < columns; k += 16, codes += unit_bytes) {
      __m256i low[4], high[4];
      bytes(codes, 0, low);
      bytes(codes, 1, high);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const __m256i four = four_activations(a + t * stride + k + 4 * c);
          IntLanes& sum = sums[t][c % chains];
          sum.lo = _mm256_dpbusd_avx_epi32(sum.lo, low[c], four);
          sum.hi = _mm256_dpbusd_avx_epi32(sum.hi, high[c], four);
        }
      }
    }
    for (int t = 0; t < tokens; ++t) {
      dots[t] = chains == 1 ? sums[t][0] : sums[t][0] + sums[t][chains - 1];
    }
  }
};

#else

// How many chunks' VPMADDUBSW, which sums two products in 16 bits and saturates, can be added up
// there with activations of 127; 0: not even one.
constexpr int dots_width(int largest_code) {
  const int fits = 32767 / (2 * 127 * largest_code);
  return fits >= 4 ? 4 : fits;
}

template <int chunks>
struct Products {
  static constexpr int kOffset = 0;

  static __m256i of_unit(const __m256i (&w)[4], const int8_t* a, __m256i sum) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c += chunks) {
      __m256i pairs = _mm256_maddubs_epi16(w[c], four_activations(a + 4 * c));
#pragma GCC unroll 4
      for (int i = c + 1; i < c + chunks; ++i) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i], four_activations(a + 4 * i)));
      }
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
  }
};

// 8-bit codes less 128, as magnitude and sign; the sign moves to the activation. 2 * 128 * 127
// fits.
template <>
struct Products<0> {
  static constexpr int kOffset = 128;

  static __m256i of_unit(const __m256i (&w)[4], const int8_t* a, __m256i sum) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m256i code = _mm256_xor_si256(w[c], _mm256_set1_epi8(INT8_MIN));
      const __m256i signed_a = _mm256_sign_epi8(four_activations(a + 4 * c), code);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), signed_a);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
  }
};

// Eight rows after the other eight: sums and codes of a unit then fit the 16 registers.
template <int width>
struct Dots {
  static constexpr int kOffset = Products<width>::kOffset;

  template <int tokens, class Bytes>
  static void of_block(const Bytes& bytes, const uint8_t* codes, int64_t unit_bytes,
                       int64_t columns, const int8_t* a, int64_t stride, IntLanes (&dots)[tokens]) {
    __m256i low[tokens], high[tokens];
    of_half(bytes, codes, 0, unit_bytes, columns, a, stride, low);
    of_half(bytes, codes, 1, unit_bytes, columns, a, stride, high);
    for (int t = 0; t < tokens; ++t) dots[t] = {low[t], high[t]};
  }

 private:
  template <int tokens, class Bytes>
  static void of_half(const Bytes& bytes, const uint8_t* codes, int half, int64_t unit_bytes,
                      int64_t columns, const int8_t* a, int64_t stride, __m256i (&sums)[tokens]) {
    for (int t = 0; t < tokens; ++t) sums[t] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns; k += 16, codes += unit_bytes) {
      __m256i w[4];
      bytes(codes, half, w);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        sums[t] = Products<width>::of_unit(w, a + t * stride + k, sums[t]);
      }
    }
  }
};

#endif

}  // namespace
