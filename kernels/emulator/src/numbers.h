// Numbers of few bits on a host. 16-bit floats: exact conversions to float, and back with one
// rounding, to nearest even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// A format with `exponent` and `mantissa` bits: fp16 is <5, 10>, bf16 <8, 7>.
template <int exponent, int mantissa>
struct Float16 {
  static constexpr int kBias = (1 << (exponent - 1)) - 1;
  static constexpr uint32_t kInfinity = ((1u << exponent) - 1) << mantissa;

  static float decode(uint32_t bits) {
    const float sign = (bits & 0x8000u) != 0 ? -1.f : 1.f;
    const uint32_t magnitude = bits & 0x7fffu;
    const uint32_t fraction = magnitude & ((1u << mantissa) - 1);
    if (magnitude > kInfinity) return float_of_bits(0x7fc00000u);
    if (magnitude == kInfinity) return sign * float_of_bits(0x7f800000u);
    const int power = static_cast<int>(magnitude >> mantissa);
    if (power == 0) return sign * std::ldexp(static_cast<float>(fraction), 1 - kBias - mantissa);
    const auto significand = static_cast<float>(fraction | 1u << mantissa);
    return sign * std::ldexp(significand, power - kBias - mantissa);
  }

  static uint16_t encode(double value) {
    const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
    if (std::isnan(value)) return static_cast<uint16_t>(kInfinity | 1u << (mantissa - 1));
    if (std::isinf(value)) return static_cast<uint16_t>(sign | kInfinity);
    int power;
    std::frexp(value, &power);  // |value| is in [2^(power-1), 2^power)
    power = value == 0 ? 1 - kBias : std::max(power - 1, 1 - kBias);
    // In units of the last place, where the default rounding of nearbyint is to nearest even.
    const double units = std::nearbyint(std::ldexp(std::fabs(value), mantissa - power));
    // A significand that rounds up to the next power of two carries into the exponent by itself.
    const auto whole = static_cast<uint32_t>(units);
    const auto biased = static_cast<uint32_t>(power + kBias - 1) << mantissa;
    return static_cast<uint16_t>(sign | std::min(biased + whole, kInfinity));
  }
};

// Whole numbers side by side in 32 bits, two's complement where they have a sign.
template <int bits, bool is_signed>
struct Integer {
  static constexpr int kBits = bits;

  static int decode(uint32_t word, int index) {
    const auto code = static_cast<int>(word >> (bits * index) & ((1u << bits) - 1));
    return is_signed && code >> (bits - 1) != 0 ? code - (1 << bits) : code;
  }
};

using Fp16 = Float16<5, 10>;
using Bf16 = Float16<8, 7>;

}  // namespace emulator
