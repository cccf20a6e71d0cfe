// Decoding 64 codes at a time, and multiplying them: what the AVX-512 kernels share.
//
// VPERMB brings the bytes that hold eight codes into each quadword, VPMULTISHIFTQB picks the eight
// fields out of it, and a mask clears the neighbours: any width takes three instructions, straight
// from the checkpoint's bit stream.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace {

constexpr int64_t kChunk = 64;  // codes per vector

// Accumulators of VPDPBUSD. The compiler takes __m512i for eight int64, and when such a value lives
// across the passes of a loop it copies it on each: with the type that the instruction works on, it
// does not.
typedef int32_t Lanes __attribute__((vector_size(64)));

inline Lanes dot4(Lanes sums, __m512i codes, __m512i values) {
  return reinterpret_cast<Lanes>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, values));
}

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// Calls body(Constant<n>) for n = count in [first, last].
template <int first, int last, class Body>
inline void with_constant(int64_t count, const Body& body) {
  if constexpr (first < last) {
    if (count > first) return with_constant<first + 1, last>(count, body);
  }
  body(Constant<first>{});
}

// The first `count` of 16 lanes: none when it is not positive, all when it is 16 or more.
inline __mmask16 lanes_below(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0);
}

// The first `count` of 64 bytes, count below 64: none when it is not positive.
inline __mmask64 bytes_below(int64_t count) { return count > 0 ? ~0ull >> (64 - count) : 0; }

// One packed row, 64 codes at a time.
template <int bits>
class Codes {
 public:
  Codes(const uint8_t* row, int64_t bytes)
      : row_(row), bytes_(bytes), low_(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))) {
    alignas(64) uint8_t places[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = static_cast<uint8_t>(i % 8 < bits ? i / 8 * bits + i % 8 : 0);
      shifts[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    places_ = _mm512_load_si512(places);
    shifts_ = _mm512_load_si512(shifts);
  }

  // The codes k .. k + 63; past the end of the row, zeros.
  __m512i at(int64_t k) const {
    const int64_t offset = k / 8 * bits, left = bytes_ - offset;
    // The row may end where its file does: read past the 64 codes, but not past the row.
    const __m512i stream = left >= 64 ? _mm512_loadu_si512(row_ + offset)
                                      : _mm512_maskz_loadu_epi8(bytes_below(left), row_ + offset);
    if constexpr (bits == 8) return stream;
    const __m512i spread = _mm512_permutexvar_epi8(places_, stream);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts_, spread), low_);
  }

 private:
  const uint8_t* row_;
  int64_t bytes_;
  __m512i places_, shifts_, low_;
};

}  // namespace
