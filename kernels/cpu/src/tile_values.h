// Codes to float32 values, a chunk (4 columns x 16 rows) at a time, for units with vectors.
//
//   ChunkValues<bits, is_float, constant_zero> values(segment);
//   values(codes, chunk, zero, out)   out[j] = value(code) - zero of column j of chunk 0..3 of
//                                     the 16 columns at `codes` (32 * bits bytes)
//
// Floats have no zero. `constant_zero`: it is the segment's zero_constant in every row, so that
// tables can hold the differences; `zero` must be given all the same.
//
// The four codes of a row come to a 32-bit lane: 8 bits from each other where 64 bytes hold whole
// chunks (2, 4, 8 bits), side by side otherwise. The bits above the last one are anything.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace {

template <int bits>
struct ByteCodes {
  static constexpr int kStep = 8;  // bits between the codes of a lane
  static constexpr int first_bit(int chunk) { return chunk * bits % 8; }
  IntLanes operator()(const uint8_t* codes, int chunk) const {
    return load_int(reinterpret_cast<const int32_t*>(codes + chunk * bits / 8 * 64));
  }
};

// Conversion, for integers of any width.
template <class Codes, int bits>
struct IntegerValues {
  Codes codes_of;
  explicit IntegerValues(const ql::TileSegment&) {}

  void operator()(const uint8_t* codes, int chunk, const Lanes& zero, Lanes (&out)[4]) const {
    const IntLanes lanes = codes_of(codes, chunk), mask = broadcast_int((1 << bits) - 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const IntLanes code = (lanes >> (Codes::first_bit(chunk) + j * Codes::kStep)) & mask;
      out[j] = floats_of(code) - zero;
    }
  }
};

// Mantissa bits of a float with these values: they are multiples of the least one as far as 2^(m + 1)
// of it, then steps double.
inline int mantissa_bits_of(const float* values) {
  int bits = 1;
  while (values[4 << bits] == static_cast<float>(4 << bits) * values[1]) ++bits;
  return bits;
}

// Floats of 7 and 8 bits: exponent and mantissa are moved to those of a float32, whose higher bias is
// accounted for in one of two ways. Codes of infinity and NaN, which no quantizer writes, are looked
// up.
//
// From four exponent bits on, weights that are subnormal are rare: all are multiplied by a power of
// two. With fewer they may be every second one, and a product of a subnormal float32 takes many
// processors a hundred cycles. So the exponents get their bias first, which makes (1 + f) * 2^-bias of
// a subnormal f * 2^(1-bias) and leaves all else as it should be; min(2 r - 2^(1-bias), r) is the
// number in both cases, exactly.
template <class Codes, int bits>
struct FloatValues {
  Codes codes_of;
  const float* values;
  bool rare_subnormals;
  int shift;
  IntLanes signs, magnitudes, to_sign;  // of four codes: sign bits, others, specials to sign bits
  IntLanes number, bias;
  Lanes factor, least;  // 2^(127 - bias); 2^(1 - bias), the least that is not subnormal

  explicit FloatValues(const ql::TileSegment& s) : values(s.float_values) {
    constexpr int32_t half = 1 << (bits - 1);
    const int mantissa = mantissa_bits_of(values), exponent = bits - 1 - mantissa;
    int32_t specials = half;
    while (!__builtin_isfinite(values[specials - 1])) --specials;
    signs = of_each(half);
    magnitudes = of_each(half - 1);
    to_sign = of_each(half - specials);
    rare_subnormals = exponent > 3;
    shift = 8 - exponent;
    number = broadcast_int((half - 1) << (23 - mantissa));
    const int32_t higher = 128 - (1 << (exponent - 1));  // of the biases, the difference
    bias = broadcast_int(higher << 23);
    factor = bits_as_floats(broadcast_int((127 + higher) << 23));
    least = bits_as_floats(broadcast_int((higher + 1) << 23));
  }

  void operator()(const uint8_t* codes, int chunk, const Lanes&, Lanes (&out)[4]) const {
    const IntLanes lanes = codes_of(codes, chunk);
    // Adding to the magnitudes, four at a time, carries into a sign bit from the specials on.
    if (__builtin_expect(any_bits(((lanes & magnitudes) + to_sign) & signs), false)) {
      for (int j = 0; j < 4; ++j) out[j] = look_up(lanes, j * Codes::kStep);
      return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const IntLanes top = lanes << (32 - bits - j * Codes::kStep);
      out[j] = rare_subnormals ? scaled(top) : biased(top);
    }
  }

 private:
  static IntLanes of_each(int32_t field) {
    uint32_t all = 0;
    for (int j = 0; j < 4; ++j) all |= static_cast<uint32_t>(field) << (j * Codes::kStep);
    return broadcast_int(static_cast<int32_t>(all));
  }

  Lanes scaled(IntLanes top) const {
    const IntLanes kept = number | broadcast_int(INT32_MIN);
    return bits_as_floats(shift_right_signed(top, shift) & kept) * factor;
  }
  Lanes biased(IntLanes top) const {
    const Lanes read = bits_as_floats(((top >> shift) & number) + bias);
    const Lanes value = min_of(fma(read, broadcast(2.0f), -least), read);
    return bits_as_floats(float_bits(value) | (top & broadcast_int(INT32_MIN)));
  }

  // Returned rather than written to `out`, which would then have to be in memory.
  __attribute__((noinline)) Lanes look_up(IntLanes lanes, int position) const {
    int32_t code[16];
    float looked_up[16];
    store_int(code, (lanes >> position) & broadcast_int((1 << bits) - 1));
    for (int row = 0; row < 16; ++row) looked_up[row] = values[code[row]];
    return load(looked_up);
  }
};

}  // namespace

#ifdef __AVX512BW__
#include "tile_values_avx512.h"
#else
#include "tile_values_avx2.h"
#endif
