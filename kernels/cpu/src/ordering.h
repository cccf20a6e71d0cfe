// An integer for every float, in their order.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

// order_key(a) < order_key(b) if a < b; equal numbers (also -0 and 0) have equal keys, and every
// NaN has the largest.
inline int32_t order_key(float value) {
  value += 0.0f;
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & INT32_MAX) > 0x7f800000) return INT32_MAX;
  return bits ^ ((bits >> 31) & INT32_MAX);
}

}  // namespace
