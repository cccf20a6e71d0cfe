// VPDPBUSD in its VEX form for processors without it. Included before everything else.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_mm256_dpbusd

static inline __m256i emulated_mm256_dpbusd(__m256i sums, __m256i unsigned_bytes, __m256i bytes) {
  int32_t sum[8];
  uint8_t a[32];
  int8_t b[32];
  memcpy(sum, &sums, 32);
  memcpy(a, &unsigned_bytes, 32);
  memcpy(b, &bytes, 32);
  for (int i = 0; i < 32; ++i) sum[i / 4] += a[i] * b[i];
  memcpy(&sums, sum, 32);
  return sums;
}
