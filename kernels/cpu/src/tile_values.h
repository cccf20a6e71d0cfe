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

// 8-bit floats: exponent and mantissa are moved to those of a float32, whose higher bias a
// multiplication accounts for. Codes of infinity and NaN, which no quantizer writes, are looked up.
struct Float8Values {
  const float* values;
  int shift;
  IntLanes mask, to_sign;
  Lanes bias;

  explicit Float8Values(const ql::TileSegment& s) : values(s.float_values) {
    const bool e5m2 = !(values[0x7C] < 1000.0f);  // infinity there, 384 in e4m3
    const int32_t first_special = e5m2 ? 0x7C : 0x7F;
    shift = e5m2 ? 3 : 4;
    mask = broadcast_int(static_cast<int32_t>(e5m2 ? 0x8FE00000u : 0x87F00000u));
    to_sign = broadcast_int((0x80 - first_special) * 0x01010101);
    bias = broadcast(e5m2 ? 0x1p112f : 0x1p120f);
  }

  void operator()(const uint8_t* codes, int chunk, const Lanes&, Lanes (&out)[4]) const {
    const IntLanes lanes = load_int(reinterpret_cast<const int32_t*>(codes + 64 * chunk));
    // Adding to the magnitudes, four at a time, carries into a sign bit from the specials on.
    const IntLanes sum = (lanes & broadcast_int(0x7F7F7F7F)) + to_sign;
    if (__builtin_expect(any_bits(sum & broadcast_int(INT32_MIN | 0x808080)), false)) {
      for (int j = 0; j < 4; ++j) out[j] = look_up(codes + 64 * chunk + j);
      return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const IntLanes number = shift_right_signed(lanes << (24 - 8 * j), shift) & mask;
      out[j] = bits_as_floats(number) * bias;
    }
  }

 private:
  // Returned rather than written to `out`, which would then have to be in memory.
  __attribute__((noinline)) Lanes look_up(const uint8_t* column) const {
    float looked_up[16];
    for (int row = 0; row < 16; ++row) looked_up[row] = values[column[4 * row]];
    return load(looked_up);
  }
};

}  // namespace

#ifdef __AVX512BW__
#include "tile_values_avx512.h"
#else
#include "tile_values_avx2.h"
#endif
