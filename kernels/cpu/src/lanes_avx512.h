// Lanes of AVX-512: one register each. Included by lanes.h, which says what the operations mean.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr bool kOneRegister = true;  // for sixteen lanes

struct Lanes {
  __m512 v;
};
struct IntLanes {
  __m512i v;
};
struct LaneMask {
  __mmask16 v;
};

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Lanes load_first(const float* from, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), from)};
}
inline void store(float* to, Lanes a) { _mm512_storeu_ps(to, a.v); }
inline void store_first(float* to, Lanes a, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), a.v);
}
inline Lanes broadcast(float a) { return {_mm512_set1_ps(a)}; }

// Lane i gets lane i ^ distance: 1, 2, 4 or 8.
template <int distance>
inline Lanes swap_lanes(Lanes a) {
  if constexpr (distance == 1) return {_mm512_permute_ps(a.v, 0xB1)};
  if constexpr (distance == 2) return {_mm512_permute_ps(a.v, 0x4E)};
  if constexpr (distance == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xB1)};
  return {_mm512_shuffle_f32x4(a.v, a.v, 0x4E)};
}

inline IntLanes load_int(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store_int(int32_t* to, IntLanes a) { _mm512_storeu_si512(to, a.v); }
inline IntLanes broadcast_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline IntLanes load_u8(const uint8_t* from) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline IntLanes load_i8(const int8_t* from) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline IntLanes load_u16(const void* from) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)))};
}
inline Lanes load_f16(const void* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)))};
}

// int32 -> float32, to nearest; float32 -> int32, ties to even.
inline Lanes floats_of(IntLanes a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline IntLanes rounded_ints(Lanes a) { return {_mm512_cvtps_epi32(a.v)}; }
// Lanes within -128..127.
inline void store_i8(int8_t* to, IntLanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(a.v));
}
inline IntLanes float_bits(Lanes a) { return {_mm512_castps_si512(a.v)}; }
inline Lanes bits_as_floats(IntLanes a) { return {_mm512_castsi512_ps(a.v)}; }

inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c, rounded once.
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a < b ? a : b and a > b ? a : b: b when either is NaN.
inline Lanes min_of(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes max_of(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes sqrt_of(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }
// To the nearest whole number, ties to even; |a| < 2^22.
inline Lanes round_to_even(Lanes a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n, rounded once, for whole n within -200..200.
inline Lanes times_power_of_two(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// Lane i with i + 8, then i + 4, i + 2, i + 1.
inline float sum_of_lanes(Lanes a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline IntLanes operator+(IntLanes a, IntLanes b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline IntLanes operator-(IntLanes a, IntLanes b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline IntLanes operator*(IntLanes a, IntLanes b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline IntLanes operator&(IntLanes a, IntLanes b) { return {_mm512_and_si512(a.v, b.v)}; }
inline IntLanes operator|(IntLanes a, IntLanes b) { return {_mm512_or_si512(a.v, b.v)}; }
inline IntLanes operator^(IntLanes a, IntLanes b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline IntLanes operator<<(IntLanes a, int count) { return {_mm512_slli_epi32(a.v, count)}; }
inline IntLanes operator>>(IntLanes a, int count) { return {_mm512_srli_epi32(a.v, count)}; }
inline IntLanes shift_right_signed(IntLanes a, int count) {
  return {_mm512_srai_epi32(a.v, count)};
}
inline IntLanes max_int(IntLanes a, IntLanes b) { return {_mm512_max_epi32(a.v, b.v)}; }

inline LaneMask less(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline LaneMask equal_int(IntLanes a, IntLanes b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
// Whether any bit of any lane is set.
inline bool any_bits(IntLanes a) { return _mm512_test_epi32_mask(a.v, a.v) != 0; }
// yes where the mask is set, no elsewhere.
inline Lanes select(LaneMask m, Lanes yes, Lanes no) {
  return {_mm512_mask_blend_ps(m.v, no.v, yes.v)};
}

}  // namespace
