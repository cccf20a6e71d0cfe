// The functions of `ptx::` on the machine. kernels/cuda/src/device.h has their contracts and, for a
// GPU, their instructions; a function that is there and not here does not compile.
#pragma once

#include <cmath>
#include <cstring>

#include "entry.h"
#include "machine.h"
#include "numbers.h"

namespace ptx {

using Shared = uint32_t;

struct Half : emulator::Fp16 {};
struct BFloat : emulator::Bf16 {};
struct Int8 : emulator::Integer<8, true> {};
struct Int4 : emulator::Integer<4, true> {};
struct Uint4 : emulator::Integer<4, false> {};

inline Shared shared_memory() { return 0; }

inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline uint64_t evict_first() { return 0; }
inline void copy_async(Shared to, const void* from, int bytes) {
  emulator::copy_async(to, from, static_cast<uint32_t>(bytes));
}
inline void copy_async(Shared to, const void* from, int bytes, uint64_t) {
  copy_async(to, from, bytes);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
void wait_copies() {
  emulator::wait_copies(pending);
}

namespace detail {

struct SharedAccess {
  Shared address;
  void* value;
};

// All lanes of a warp together, so that conflicts can be counted.
template <class Value, emulator::Access access>
void access_shared(void* const* lanes) {
  Shared addresses[32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<SharedAccess*>(lanes[lane]);
    addresses[lane] = own.address;
    unsigned char* at = emulator::shared_of_lane(lane, own.address, sizeof(Value), access);
    if (access == emulator::Access::read) {
      std::memcpy(own.value, at, sizeof(Value));
    } else {
      std::memcpy(at, own.value, sizeof(Value));
    }
  }
  emulator::count_bank_conflicts(addresses, sizeof(Value));
}

struct MatrixRow {
  Shared row;
  uint32_t* registers;
};

// Matrix m is rows 8m .. 8m+7, at the addresses of those lanes; lane 4r + c gets columns 2c, 2c+1
// of row r of each.
inline void load_four_matrices(void* const* lanes) {
  ++emulator::counters.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    Shared addresses[32];
    for (int row = 0; row < 8; ++row) {
      const auto& own = *static_cast<MatrixRow*>(lanes[8 * matrix + row]);
      const unsigned char* at =
          emulator::shared_of_lane(8 * matrix + row, own.row, 16, emulator::Access::read);
      for (int column = 0; column < 4; ++column) {
        std::memcpy(&static_cast<MatrixRow*>(lanes[4 * row + column])->registers[matrix],
                    at + 4 * column, 4);
      }
      for (int part = 0; part < 4; ++part) addresses[4 * row + part] = own.row + 4 * part;
    }
    emulator::count_bank_conflicts(addresses, 4);
  }
}

struct Product {
  const uint32_t *a, *b;
  float* c;
};

// mma.m16n8k16, as the PTX manual's figures have it: with g = lane / 4 and t = lane % 4, a register
// r holds row g + 8 (r % 2) and columns 2t, 2t + 1, + 8 (r / 2), of 16 x 16; a register r of b
// holds rows 2t, 2t + 1, + 8 r and column g, of 16 x 8; c[i] is row g + 8 (i / 2) and column 2t + i
// % 2. Sums are exact here and rounded once; the hardware rounds more often.
template <class Element>
void multiply_fragments(void* const* lanes) {
  ++emulator::counters.matrix_products;
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      const auto value = [i](uint32_t pair) { return Element::decode(pair >> (16 * i) & 0xffff); };
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = value(own.a[r]);
      for (int r = 0; r < 2; ++r) b[2 * t + i + 8 * r][g] = value(own.b[r]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[i] = static_cast<float>(sum);
    }
  }
}

struct SparseProduct {
  const uint32_t *a, *b;
  uint32_t places;
  float* c;
};

// mma.sp.m16n8k32: a register of a holds two columns that are kept, at the places of mma.m16n8k16
// in 16 x 16; b has rows 2t, 2t + 1, + 8 r in register r, of 32 x 8. Lane 2 pair + h of every four
// has the places of the columns 8 h .. 8 h + 7 that are kept, of its row g and of g + 8.
template <class Element, int pair>
void multiply_sparse_fragments(void* const* lanes) {
  ++emulator::counters.matrix_products;
  const auto own = [lanes](int lane) -> const SparseProduct& {
    return *static_cast<SparseProduct*>(lanes[lane]);
  };
  double a[16][32] = {}, b[32][8];
  bool kept_at[16][32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r % 2), kept = 2 * t + i + 8 * (r / 2);
        const uint32_t places = own(4 * g + 2 * pair + kept / 8).places >> (row - g) * 2;
        const uint32_t four = places >> kept % 8 / 2 * 4 & 15;
        if ((four & 3) >= four >> 2) emulator::fault("mma.sp with places that do not ascend");
        const int column = kept / 2 * 4 + static_cast<int>(four >> 2 * (kept % 2) & 3);
        kept_at[row][column] = true;
        a[row][column] = Element::decode(own(lane).a[r] >> (16 * i) & 0xffff);
        b[2 * t + i + 8 * r][g] = Element::decode(own(lane).b[r] >> (16 * i) & 0xffff);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<SparseProduct*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = c[i];
      // A column that is not kept is not multiplied, whatever its input is.
      for (int k = 0; k < 32; ++k) {
        if (kept_at[row][k]) sum += a[row][k] * b[k][column];
      }
      c[i] = static_cast<float>(sum);
    }
  }
}

struct IntegerProduct {
  const uint32_t *a, *b;
  const int* c;
  int* d;
};

// mma.m16n8k32 of bytes and m16n8k64 of nibbles: with e elements to a register, a register r of a
// holds row g + 8 (r % 2) and columns e t .. e t + e - 1, + 4 e (r / 2), of 16 x 8 e; a register r
// of b holds rows e t .. e t + e - 1, + 4 e r, and column g; c and d are as above.
template <class Left, class Right>
void multiply_integer_fragments(void* const* lanes) {
  ++emulator::counters.matrix_products;
  constexpr int each = 32 / Left::kBits, depth = 8 * each;
  int a[16][depth], b[8][depth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<IntegerProduct*>(lanes[lane]);
    const int g = lane / 4, first = lane % 4 * each;
    for (int i = 0; i < each; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[g + 8 * (r % 2)][first + i + 4 * each * (r / 2)] = Left::decode(own.a[r], i);
      }
      for (int r = 0; r < 2; ++r) b[g][first + i + 4 * each * r] = Right::decode(own.b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<IntegerProduct*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      int sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[column][k];
      own.d[i] = own.c[i] + sum;
    }
  }
}

struct Exchange {
  int* result;
  int value, other;
};

inline void exchange_values(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<Exchange*>(lanes[lane]);
    *own.result = static_cast<Exchange*>(lanes[lane ^ own.other])->value;
  }
}

template <class Element>
uint32_t fma_lane(uint32_t a, uint32_t b, uint32_t c, int shift) {
  const auto decode = [&](uint32_t pair) {
    return static_cast<double>(Element::decode(pair >> shift & 0xffff));
  };
  return static_cast<uint32_t>(Element::encode(decode(a) * decode(b) + decode(c))) << shift;
}

}  // namespace detail

template <class Value>
Value load_shared(Shared from) {
  Value value;
  detail::SharedAccess own{from, &value};
  emulator::collective("a load from shared memory", &own,
                       detail::access_shared<Value, emulator::Access::read>);
  return value;
}

template <class Value>
void store_shared(Shared to, Value value) {
  detail::SharedAccess own{to, &value};
  emulator::collective("a store to shared memory", &own,
                       detail::access_shared<Value, emulator::Access::write>);
}

// Conflicts are not counted here: who comes at the same time is not known.
template <class Value = float>
Value load_shared_alone(Shared from) {
  Value value;
  std::memcpy(&value, emulator::shared(from, sizeof value, emulator::Access::read), sizeof value);
  return value;
}

template <class Value>
void store_shared_alone(Shared to, Value value) {
  std::memcpy(emulator::shared(to, sizeof value, emulator::Access::write), &value, sizeof value);
}

inline void load_matrices(uint32_t (&registers)[4], Shared row) {
  detail::MatrixRow own{row, registers};
  emulator::collective("ldmatrix", &own, detail::load_four_matrices);
}

template <class Element>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  detail::Product own{a, b, c};
  emulator::collective("mma", &own, detail::multiply_fragments<Element>);
}

template <class Element, int pair>
void multiply_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t places) {
  detail::SparseProduct own{a, b, places, c};
  emulator::collective("mma.sp", &own, detail::multiply_sparse_fragments<Element, pair>);
}

template <class Left, class Right>
void multiply_integers(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const int (&c)[4]) {
  detail::IntegerProduct own{a, b, c, d};
  emulator::collective("an integer mma", &own, detail::multiply_integer_fragments<Left, Right>);
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float product(float a, float b) { return a * b; }
inline float power_of_two(float a) { return std::exp2(a); }
inline float quotient(float a, float b) { return a / b; }
inline float nearest(float a) { return std::nearbyint(a); }
inline float as_float(int bits) { return emulator::float_of_bits(static_cast<uint32_t>(bits)); }
inline int as_bits(float value) { return static_cast<int>(emulator::bits_of_float(value)); }

inline int exchange(int value, int other) {
  detail::Exchange own{&value, value, other};
  emulator::collective("a shuffle", &own, detail::exchange_values);
  return value;
}

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) ^ bits; }

template <class Element>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  return detail::fma_lane<Element>(a, b, c, 0) | detail::fma_lane<Element>(a, b, c, 16);
}

template <class Element>
float to_float(uint32_t low_bits) {
  return Element::decode(low_bits & 0xffff);
}

template <class Element>
uint32_t to_pair(float low, float high) {
  return Element::encode(low) | static_cast<uint32_t>(Element::encode(high)) << 16;
}

template <class Value>
Value load_global(const void* from) {
  Value value;
  std::memcpy(&value, emulator::global_read(from, sizeof value), sizeof value);
  return value;
}

template <class Value>
Value load_global_from_l2(const void* from) {
  return load_global<Value>(from);
}

template <class Value>
void store_global(void* to, Value value) {
  std::memcpy(emulator::global_write(to, sizeof value), &value, sizeof value);
}

inline int load_acquire(const int* from) { return emulator::load_acquire(from); }
inline void store_release(int* to, int value) { emulator::store_release(to, value); }

}  // namespace ptx
