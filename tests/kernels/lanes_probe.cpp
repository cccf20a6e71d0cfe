// What test_lanes.py calls: the operations of lanes.h on arrays, sixteen numbers at a time.
#include "lanes.h"

#define PROBE extern "C" __attribute__((visibility("default")))

namespace {

template <class Function>
void for_each(int64_t count, float* out, const Function& f) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, f(i));
}

Lanes through_i8(Lanes a) {
  int8_t bytes[16];
  store_i8(bytes, rounded_ints(a));
  return floats_of(load_i8(bytes));
}

Lanes integer_mix(Lanes a, Lanes b) {
  const IntLanes x = float_bits(a), y = float_bits(b);
  const IntLanes sum = (x + (y >> 3)) ^ (shift_right_signed(x, 5) - (y << 7));
  return floats_of(max_int(sum & broadcast_int(0x00FFFFFF), x | y)) + floats_of(x * y);
}

// Each lane with those 1, 2, 4 and 8 places away.
Lanes swaps(Lanes a) {
  const Lanes near = swap_lanes<1>(a) + swap_lanes<2>(a) * broadcast(2.0f);
  return near + (swap_lanes<4>(a) * broadcast(4.0f) + swap_lanes<8>(a) * broadcast(8.0f));
}

}  // namespace

// Operation by name; `count` is a multiple of 16. Returns whether there is one of that name.
PROBE bool probe(const char* name, const float* a, const float* b, const float* c, int64_t count,
                 float* out) {
  const auto is = [name](const char* other) { return strcmp(name, other) == 0; };
  const auto each = [&](const auto& f) { for_each(count, out, f); };
  if (is("exp")) {
    each([&](int64_t i) { return exp_of(load(a + i)); });
  } else if (is("silu")) {
    each([&](int64_t i) { return silu_of(load(a + i)); });
  } else if (is("fma")) {
    each([&](int64_t i) { return fma(load(a + i), load(b + i), load(c + i)); });
  } else if (is("multiply, then add")) {
    each([&](int64_t i) { return load(a + i) * load(b + i) + load(c + i); });
  } else if (is("divide")) {
    each([&](int64_t i) { return load(a + i) / load(b + i); });
  } else if (is("min")) {
    each([&](int64_t i) { return min_of(load(a + i), load(b + i)); });
  } else if (is("max")) {
    each([&](int64_t i) { return max_of(load(a + i), load(b + i)); });
  } else if (is("sqrt")) {
    each([&](int64_t i) { return sqrt_of(load(a + i)); });
  } else if (is("select")) {
    each([&](int64_t i) {
      return select(less(load(a + i), load(b + i)), -load(c + i), abs_of(load(c + i)));
    });
  } else if (is("round")) {
    each([&](int64_t i) { return round_to_even(load(a + i)); });
  } else if (is("through i8")) {
    each([&](int64_t i) { return through_i8(load(a + i)); });
  } else if (is("integers")) {
    each([&](int64_t i) { return integer_mix(load(a + i), load(b + i)); });
  } else if (is("swaps")) {
    each([&](int64_t i) { return swaps(load(a + i)); });
  } else if (is("f16")) {  // the lower halves of a
    each([&](int64_t i) {
      uint16_t halves[16];
      for (int j = 0; j < 16; ++j) memcpy(halves + j, a + i + j, 2);
      return load_f16(halves);
    });
  } else if (is("sum and highest")) {
    each([&](int64_t i) { return broadcast(sum_of(load(a + i)) - highest(load(a + i))); });
  } else if (is("first")) {  // i / 16 % 17 lanes
    each([&](int64_t i) { return load_first(a + i, i / 16 % 17); });
    for (int64_t i = 0; i < count; i += kLanes) store_first(out + i, load(b + i), i / 16 % 13);
  } else {
    return false;
  }
  return true;
}
