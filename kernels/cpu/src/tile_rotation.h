// A token rotated and put in order (TileForm of tiles.h), for every unit.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace {

// Numbers whose places differ by 2^stage within a vector: (u, v) -> (u + v, u - v).
template <int stage>
inline Lanes butterfly(Lanes a) {
  constexpr int32_t m = INT32_MIN;
  static const int32_t signs[4][16] = {
      {0, m, 0, m, 0, m, 0, m, 0, m, 0, m, 0, m, 0, m},
      {0, 0, m, m, 0, 0, m, m, 0, 0, m, m, 0, 0, m, m},
      {0, 0, 0, 0, m, m, m, m, 0, 0, 0, 0, m, m, m, m},
      {0, 0, 0, 0, 0, 0, 0, 0, m, m, m, m, m, m, m, m},
  };
  return swap_lanes<1 << stage>(a) + bits_as_floats(float_bits(a) ^ load_int(signs[stage]));
}

// Two stages for numbers `apart` from each other and then twice as far.
inline void two_stages(float* x, int64_t apart) {
  const Lanes a = load(x), b = load(x + apart);
  const Lanes c = load(x + 2 * apart), d = load(x + 3 * apart);
  const Lanes sum = a + b, difference = a - b, second_sum = c + d, second_difference = c - d;
  store(x, sum + second_sum);
  store(x + apart, difference + second_difference);
  store(x + 2 * apart, sum - second_sum);
  store(x + 3 * apart, difference - second_difference);
}

// x[0..count) *= norm, then times blocks of Sylvester's matrix of order `power`, at least 16.
inline void multiply_sylvester(const float* x, int64_t count, int64_t power, float norm,
                               float* out) {
  for (int64_t k = 0; k < count; k += kLanes) {
    Lanes a = load(x + k) * broadcast(norm);
    a = butterfly<1>(butterfly<0>(a));
    store(out + k, butterfly<3>(butterfly<2>(a)));
  }
  int64_t apart = kLanes;
  for (; 2 * apart < power; apart *= 4) {
    for (int64_t block = 0; block < count; block += 4 * apart) {
      for (int64_t k = 0; k < apart; k += kLanes) two_stages(out + block + k, apart);
    }
  }
  if (apart == power) return;
  for (int64_t block = 0; block < count; block += 2 * apart) {
    for (int64_t k = block; k < block + apart; k += kLanes) {
      const Lanes a = load(out + k), b = load(out + k + apart);
      store(out + k, a + b);
      store(out + k + apart, a - b);
    }
  }
}

// The same for a count that `power` need not divide: the blocks that fit, and one more over the last
// `power` numbers, on what the others have made of them.
inline void multiply_overlapping(const float* x, int64_t count, int64_t power, float norm,
                                 float* out) {
  const int64_t whole = count / power * power;
  multiply_sylvester(x, whole, power, norm, out);
  if (whole == count) return;
  memcpy(out + whole, x + whole, static_cast<size_t>(count - whole) * sizeof(float));
  float* const last = out + count - power;
  multiply_sylvester(last, power, power, norm, last);
}

// `outputs` rows of H^T times `vectors` neighbouring vectors of x [m, power].
template <int outputs, int vectors>
inline void dense_tile(const float* dense, int64_t m, const float* x, int64_t power, float* out) {
  Lanes sums[outputs][vectors];
  for (int o = 0; o < outputs; ++o) {
    for (int v = 0; v < vectors; ++v) sums[o][v] = zero_lanes();
  }
  for (int64_t i = 0; i < m; ++i, dense += m, x += power) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Lanes input = load(x + v * kLanes);
#pragma GCC unroll 8
      for (int o = 0; o < outputs; ++o) sums[o][v] = fma(input, broadcast(dense[o]), sums[o][v]);
    }
  }
  for (int o = 0; o < outputs; ++o) {
    for (int v = 0; v < vectors; ++v) store(out + o * power + v * kLanes, sums[o][v]);
  }
}

// All of out [m, power] for some columns. m is a multiple of 4, as every Hadamard order above 2 is.
template <int vectors>
inline void dense_columns(const float* dense, int64_t m, const float* x, int64_t power,
                          float* out) {
  constexpr int outputs = kOneRegister ? 8 : 4;
  int64_t o = 0;
  for (; o + outputs <= m; o += outputs) {
    dense_tile<outputs, vectors>(dense + o, m, x, power, out + o * power);
  }
  for (; o < m; o += 4) dense_tile<4, vectors>(dense + o, m, x, power, out + o * power);
}

// out = H^T x for each block x [m, power] of the `count` numbers; power is at least 16.
inline void multiply_dense(const float* dense, int64_t m, int64_t power, const float* x,
                           int64_t count, float* out) {
  constexpr int vectors = kOneRegister ? 2 : 1;
  for (int64_t block = 0; block < count; block += m * power) {
    int64_t j = block;
    for (; j + vectors * kLanes <= block + power; j += vectors * kLanes) {
      dense_columns<vectors>(dense, m, x + j, power, out + j);
    }
    for (; j < block + power; j += kLanes) dense_columns<1>(dense, m, x + j, power, out + j);
  }
}

// out = (x * norm) H for blocks of m numbers.
inline void multiply_rows(const float* dense, int64_t m, float norm, const float* x, int64_t count,
                          float* out) {
  for (int64_t block = 0; block < count; block += m) {
    for (int64_t j = 0; j < m; j += kLanes) {
      const int64_t left = smaller_of(m - j, kLanes);
      Lanes sum = zero_lanes();
      for (int64_t i = 0; i < m; ++i) {
        sum = fma(broadcast(x[block + i] * norm), load_first(dense + i * m + j, left), sum);
      }
      store_first(out + block + j, sum, left);
    }
  }
}

// The token x [K] as its form's rotation and order leave it: in x itself or in `work`.
inline const float* arranged(const ql::TiledWeight& w, const ql::TileForm& form, const float* x,
                             float* work) {
  const int64_t columns = w.columns, rotated = columns - form.still;
  float* next = work + (columns + kLanes - 1) / kLanes * kLanes;
  const float* const still = x + rotated;
  if (form.dense_order && form.power == 1) {
    multiply_rows(form.dense, form.dense_order, form.norm, x, rotated, work);
    x = work;
  } else if (form.dense_order) {
    multiply_overlapping(x, rotated, form.power, form.norm, work);
    x = work;
    if (form.dense_order > 1) {
      multiply_dense(form.dense, form.dense_order, form.power, x, rotated, next);
      x = next;
    }
  }
  if (form.dense_order && form.still) {
    memcpy((x == work ? work : next) + rotated, still,
           static_cast<size_t>(form.still) * sizeof(float));
  }
  if (!form.order) return x;
  float* out = x == next ? work : next;
  for (int64_t k = 0; k < columns; ++k) out[k] = x[form.order[k]];
  return out;
}

}  // namespace
