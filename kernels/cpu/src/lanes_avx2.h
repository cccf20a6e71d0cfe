// Lanes of AVX2 with FMA and F16C: two registers each. Included by lanes.h, which says what the
// operations mean.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr bool kOneRegister = false;  // for sixteen lanes

struct Lanes {
  __m256 lo, hi;
};
struct IntLanes {
  __m256i lo, hi;
};
struct LaneMask {
  __m256 lo, hi;
};

// All bits set in the first `count` of 16 lanes.
inline IntLanes first_lanes(int64_t count) {
  const __m256i n = _mm256_set1_epi32(static_cast<int32_t>(count));
  return {_mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}

inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Lanes load_first(const float* from, int64_t count) {
  const IntLanes mask = first_lanes(count);
  return {_mm256_maskload_ps(from, mask.lo), _mm256_maskload_ps(from + 8, mask.hi)};
}
inline void store(float* to, Lanes a) {
  _mm256_storeu_ps(to, a.lo);
  _mm256_storeu_ps(to + 8, a.hi);
}
inline void store_first(float* to, Lanes a, int64_t count) {
  const IntLanes mask = first_lanes(count);
  _mm256_maskstore_ps(to, mask.lo, a.lo);
  _mm256_maskstore_ps(to + 8, mask.hi, a.hi);
}
inline Lanes broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }

// Lane i gets lane i ^ distance: 1, 2, 4 or 8.
template <int distance>
inline Lanes swap_lanes(Lanes a) {
  if constexpr (distance == 8) return {a.hi, a.lo};
  if constexpr (distance == 4) {
    return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
  }
  constexpr int places = distance == 1 ? 0xB1 : 0x4E;
  return {_mm256_permute_ps(a.lo, places), _mm256_permute_ps(a.hi, places)};
}

inline IntLanes load_int(const int32_t* from) {
  const __m256i* halves = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_int(int32_t* to, IntLanes a) {
  __m256i* halves = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, a.lo);
  _mm256_storeu_si256(halves + 1, a.hi);
}
inline IntLanes broadcast_int(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline __m128i load_eight_bytes(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}
inline IntLanes load_u8(const uint8_t* from) {
  return {_mm256_cvtepu8_epi32(load_eight_bytes(from)),
          _mm256_cvtepu8_epi32(load_eight_bytes(from + 8))};
}
inline IntLanes load_i8(const int8_t* from) {
  return {_mm256_cvtepi8_epi32(load_eight_bytes(from)),
          _mm256_cvtepi8_epi32(load_eight_bytes(from + 8))};
}
inline IntLanes load_u16(const void* from) {
  const __m128i* halves = static_cast<const __m128i*>(from);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))};
}
inline Lanes load_f16(const void* from) {
  const __m128i* halves = static_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

// int32 -> float32, to nearest; float32 -> int32, ties to even.
inline Lanes floats_of(IntLanes a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline IntLanes rounded_ints(Lanes a) {
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
// Lanes within -128..127.
inline void store_i8(int8_t* to, IntLanes a) {
  // Packing works within 128-bit halves: quarters come out as 0 2 1 3.
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(to),
      _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
inline IntLanes float_bits(Lanes a) {
  return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
inline Lanes bits_as_floats(IntLanes a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}

inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes operator/(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
// a * b + c, rounded once.
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// a < b ? a : b and a > b ? a : b: b when either is NaN.
inline Lanes min_of(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline Lanes max_of(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline Lanes sqrt_of(Lanes a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
// To the nearest whole number, ties to even; |a| < 2^22.
inline Lanes round_to_even(Lanes a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

inline IntLanes operator+(IntLanes a, IntLanes b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline IntLanes operator-(IntLanes a, IntLanes b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline IntLanes operator*(IntLanes a, IntLanes b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline IntLanes operator&(IntLanes a, IntLanes b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline IntLanes operator|(IntLanes a, IntLanes b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
inline IntLanes operator^(IntLanes a, IntLanes b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline IntLanes operator<<(IntLanes a, int count) {
  return {_mm256_slli_epi32(a.lo, count), _mm256_slli_epi32(a.hi, count)};
}
inline IntLanes operator>>(IntLanes a, int count) {
  return {_mm256_srli_epi32(a.lo, count), _mm256_srli_epi32(a.hi, count)};
}
inline IntLanes shift_right_signed(IntLanes a, int count) {
  return {_mm256_srai_epi32(a.lo, count), _mm256_srai_epi32(a.hi, count)};
}
inline IntLanes max_int(IntLanes a, IntLanes b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}

// a * 2^n, rounded once, for whole n within -200..200: in two steps, since 2^n alone may not be a
// normal number. The first one is exact.
inline Lanes times_power_of_two(Lanes a, Lanes n) {
  const IntLanes whole = rounded_ints(n), half = shift_right_signed(whole, 1);
  const IntLanes bias = broadcast_int(127);
  return a * bits_as_floats((half + bias) << 23) * bits_as_floats((whole - half + bias) << 23);
}

inline LaneMask less(Lanes a, Lanes b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline LaneMask equal_int(IntLanes a, IntLanes b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.lo, b.lo)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.hi, b.hi))};
}
// Whether any bit of any lane is set.
inline bool any_bits(IntLanes a) {
  const __m256i both = _mm256_or_si256(a.lo, a.hi);
  return !_mm256_testz_si256(both, both);
}
// yes where the mask is set, no elsewhere.
inline Lanes select(LaneMask m, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

}  // namespace
