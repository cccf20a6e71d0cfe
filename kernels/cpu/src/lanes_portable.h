// Lanes of any processor: four vectors of GCC's vector extension each. Included by lanes.h, which
// says what the operations mean. `fma` is a call per lane: rounding once is what keeps the bits
// equal to those of processors that have the instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr bool kOneRegister = false;  // for sixteen lanes

typedef float FourFloats __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t FourUnsigned __attribute__((vector_size(16)));

struct Lanes {
  FourFloats v[4];
};
struct IntLanes {
  FourInts v[4];
};
using LaneMask = IntLanes;  // all bits of a lane, or none

template <class Result, class Function>
inline Result for_quarters(const Function& function) {
  return {{function(0), function(1), function(2), function(3)}};
}

inline float lane_of(const Lanes& a, int lane) { return a.v[lane / 4][lane % 4]; }

inline Lanes load(const float* from) {
  Lanes a;
  memcpy(&a, from, sizeof(a));
  return a;
}
inline Lanes load_first(const float* from, int64_t count) {
  Lanes a = {};
  memcpy(&a, from, sizeof(float) * static_cast<size_t>(count));
  return a;
}
inline void store(float* to, const Lanes& a) { memcpy(to, &a, sizeof(a)); }
inline void store_first(float* to, const Lanes& a, int64_t count) {
  memcpy(to, &a, sizeof(float) * static_cast<size_t>(count));
}
inline Lanes broadcast(float a) {
  const FourFloats four = {a, a, a, a};
  return {{four, four, four, four}};
}

// Lane i gets lane i ^ distance: 1, 2, 4 or 8.
template <int distance>
inline Lanes swap_lanes(const Lanes& a) {
  Lanes swapped = {};
  for (int i = 0; i < 16; ++i) swapped.v[i / 4][i % 4] = lane_of(a, i ^ distance);
  return swapped;
}

inline IntLanes load_int(const int32_t* from) {
  IntLanes a;
  memcpy(&a, from, sizeof(a));
  return a;
}
inline void store_int(int32_t* to, const IntLanes& a) { memcpy(to, &a, sizeof(a)); }
inline IntLanes broadcast_int(int32_t a) {
  const FourInts four = {a, a, a, a};
  return {{four, four, four, four}};
}
template <class T>
inline IntLanes load_widened(const void* from) {
  T narrow[16];
  memcpy(narrow, from, sizeof(narrow));
  IntLanes a = {};
  for (int i = 0; i < 16; ++i) a.v[i / 4][i % 4] = narrow[i];
  return a;
}
inline IntLanes load_u8(const uint8_t* from) { return load_widened<uint8_t>(from); }
inline IntLanes load_i8(const int8_t* from) { return load_widened<int8_t>(from); }
inline IntLanes load_u16(const void* from) { return load_widened<uint16_t>(from); }

inline IntLanes float_bits(const Lanes& a) {
  return for_quarters<IntLanes>([&](int i) { return reinterpret_cast<FourInts>(a.v[i]); });
}
inline Lanes bits_as_floats(const IntLanes& a) {
  return for_quarters<Lanes>([&](int i) { return reinterpret_cast<FourFloats>(a.v[i]); });
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return for_quarters<Lanes>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return for_quarters<Lanes>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  return for_quarters<Lanes>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes operator/(const Lanes& a, const Lanes& b) {
  return for_quarters<Lanes>([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c, rounded once.
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes sum = {};
  for (int i = 0; i < 16; ++i) {
    sum.v[i / 4][i % 4] = __builtin_fmaf(lane_of(a, i), lane_of(b, i), lane_of(c, i));
  }
  return sum;
}
// a < b ? a : b and a > b ? a : b: b when either is NaN.
inline Lanes min_of(const Lanes& a, const Lanes& b) {
  return for_quarters<Lanes>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes max_of(const Lanes& a, const Lanes& b) {
  return for_quarters<Lanes>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes sqrt_of(const Lanes& a) {
  Lanes root = {};
  for (int i = 0; i < 16; ++i) root.v[i / 4][i % 4] = __builtin_sqrtf(lane_of(a, i));
  return root;
}

inline IntLanes operator+(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] + b.v[i]; });
}
inline IntLanes operator-(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] - b.v[i]; });
}
inline IntLanes operator*(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] * b.v[i]; });
}
inline IntLanes operator&(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] & b.v[i]; });
}
inline IntLanes operator|(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] | b.v[i]; });
}
inline IntLanes operator^(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline IntLanes operator<<(const IntLanes& a, int count) {
  return for_quarters<IntLanes>([&](int i) {
    return reinterpret_cast<FourInts>(reinterpret_cast<FourUnsigned>(a.v[i]) << count);
  });
}
inline IntLanes operator>>(const IntLanes& a, int count) {
  return for_quarters<IntLanes>([&](int i) {
    return reinterpret_cast<FourInts>(reinterpret_cast<FourUnsigned>(a.v[i]) >> count);
  });
}
inline IntLanes shift_right_signed(const IntLanes& a, int count) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] >> count; });
}
inline IntLanes max_int(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

// int32 -> float32, to nearest; float32 -> int32, ties to even.
inline Lanes floats_of(const IntLanes& a) {
  return for_quarters<Lanes>([&](int i) { return __builtin_convertvector(a.v[i], FourFloats); });
}
inline IntLanes rounded_ints(const Lanes& a) {
  IntLanes whole = {};
  for (int i = 0; i < 16; ++i) {
    whole.v[i / 4][i % 4] = static_cast<int32_t>(__builtin_lrintf(lane_of(a, i)));
  }
  return whole;
}
// Lanes within -128..127.
inline void store_i8(int8_t* to, const IntLanes& a) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(a.v[i / 4][i % 4]);
}
// To the nearest whole number, ties to even; |a| < 2^22.
inline Lanes round_to_even(const Lanes& a) {
  const Lanes shift = broadcast(0x1p23f);  // the sum's last mantissa bit is worth 1
  const Lanes abs = bits_as_floats(float_bits(a) & broadcast_int(INT32_MAX));
  const IntLanes sign = float_bits(a) & broadcast_int(INT32_MIN);  // -0 for what rounds to it
  return bits_as_floats(float_bits((abs + shift) - shift) | sign);
}
// a * 2^n, rounded once, for whole n within -200..200: in two steps, since 2^n alone may not be a
// normal number. The first one is exact.
inline Lanes times_power_of_two(const Lanes& a, const Lanes& n) {
  const IntLanes whole = rounded_ints(n), half = shift_right_signed(whole, 1);
  const IntLanes bias = broadcast_int(127);
  return a * bits_as_floats((half + bias) << 23) * bits_as_floats((whole - half + bias) << 23);
}

inline LaneMask less(const Lanes& a, const Lanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] < b.v[i]; });
}
inline LaneMask equal_int(const IntLanes& a, const IntLanes& b) {
  return for_quarters<IntLanes>([&](int i) { return a.v[i] == b.v[i]; });
}
// Whether any bit of any lane is set.
inline bool any_bits(const IntLanes& a) {
  const FourInts four = (a.v[0] | a.v[1]) | (a.v[2] | a.v[3]);
  return (four[0] | four[1] | four[2] | four[3]) != 0;
}
// yes where the mask is set, no elsewhere.
inline Lanes select(const LaneMask& m, const Lanes& yes, const Lanes& no) {
  return for_quarters<Lanes>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}

// Halves to floats: a subnormal is a multiple of 2^-24; other exponents move from bias 15 to 127,
// those of infinity and NaN to the top.
inline Lanes load_f16(const void* from) {
  const IntLanes half = load_u16(from), magnitude = half & broadcast_int(0x7FFF);
  Lanes out = {};
  for (int i = 0; i < 16; ++i) {
    const int32_t bits = magnitude.v[i / 4][i % 4];
    const uint32_t up = bits >= 0x7C00 ? 224u << 23 : 112u << 23;
    const uint32_t moved = (static_cast<uint32_t>(bits) << 13) + up;
    float value = static_cast<float>(bits) * 0x1p-24f;
    if (bits >= 0x0400) memcpy(&value, &moved, 4);
    out.v[i / 4][i % 4] = value;
  }
  return bits_as_floats(float_bits(out) | ((half & broadcast_int(0x8000)) << 16));
}

}  // namespace
