// Dot products of bytes on AVX2: unsigned codes times signed activations, exact for every width.
//
//   Dots<width>::of_block(bytes, codes, unit_bytes, columns, a, stride, dots)
//       dots[t] = products of a block with token t over `columns` columns: `bytes` reads 16 columns
//       from codes, codes + unit_bytes, ...; the tokens' activations are `stride` apart from a on
//   Dots<width>::kOffset   what of_block subtracts from the codes: as many times the sum of the
//                          activations is missing
//   Dots<width>::to_panel(w, half, panel)
//       writes four chunks of eight rows to a panel, which takes kPlanes * 64 bytes for a chunk
//   Dots<width>::of_panel<tokens>(panel, columns, run, a, stride, dots)
//       dots[r * tokens + t] = the whole products of run r, of `run` columns, with token t
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "tile_avx2_codes.h"

namespace {

// Four activations to every row.
inline __m256i four_activations(const int8_t* a) {
  int32_t word;
  memcpy(&word, a, sizeof(word));
  return _mm256_set1_epi32(word);
}

inline void store_bytes(uint8_t* to, __m256i bytes) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes);
}

// Bytes as they are: chunk by chunk, rows 0..7 and 8..15.
struct PlainPanel {
  static constexpr int kPlanes = 1;

  static void to_panel(const __m256i (&w)[4], int half, uint8_t* panel) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) store_bytes(panel + 64 * c + 32 * half, w[c]);
  }
};

#ifdef __AVXVNNI__

constexpr int kInt8Tokens = 6;  // at once, from a panel: twelve sums
constexpr int kByteTokens = 4;  // at most without one, of 8-bit codes

constexpr int dots_width(int) { return 0; }

// VPDPBUSD sums four products of any codes in 32 bits.
template <int>
struct Dots : PlainPanel {
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

  template <int tokens>
  static void of_panel(const uint8_t* panel, int64_t columns, int64_t run, const int8_t* a,
                       int64_t stride, IntLanes* dots) {
    for (int64_t k = 0; k < columns; k += run, panel += run * kLanes, dots += tokens) {
      IntLanes own[tokens];
      of_block(RawBytes<8>(), panel, 256, smaller_of(run, columns - k), a + k, stride, own);
      for (int t = 0; t < tokens; ++t) dots[t] = own[t];
    }
  }
};

#else

constexpr int kInt8Tokens = 4;  // at once, from a panel: eight sums of 16 bits
constexpr int kByteTokens = 8;  // at most without one, of 8-bit codes

// How many chunks' VPMADDUBSW, which sums two products in 16 bits and saturates, can be added up
// there with activations of 127: a power of two up to the 32 of 128 columns; 0: not even one.
constexpr int dots_width(int largest_code) {
  const int fits = 32767 / (2 * 127 * largest_code);
  int width = 32;
  while (width > fits) width /= 2;
  return width;
}

inline __m256i in_32_bits(__m256i pairs) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Sums in the order they are written in: a compiler that may choose adds up products in trees, for
// which there are no registers.
inline __m256i plus_products(__m256i pairs, __m256i w, __m256i four) {
  __m256i sum = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, four));
  asm("" : "+x"(sum));
  return sum;
}

// Adds the products of a chunk, rows 0..7 and 8..15, to 16 bit sums: a vector of codes and one of
// activations serve several products each.
template <int tokens>
inline void add_chunk(__m256i first, __m256i last, const int8_t* a, int64_t stride,
                      IntLanes (&pairs)[tokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) {
    const __m256i four = four_activations(a + t * stride);
    pairs[t] = {plus_products(pairs[t].lo, first, four), plus_products(pairs[t].hi, last, four)};
  }
}
template <int tokens>
inline void add_pairs(const IntLanes (&pairs)[tokens], IntLanes* dots) {
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) {
    dots[t] = dots[t] + IntLanes{in_32_bits(pairs[t].lo), in_32_bits(pairs[t].hi)};
  }
}

// From a panel. These are functions of their own for the registers' sake.
template <int width>
struct PanelDots : PlainPanel {
  template <int tokens>
  __attribute__((noinline)) static void of_panel(const uint8_t* panel, int64_t columns, int64_t run,
                                                 const int8_t* a, int64_t stride, IntLanes* dots) {
    for (int64_t k = 0; k < columns; dots += tokens) {
      const int64_t run_end = smaller_of(k + run, columns);
      for (int t = 0; t < tokens; ++t) dots[t] = broadcast_int(0);
      while (k < run_end) {
        const int64_t end = smaller_of(k + kColumns, run_end);
        IntLanes pairs[tokens];
        for (int t = 0; t < tokens; ++t) pairs[t] = broadcast_int(0);
        for (; k < end; k += 16, panel += 256) {
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            add_chunk(load_bytes(panel + 64 * c), load_bytes(panel + 64 * c + 32), a + k + 4 * c,
                      stride, pairs);
          }
        }
        add_pairs(pairs, dots);
      }
    }
  }

 private:
  static constexpr int64_t kColumns = 4 * width;
};

// Few chunks for sums of 16 bits: sums of 32 stay in registers. Four would fit for 5 bits, but two
// are faster.
template <int width>
struct ShortPanelDots : PlainPanel {
  template <int tokens>
  __attribute__((noinline)) static void of_panel(const uint8_t* panel, int64_t columns, int64_t run,
                                                 const int8_t* a, int64_t stride, IntLanes* dots) {
    for (int64_t k = 0; k < columns; dots += tokens) {
      const int64_t end = smaller_of(k + run, columns);
      IntLanes sums[tokens];
      for (int t = 0; t < tokens; ++t) sums[t] = broadcast_int(0);
      for (; k < end; k += 4 * width, panel += 64 * width) {
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
          IntLanes pairs = broadcast_int(0);
#pragma GCC unroll 2
          for (int c = 0; c < width; ++c) {
            const __m256i four = four_activations(a + t * stride + k + 4 * c);
            const __m256i first = load_bytes(panel + 64 * c);
            const __m256i last = load_bytes(panel + 64 * c + 32);
            pairs = {_mm256_add_epi16(pairs.lo, _mm256_maddubs_epi16(first, four)),
                     _mm256_add_epi16(pairs.hi, _mm256_maddubs_epi16(last, four))};
          }
          sums[t] = sums[t] + IntLanes{in_32_bits(pairs.lo), in_32_bits(pairs.hi)};
          asm("" : "+x"(sums[t].lo), "+x"(sums[t].hi));
        }
      }
      for (int t = 0; t < tokens; ++t) dots[t] = sums[t];
    }
  }
};

template <>
struct PanelDots<4> : ShortPanelDots<2> {};
template <>
struct PanelDots<2> : ShortPanelDots<2> {};
template <>
struct PanelDots<1> : ShortPanelDots<1> {};

// 8-bit codes as halves of four bits, two tokens at a time.
template <>
struct PanelDots<0> {
  static constexpr int kPlanes = 2;

  static void to_panel(const __m256i (&w)[4], int half, uint8_t* panel) {
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      uint8_t* to = panel + 128 * c + 32 * half;
      store_bytes(to, _mm256_and_si256(w[c], nibble));
      store_bytes(to + 64, _mm256_and_si256(_mm256_srli_epi16(w[c], 4), nibble));
    }
  }

  template <int tokens>
  static void of_panel(const uint8_t* panel, int64_t columns, int64_t run, const int8_t* a,
                       int64_t stride, IntLanes* dots) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t += 2) {
      if (t + 1 < tokens) {
        some_of_panel<2>(panel, columns, run, a + t * stride, stride, dots + t, tokens);
      } else {
        some_of_panel<1>(panel, columns, run, a + t * stride, stride, dots + t, tokens);
      }
    }
  }

 private:
  static constexpr int64_t kColumns = 4 * dots_width(15);

  static __m256i joined(__m256i low, __m256i high) {
    return _mm256_add_epi32(in_32_bits(low), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }

  // The dot products of the next run are `step` further on.
  template <int tokens>
  __attribute__((noinline)) static void some_of_panel(const uint8_t* panel, int64_t columns,
                                                      int64_t run, const int8_t* a, int64_t stride,
                                                      IntLanes* dots, int64_t step) {
    for (int64_t k = 0; k < columns; dots += step) {
      const int64_t run_end = smaller_of(k + run, columns);
      for (int t = 0; t < tokens; ++t) dots[t] = broadcast_int(0);
      while (k < run_end) {
        const int64_t end = smaller_of(k + kColumns, run_end);
        __m256i pairs[tokens][4];
        for (int t = 0; t < tokens; ++t) {
          for (int i = 0; i < 4; ++i) pairs[t][i] = _mm256_setzero_si256();
        }
        for (; k < end; k += 16, panel += 512) {
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            __m256i four[tokens];
            for (int t = 0; t < tokens; ++t) four[t] = four_activations(a + t * stride + k + 4 * c);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
              const __m256i w = load_bytes(panel + 128 * c + 32 * i);
              for (int t = 0; t < tokens; ++t) pairs[t][i] = plus_products(pairs[t][i], w, four[t]);
            }
          }
        }
        for (int t = 0; t < tokens; ++t) {
          dots[t] = dots[t] + IntLanes{joined(pairs[t][0], pairs[t][2]),
                                       joined(pairs[t][1], pairs[t][3])};
        }
      }
    }
  }
};

// The activations of a unit, each four of them to every row.
struct UnitActivations {
  __m256i four[4];
  explicit UnitActivations(const int8_t* a) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) four[c] = four_activations(a + 4 * c);
  }
};

// Of eight rows and a unit: sums of 32 bits.
template <int chunks>
struct Products {
  static constexpr int kOffset = 0;

  static __m256i of_unit(const __m256i (&w)[4], const UnitActivations& a, __m256i sum) {
    constexpr int at_once = chunks < 4 ? chunks : 4;
#pragma GCC unroll 4
    for (int c = 0; c < 4; c += at_once) {
      __m256i pairs = _mm256_maddubs_epi16(w[c], a.four[c]);
#pragma GCC unroll 4
      for (int i = c + 1; i < c + at_once; ++i) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i], a.four[i]));
      }
      sum = _mm256_add_epi32(sum, in_32_bits(pairs));
    }
    return sum;
  }
};

// 8-bit codes less 128, as magnitude and sign; the sign moves to the activation. 2 * 128 * 127
// fits.
template <>
struct Products<0> {
  static constexpr int kOffset = 128;

  static __m256i of_unit(const __m256i (&w)[4], const UnitActivations& a, __m256i sum) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m256i code = _mm256_xor_si256(w[c], _mm256_set1_epi8(INT8_MIN));
      const __m256i signed_a = _mm256_sign_epi8(a.four[c], code);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), signed_a);
      sum = _mm256_add_epi32(sum, in_32_bits(pairs));
    }
    return sum;
  }
};

// From codes: eight rows after the other eight, so that sums and codes of a unit fit the 16
// registers. Those of one token do in any case, and share its activations.
template <int width>
struct Dots : PanelDots<width> {
  static constexpr int kOffset = Products<width>::kOffset;

  template <int tokens, class Bytes>
  static void of_block(const Bytes& bytes, const uint8_t* codes, int64_t unit_bytes,
                       int64_t columns, const int8_t* a, int64_t stride, IntLanes (&dots)[tokens]) {
    if constexpr (tokens == 1) {
      dots[0] = of_token(bytes, codes, unit_bytes, columns, a);
      return;
    }
    __m256i low[tokens], high[tokens];
    of_half(bytes, codes, 0, unit_bytes, columns, a, stride, low);
    of_half(bytes, codes, 1, unit_bytes, columns, a, stride, high);
    for (int t = 0; t < tokens; ++t) dots[t] = {low[t], high[t]};
  }

 private:
  template <class Bytes>
  static IntLanes of_token(const Bytes& bytes, const uint8_t* codes, int64_t unit_bytes,
                           int64_t columns, const int8_t* a) {
    IntLanes sums = broadcast_int(0);
    for (int64_t k = 0; k < columns; k += 16, codes += unit_bytes) {
      const UnitActivations unit(a + k);
      __m256i w[4];
      bytes(codes, 0, w);
      sums.lo = Products<width>::of_unit(w, unit, sums.lo);
      bytes(codes, 1, w);
      sums.hi = Products<width>::of_unit(w, unit, sums.hi);
    }
    return sums;
  }

  template <int tokens, class Bytes>
  static void of_half(const Bytes& bytes, const uint8_t* codes, int half, int64_t unit_bytes,
                      int64_t columns, const int8_t* a, int64_t stride, __m256i (&sums)[tokens]) {
    for (int t = 0; t < tokens; ++t) sums[t] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns; k += 16, codes += unit_bytes) {
      __m256i w[4];
      bytes(codes, half, w);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        sums[t] = Products<width>::of_unit(w, UnitActivations(a + t * stride + k), sums[t]);
      }
    }
  }
};

// Of the smallest codes 16 bits hold the sums of a whole run, of all 16 rows at once.
template <>
struct Dots<32> : PanelDots<32> {
  static constexpr int kOffset = 0;

  template <int tokens, class Bytes>
  static void of_block(const Bytes& bytes, const uint8_t* codes, int64_t unit_bytes,
                       int64_t columns, const int8_t* a, int64_t stride, IntLanes (&dots)[tokens]) {
    IntLanes pairs[tokens];
    for (int t = 0; t < tokens; ++t) pairs[t] = dots[t] = broadcast_int(0);
    for (int64_t k = 0; k < columns; k += 16, codes += unit_bytes) {
      __m256i first[4], last[4];
      bytes(codes, 0, first);
      bytes(codes, 1, last);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_chunk(first[c], last[c], a + k + 4 * c, stride, pairs);
    }
    add_pairs(pairs, dots);
  }
};

#endif

}  // namespace
