// The two products of attention, scores = queries * keys and output = weights * values, in register
// tiles. Needs lanes.h.
#pragma once

#include "lanes.h"

namespace {

// As many accumulators as registers allow: 24 of 32 with AVX-512, 12 of 16 with AVX2 (two each).
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 1;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 1;
#endif

// c [rows][columns] = c * carry + a [rows][depth] * b [depth][columns]: one fma per product, depth
// in order. Without `carry` c counts as 0. Strides are in floats.
struct Product {
  const float* a;
  const float* b;
  float* c;
  const float* carry;  // [rows] or null
  int64_t a_stride;
  int64_t b_stride;
  int64_t c_stride;
  int64_t depth;
};

template <int kRows, int kVectors>
inline void product_tile(const Product& p, int64_t column) {
  Lanes sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = p.carry ? load(p.c + r * p.c_stride + column + 16 * v) * broadcast(p.carry[r])
                           : zero_lanes();
    }
  }
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k, b += p.b_stride) {
    Lanes from_b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) from_b[v] = load(b + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Lanes from_a = broadcast(p.a[r * p.a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(from_a, from_b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(p.c + r * p.c_stride + column + 16 * v, sums[r][v]);
  }
}

template <int kRows, int kVectors>
inline void product_columns(const Product& p, int64_t column, int64_t columns) {
  for (; column + 16 * kVectors <= columns; column += 16 * kVectors) {
    product_tile<kRows, kVectors>(p, column);
  }
  if constexpr (kVectors > 1) {
    if (column < columns) product_columns<kRows, kVectors - 1>(p, column, columns);
  }
}

// rows <= kTileRows; columns a multiple of 16.
template <int kRows = kTileRows>
inline void product(const Product& p, int64_t rows, int64_t columns) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return product<kRows - 1>(p, rows, columns);
  }
  product_columns<kRows, kTileVectors>(p, 0, columns);
}

}  // namespace
