// AVX2, FMA, BMI2, F16C: x86-64 processors from about 2013 on.
#include <immintrin.h>

#include "row_kernels.h"

namespace {

struct Avx2 {
  // PDEP deposits consecutive bits at the places of a mask: eight codes of any width to eight bytes
  // in one step.
  struct Spread {
    uint64_t places;
    explicit Spread(int bits) : places(0x0101010101010101ull * ((1u << bits) - 1)) {}
    uint64_t operator()(uint64_t word) const { return _pdep_u64(word, places); }
  };
  typedef float Vector __attribute__((vector_size(32)));

  static void dot4(const int16_t* w, int64_t stride, const int16_t* a, int64_t count,
                   int32_t* sums) {
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (int64_t i = 0; i < count; i += 16) {
      const __m256i x = load16(a + i);
      sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(load16(w + i), x));
      sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(load16(w + stride + i), x));
      sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(load16(w + 2 * stride + i), x));
      sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(load16(w + 3 * stride + i), x));
    }
    const __m256i halves =
        _mm256_hadd_epi32(_mm256_hadd_epi32(sum0, sum1), _mm256_hadd_epi32(sum2, sum3));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), four);
  }

  static __m256i load16(const int16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
};

}  // namespace

namespace ql {
const IsaKernels avx2_kernels = RowKernels<Avx2>::table(/*serial_work=*/600000);
}
