// Codes to values on AVX-512, with VBMI where the unit has it. Included by tile_values.h.
//
// Tables of up to 64 values are looked up in registers, with one shift of the lanes and one
// permutation that ignores the bits above the code.
#pragma once

#include <immintrin.h>

#include "lanes.h"
#include "tiles.h"

namespace {

// Codes of the other widths: row r starts at bit 4 * bits * r of the chunk.
template <int bits>
struct RowCodes {
  static constexpr int kStep = bits;
  static constexpr int first_bit(int) { return 0; }

  __m512i bytes, shifts;
#ifndef __AVX512VBMI__
  __m512i words;
#endif

  RowCodes() {
    alignas(64) uint8_t byte[64];
#ifdef __AVX512VBMI__
    for (int i = 0; i < 64; ++i) byte[i] = static_cast<uint8_t>(bits * (i / 4) / 2 + i % 4);
#else
    // First the words of every four rows, which begin at an even byte, to a quarter of the vector.
    alignas(64) uint16_t word[32];
    for (int i = 0; i < 32; ++i) word[i] = static_cast<uint16_t>(bits * (i / 8) + i % 8);
    words = _mm512_load_si512(word);
    for (int i = 0; i < 64; ++i) byte[i] = static_cast<uint8_t>(bits * (i / 4 % 4) / 2 + i % 4);
#endif
    bytes = _mm512_load_si512(byte);
    shifts = _mm512_set1_epi64(4ll << 32);  // odd rows of odd widths begin within a byte
  }

  IntLanes operator()(const uint8_t* codes, int chunk) const {
    __m512i lanes = _mm512_loadu_si512(codes + 8 * bits * chunk);
#ifdef __AVX512VBMI__
    lanes = _mm512_permutexvar_epi8(bytes, lanes);
#else
    lanes = _mm512_shuffle_epi8(_mm512_permutexvar_epi16(words, lanes), bytes);
#endif
    return {bits % 2 ? _mm512_srlv_epi32(lanes, shifts) : lanes};
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

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// A table of 2^bits values in registers; `at` looks up the codes that begin at bit `position` of
// the lanes.
template <int bits>
struct ValueTable {  // up to 4 bits: repeated, so that the bits above the code do not matter
  __m512 values;
  explicit ValueTable(const float* from) {
    float repeated[16];
    for (int i = 0; i < 16; ++i) repeated[i] = from[i & ((1 << bits) - 1)];
    values = _mm512_loadu_ps(repeated);
  }
  Lanes at(IntLanes lanes, int position) const {
    return {_mm512_permutexvar_ps((lanes >> position).v, values)};
  }
};

template <>
struct ValueTable<5> {
  __m512 low, high;
  explicit ValueTable(const float* from)
      : low(_mm512_loadu_ps(from)), high(_mm512_loadu_ps(from + 16)) {}
  Lanes at(IntLanes lanes, int position) const {
    return {_mm512_permutex2var_ps(low, (lanes >> position).v, high)};
  }
};

// 64 values of at most 8 significant bits: the upper halves of their float32 forms say everything.
template <>
struct ValueTable<6> {
  __m512i low, high;
  explicit ValueTable(const float* from)
      : low(join(upper_halves(from), upper_halves(from + 16))),
        high(join(upper_halves(from + 32), upper_halves(from + 48))) {}
  Lanes at(IntLanes lanes, int position) const {
    const IntLanes index = position < 16 ? lanes << (16 - position) : lanes >> (position - 16);
    constexpr uint32_t upper = 0xAAAAAAAAu;
    return {_mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(upper, low, index.v, high))};
  }

 private:
  static __m256i upper_halves(const float* values) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(values), 16));
  }
};

template <int bits, bool is_float, bool constant_zero>
struct ChunkValues {
  static_assert(bits <= 6, "wider codes have forms of their own, below");
  Codes<bits> codes_of;
  ValueTable<bits> table;

  explicit ChunkValues(const ql::TileSegment& s) : table(Numbers(s).values) {}

  void operator()(const uint8_t* codes, int chunk, const Lanes& zero, Lanes (&out)[4]) const {
    const IntLanes lanes = codes_of(codes, chunk);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out[j] = table.at(lanes, Codes<bits>::first_bit(chunk) + j * Codes<bits>::kStep);
      if (!is_float && !constant_zero) out[j] = out[j] - zero;
    }
  }

 private:
  struct Numbers {
    float values[1 << bits];
    explicit Numbers(const ql::TileSegment& s) {
      for (int i = 0; i < 1 << bits; ++i) {
        values[i] = is_float ? s.float_values[i]
                             : static_cast<float>(i) - (constant_zero ? s.zero_constant : 0.0f);
      }
    }
  };
};

template <bool constant_zero>
struct ChunkValues<7, false, constant_zero> : IntegerValues<Codes<7>, 7> {
  using IntegerValues<Codes<7>, 7>::IntegerValues;
};
template <bool constant_zero>
struct ChunkValues<8, false, constant_zero> : IntegerValues<Codes<8>, 8> {
  using IntegerValues<Codes<8>, 8>::IntegerValues;
};

// 7-bit floats: a table of the 64 magnitudes, then the sign.
template <>
struct ChunkValues<7, true, true> {
  Codes<7> codes_of;
  ValueTable<6> magnitudes;
  explicit ChunkValues(const ql::TileSegment& s) : magnitudes(s.float_values) {}

  void operator()(const uint8_t* codes, int chunk, const Lanes&, Lanes (&out)[4]) const {
    const IntLanes lanes = codes_of(codes, chunk);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const IntLanes sign = (lanes << (25 - 7 * j)) & broadcast_int(INT32_MIN);
      out[j] = bits_as_floats(float_bits(magnitudes.at(lanes, 7 * j)) | sign);
    }
  }
};

#ifdef __AVX512VBMI__

// 8-bit floats: the two upper bytes of the float32 are looked up for 64 codes at a time, without
// their signs, then put at the top of lanes.
template <>
struct ChunkValues<8, true, true> {
  __m512i high[2], low[2], places[4];

  explicit ChunkValues(const ql::TileSegment& s) {
    alignas(64) uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) {
      uint32_t number;
      memcpy(&number, s.float_values + i, sizeof(number));
      bytes[0][i] = static_cast<uint8_t>(number >> 24);
      bytes[1][i] = static_cast<uint8_t>(number >> 16);
    }
    for (int half = 0; half < 2; ++half) {
      high[half] = _mm512_load_si512(bytes[0] + 64 * half);
      low[half] = _mm512_load_si512(bytes[1] + 64 * half);
    }
    for (int j = 0; j < 4; ++j) {
      alignas(64) uint8_t place[64] = {};
      for (int row = 0; row < 16; ++row) {
        place[4 * row + 2] = static_cast<uint8_t>(64 + 4 * row + j);
        place[4 * row + 3] = static_cast<uint8_t>(4 * row + j);
      }
      places[j] = _mm512_load_si512(place);
    }
  }

  void operator()(const uint8_t* codes, int chunk, const Lanes&, Lanes (&out)[4]) const {
    const __m512i code = _mm512_loadu_si512(codes + 64 * chunk);
    const __m512i magnitude = _mm512_permutex2var_epi8(high[0], code, high[1]);
    const __m512i lower = _mm512_permutex2var_epi8(low[0], code, low[1]);
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8(INT8_MIN));
    const __m512i upper = _mm512_or_si512(magnitude, sign);
    constexpr uint64_t kUpperBytes = 0xCCCCCCCCCCCCCCCCull;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      out[j].v =
          _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi8(kUpperBytes, upper, places[j], lower));
    }
  }
};

#else

template <>
struct ChunkValues<8, true, true> : FloatValues<Codes<8>, 8> {
  using FloatValues<Codes<8>, 8>::FloatValues;
};

#endif

}  // namespace
