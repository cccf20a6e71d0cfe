// Codes to values on AVX2. Included by tile_values.h. Integers are converted; floats of 4 to 6 bits
// are looked up as bytes, the two upper ones of their float32 forms, which say everything.
#pragma once

#include <immintrin.h>

#include "lanes.h"
#include "tiles.h"

namespace {

// Codes of the other widths: row r starts at bit 4 * bits * r of the chunk, four rows at an even
// byte.
template <int bits>
struct RowCodes {
  static constexpr int kStep = bits;
  static constexpr int first_bit(int) { return 0; }

  __m256i bytes, shifts;

  RowCodes() {
    alignas(32) uint8_t byte[32];
    for (int i = 0; i < 32; ++i) byte[i] = static_cast<uint8_t>(bits * (i / 4 % 4) / 2 + i % 4);
    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte));
    shifts = _mm256_set1_epi64x(4ll << 32);  // odd rows of odd widths begin within a byte
  }

  IntLanes operator()(const uint8_t* codes, int chunk) const {
    const uint8_t* from = codes + 8 * bits * chunk;
    return {eight_rows(from), eight_rows(from + 4 * bits)};
  }

  __m256i eight_rows(const uint8_t* from) const {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * bits));
    const __m256i lanes = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), bytes);
    return bits % 2 ? _mm256_srlv_epi32(lanes, shifts) : lanes;
  }
};

template <int bits>
struct Codes : RowCodes<bits> {};
template <>
struct Codes<2> : ByteCodes<2> {};
template <>
struct Codes<4> : ByteCodes<4> {};
template <>
struct Codes<8> : ByteCodes<8> {};

template <int bits, bool is_float, bool constant_zero>
struct ChunkValues : IntegerValues<Codes<bits>, bits> {
  using IntegerValues<Codes<bits>, bits>::IntegerValues;
};

template <>
struct ChunkValues<7, true, true> : FloatValues<Codes<7>, 7> {
  using FloatValues<Codes<7>, 7>::FloatValues;
};
template <>
struct ChunkValues<8, true, true> : FloatValues<Codes<8>, 8> {
  using FloatValues<Codes<8>, 8>::FloatValues;
};

// Sixteen values' upper two bytes, for byte shuffles.
struct ByteTables {
  __m256i high, low;
  explicit ByteTables(const float* values) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      uint32_t number;
      memcpy(&number, values + i, sizeof(number));
      bytes[0][i] = static_cast<uint8_t>(number >> 24);
      bytes[1][i] = static_cast<uint8_t>(number >> 16);
    }
    high = twice(bytes[0]);
    low = twice(bytes[1]);
  }
  static __m256i twice(const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
};

// Four codes of four rows: row by row to column by column, in each half.
inline __m256i columns_first(__m256i codes) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(order));
}

// The columns of eight rows from the upper two bytes of their values, columns first.
inline void widen_columns(__m256i high, __m256i low, __m256 (&out)[4]) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i first = _mm256_unpacklo_epi8(low, high), last = _mm256_unpackhi_epi8(low, high);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, first));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, first));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, last));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, last));
}

template <>
struct ChunkValues<4, true, true> {
  ByteTables table;
  explicit ChunkValues(const ql::TileSegment& s) : table(s.float_values) {}

  void operator()(const uint8_t* codes, int chunk, const Lanes&, Lanes (&out)[4]) const {
    const IntLanes lanes = Codes<4>()(codes, chunk) >> Codes<4>::first_bit(chunk);
    __m256 low[4], high[4];
    eight_rows(lanes.lo, low);
    eight_rows(lanes.hi, high);
    for (int j = 0; j < 4; ++j) out[j] = {low[j], high[j]};
  }

 private:
  void eight_rows(__m256i lanes, __m256 (&out)[4]) const {
    const __m256i code = columns_first(_mm256_and_si256(lanes, _mm256_set1_epi8(0x0F)));
    widen_columns(_mm256_shuffle_epi8(table.high, code), _mm256_shuffle_epi8(table.low, code), out);
  }
};

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

// 5 and 6 bits: magnitudes are looked up, 16 at a time, and get their signs.
template <int bits>
struct MagnitudeValues {
  Codes<bits> codes_of;
  ByteTables small, large;  // magnitudes 0..15 and, of 6 bits, 16..31
  explicit MagnitudeValues(const ql::TileSegment& s)
      : small(s.float_values), large(s.float_values + (bits == 6 ? 16 : 0)) {}

  void operator()(const uint8_t* codes, int chunk, const Lanes&, Lanes (&out)[4]) const {
    const IntLanes lanes = codes_of(codes, chunk);
    __m256 low[4], high[4];
    eight_rows(lanes.lo, low);
    eight_rows(lanes.hi, high);
    for (int j = 0; j < 4; ++j) out[j] = {low[j], high[j]};
  }

 private:
  void eight_rows(__m256i lanes, __m256 (&out)[4]) const {
    const __m256i code = columns_first(fields_to_bytes<bits>(lanes));
    const __m256i sign =
        _mm256_and_si256(_mm256_slli_epi16(code, 8 - bits), _mm256_set1_epi8(INT8_MIN));
    __m256i high = _mm256_shuffle_epi8(small.high, code);
    __m256i low = _mm256_shuffle_epi8(small.low, code);
    if (bits == 6) {
      const __m256i is_large = _mm256_slli_epi16(code, 3);  // bit 4 to the top of its byte
      high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(large.high, code), is_large);
      low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(large.low, code), is_large);
    }
    widen_columns(_mm256_or_si256(high, sign), low, out);
  }
};

template <>
struct ChunkValues<5, true, true> : MagnitudeValues<5> {
  using MagnitudeValues<5>::MagnitudeValues;
};
template <>
struct ChunkValues<6, true, true> : MagnitudeValues<6> {
  using MagnitudeValues<6>::MagnitudeValues;
};

}  // namespace
