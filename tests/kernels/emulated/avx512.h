// AVX-512 for processors without it, for units that are built for testing: SIMDe's intrinsics, and
// those that it lacks. Included before everything else; `names.h`, which the test writes, calls each
// _mm512_x by the name simde_mm512_x or emulated_mm512_x.
#pragma once

#include <immintrin.h>
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

namespace {

using Vector = simde__m512;
using IntVector = simde__m512i;

template <class T, int count>
struct Elements {
  T at[count];
};

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Element by element: `To` of what `function` makes of each of `count` elements of type T.
template <class To, class T, int count, class From, class Function>
inline To of_each(const From& from, const Function& function) {
  const auto elements = bits_of<Elements<T, count>>(from);
  Elements<decltype(function(elements.at[0])), count> made;
  for (int i = 0; i < count; ++i) made.at[i] = function(elements.at[i]);
  return bits_of<To>(made);
}

template <class T>
struct Cast {
  template <class From>
  T operator()(From from) const {
    return static_cast<T>(from);
  }
};

inline __m256i emulated_mm512_cvtepi32_epi16(IntVector a) {
  return of_each<__m256i, int32_t, 16>(a, Cast<int16_t>());
}
inline Vector emulated_mm512_cvtepi32_ps(IntVector a) {
  return of_each<Vector, int32_t, 16>(a, Cast<float>());
}
inline IntVector emulated_mm512_cvtepi8_epi32(__m128i a) {
  return of_each<IntVector, int8_t, 16>(a, Cast<int32_t>());
}
inline IntVector emulated_mm512_cvtepu8_epi32(__m128i a) {
  return of_each<IntVector, uint8_t, 16>(a, Cast<int32_t>());
}
inline IntVector emulated_mm512_cvtepu16_epi32(__m256i a) {
  return of_each<IntVector, uint16_t, 16>(a, Cast<int32_t>());
}
inline Vector emulated_mm512_cvtph_ps(__m256i a) {
  return of_each<Vector, uint16_t, 16>(a, [](uint16_t half) { return _cvtsh_ss(half); });
}
inline IntVector emulated_mm512_cvtps_epi32(Vector a) {
  return of_each<IntVector, float, 16>(a, [](float x) { return _mm_cvtss_si32(_mm_set_ss(x)); });
}
inline IntVector emulated_mm512_srai_epi32(IntVector a, int count) {
  return of_each<IntVector, int32_t, 16>(a, [=](int32_t x) { return x >> (count < 32 ? count : 31); });
}
inline Vector emulated_mm512_permute_ps(Vector a, int control) {
  const auto from = bits_of<Elements<float, 16>>(a);
  Elements<float, 16> to;
  for (int i = 0; i < 16; ++i) to.at[i] = from.at[i / 4 * 4 + (control >> 2 * (i % 4) & 3)];
  return bits_of<Vector>(to);
}
inline __m256 emulated_mm512_extractf32x8_ps(Vector a, int half) {
  return bits_of<Elements<__m256, 2>>(a).at[half];
}

// Elements whose bit of the mask is not set are neither read nor written.
template <class T, int count, class From>
inline void store_some(void* to, uint32_t mask, const From& from) {
  const auto elements = bits_of<Elements<T, count>>(from);
  for (int i = 0; i < count; ++i) {
    const int32_t number = bits_of<int32_t>(elements.at[i]);
    if (mask >> i & 1) memcpy(static_cast<char*>(to) + 4 * i, &number, 4);
  }
}
inline void emulated_mm512_mask_storeu_epi32(void* to, uint16_t mask, IntVector a) {
  store_some<int32_t, 16>(to, mask, a);
}
inline void emulated_mm512_mask_storeu_ps(void* to, uint16_t mask, Vector a) {
  store_some<float, 16>(to, mask, a);
}
inline void emulated_mm512_mask_cvtepi64_storeu_epi32(void* to, uint8_t mask, IntVector a) {
  store_some<int32_t, 8>(to, mask, of_each<__m256i, int64_t, 8>(a, Cast<int32_t>()));
}
inline void emulated_mm512_stream_ps(float* to, Vector a) { memcpy(to, &a, sizeof(a)); }
inline Vector emulated_mm512_maskz_loadu_ps(uint16_t mask, const void* from) {
  Elements<float, 16> to = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(to.at + i, static_cast<const char*>(from) + 4 * i, 4);
  }
  return bits_of<Vector>(to);
}
inline Vector emulated_mm512_maskz_load_ps(uint16_t mask, const void* from) {
  return emulated_mm512_maskz_loadu_ps(mask, from);
}

}  // namespace

#include "names.h"

#define __m512 simde__m512
#define __m512i simde__m512i
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#ifdef EMULATED_VBMI
#define __AVX512VBMI__ 1
#endif
#define asm(...)  // hints to the compiler, for registers that are not there
