// Small numbers as bits: halves, e8m0 and e4m3 scales. Internal linkage: see kernels.h for why.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <class T>
inline T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
inline void store(void* to, T value) {
  memcpy(to, &value, sizeof(T));
}

inline float float_of_bits(uint32_t bits) { return load<float>(&bits); }

inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude < 0x0400u) {  // subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_of_bits(load<uint32_t>(&value) | sign);
  }
  const uint32_t exponent_shift = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  return float_of_bits(((magnitude << 13) + exponent_shift) | sign);
}

// The nearest half of a float that is not negative.
inline uint16_t half_of_float(float value) {
  if (!(value < 65520.0f)) return value != value ? 0x7E00 : 0x7C00;
  if (value < 0x1p-14f) {  // subnormal: past 0.5, a step is 2^-24
    const float shifted = value + 0.5f;
    return static_cast<uint16_t>(load<uint32_t>(&shifted) - 0x3F000000u);
  }
  const uint32_t bits = load<uint32_t>(&value) - (112u << 23);
  return static_cast<uint16_t>((bits + 0xFFFu + ((bits >> 13) & 1)) >> 13);
}

// 2^(code - 127); code 0 is a float32 subnormal.
inline float e8m0_to_float(uint8_t code) {
  return float_of_bits(code ? static_cast<uint32_t>(code) << 23 : 1u << 22);
}

// An e4m3 number without its sign: a half has the same form with the exponent's bias 8 higher and
// seven more bits of mantissa, so that codes of zero and subnormals need no case of their own.
inline float e4m3_to_float(uint8_t code) {
  return half_to_float(static_cast<uint16_t>((code & 0x7F) << 7)) * 256.0f;
}

}  // namespace
