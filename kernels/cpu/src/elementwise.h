// The small operations between the linears of a decoder, and dense linears: EngineKernels on
// lanes.h, compiled once for every width of vectors.
#pragma once

#include "attention_tile.h"
#include "engine.h"
#include "engine_kernels.h"
#include "lanes.h"
#include "ordering.h"

namespace {

// Calls body(i, count) for every 16 of [0, total): count is 16, or less for the last ones.
template <typename Body>
inline void for_lanes(int64_t total, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= total; i += kLanes) body(i, kLanes);
  if (i < total) body(i, total - i);
}

inline Lanes load_some(const float* from, int64_t count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

inline void store_some(float* to, Lanes value, int64_t count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_first(to, value, count);
  }
}

void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* out) {
  Lanes squares = zero_lanes();
  for_lanes(count, [&](int64_t i, int64_t n) {
    const Lanes value = load_some(x + i, n);
    squares = fma(value, value, squares);
  });
  const float mean = sum_of(squares) / static_cast<float>(count);
  const Lanes factor = broadcast(1.0f / __builtin_sqrtf(mean + epsilon));
  for_lanes(count, [&](int64_t i, int64_t n) {
    store_some(out + i, load_some(x + i, n) * factor * load_some(weight + i, n), n);
  });
}

void add_to(float* x, const float* y, int64_t count) {
  for_lanes(count, [&](int64_t i, int64_t n) {
    store_some(x + i, load_some(x + i, n) + load_some(y + i, n), n);
  });
}

void multiply_by(float* x, float factor, int64_t count) {
  for_lanes(count, [&](int64_t i, int64_t n) {
    store_some(x + i, load_some(x + i, n) * broadcast(factor), n);
  });
}

void rotate(float* x, const float* cosine, const float* sine, int64_t count) {
  for_lanes(count, [&](int64_t i, int64_t n) {
    const Lanes a = load_some(x + i, n), b = load_some(x + count + i, n);
    const Lanes c = load_some(cosine + i, n), s = load_some(sine + i, n);
    store_some(x + i, a * c - b * s, n);
    store_some(x + count + i, b * c + a * s, n);
  });
}

inline void copy_row(const float* from, float* to, int64_t count) {
  for_lanes(count, [&](int64_t i, int64_t n) { store_some(to + i, load_some(from + i, n), n); });
}

void turn(const ql::TurnProblem& p) {
  constexpr int64_t kMost = ql::kKvMaxHeadDim;
  alignas(64) float in[kTileRows * kMost], out[kTileRows * kMost];
  const int64_t padded = (p.size + kLanes - 1) / kLanes * kLanes;
  const bool whole = padded == p.size;  // nothing is written beside a head: it can be in place
  // Rows far apart, or the heads of one row side by side: what there is more of makes a tile.
  const bool across = p.rows > 1 && p.heads < kTileRows;
  const int64_t inner = across ? p.rows : p.heads, outer = across ? p.heads : p.rows;
  const int64_t step = across ? p.stride : p.size, jump = across ? p.size : p.stride;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; j += kTileRows) {
      const int64_t count = smaller_of(inner - j, kTileRows);
      float* x = p.x + i * jump + j * step;
      for (int64_t r = 0; r < count; ++r) copy_row(x + r * step, in + r * padded, p.size);
      product({in, p.matrix, whole ? x : out, nullptr, padded, padded, whole ? step : padded,
               p.size},
              count, padded);
      if (whole) continue;
      for (int64_t r = 0; r < count; ++r) copy_row(out + r * padded, x + r * step, p.size);
    }
  }
}

void round_to_levels(float* x, int64_t count, float levels) {
  Lanes largest = zero_lanes(), difference = zero_lanes();
  for_lanes(count, [&](int64_t i, int64_t n) {
    const Lanes value = load_some(x + i, n);
    largest = max_of(abs_of(value), largest);
    difference = difference + (value - value);  // NaN for infinities and NaNs
  });
  float scale = highest(largest) / levels;
  if (sum_of(difference) != 0.0f) scale = __builtin_nanf("");
  const Lanes factor = broadcast(scale), divisor = broadcast(scale > 0.0f ? scale : 1.0f);
  for_lanes(count, [&](int64_t i, int64_t n) {
    store_some(x + i, round_to_even(load_some(x + i, n) / divisor) * factor, n);
  });
}

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)).
inline Lanes gelu_tanh_of(Lanes x) {
  const Lanes cubic = fma(x * x, broadcast(0.044715f), broadcast(1.0f)) * x;
  return x / (broadcast(1.0f) + exp_of(cubic * broadcast(-1.5957691216057308f)));
}

template <typename Activation>
inline void gate_rows(const ql::GateProblem& p, Activation activation) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const float *gates = p.gate + row * p.in_stride, *up = p.up + row * p.in_stride;
    float* out = p.out + row * p.out_stride;
    for_lanes(p.count, [&](int64_t i, int64_t n) {
      store_some(out + i, activation(load_some(gates + i, n)) * load_some(up + i, n), n);
    });
  }
}

void gate(const ql::GateProblem& problem) {
  if (problem.activation == QL_SILU) {
    gate_rows(problem, [](Lanes x) { return silu_of(x); });
  } else {
    gate_rows(problem, [](Lanes x) { return gelu_tanh_of(x); });
  }
}

// cap * tanh(z / cap) as cap * (1 - 2 / (1 + e^(2 z / cap))): within 1e-7 of cap.
void softcap(float* x, int64_t count, float scale, float cap) {
  if (cap == 0.0f) return multiply_by(x, scale, count);
  const Lanes one = broadcast(1.0f), twice = broadcast(2.0f / cap);
  for_lanes(count, [&](int64_t i, int64_t n) {
    const Lanes z = load_some(x + i, n) * broadcast(scale);
    const Lanes tanh = one - broadcast(2.0f) / (one + exp_of(z * twice));
    store_some(x + i, tanh * broadcast(cap), n);
  });
}

// Blocks, because the compiler vectorizes a maximum but not a search.
int64_t largest(const float* x, int64_t count) {
  constexpr int64_t kBlock = 256;
  int32_t best = order_key(x[0]);
  int64_t block = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    int32_t highest_key = INT32_MIN;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t key = order_key(x[i]);
      highest_key = key > highest_key ? key : highest_key;
    }
    if (highest_key > best) {
      best = highest_key;
      block = begin;
    }
  }
  while (order_key(x[block]) != best) ++block;
  return block;
}

struct F32Row {
  using Element = float;
  static Lanes load16(const float* from) { return load(from); }
};
struct F16Row {
  using Element = uint16_t;
  static Lanes load16(const uint16_t* from) { return load_f16(from); }
};
struct Bf16Row {
  using Element = uint16_t;
  static Lanes load16(const uint16_t* from) { return load_bf16(from); }
};

// Up to 16 elements without reading past the row.
template <typename Row>
inline Lanes load_elements(const typename Row::Element* from, int64_t count) {
  if (count == kLanes) return Row::load16(from);
  typename Row::Element padded[kLanes] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(*from));
  return Row::load16(padded);
}

template <typename Row>
inline const typename Row::Element* row_of(const ql::DenseWeight& weight, int64_t row) {
  return static_cast<const typename Row::Element*>(weight.data) + row * weight.columns;
}

// kRows rows of the weight times kTokens tokens. A row's sum takes the same steps whatever the
// sizes of the block.
template <typename Row, int kRows, int kTokens>
inline void dense_block(const ql::DenseProblem& p, int64_t row, int64_t token) {
  Lanes sums[kRows][kTokens];
  for (auto& of_row : sums) {
    for (Lanes& sum : of_row) sum = zero_lanes();
  }
  for_lanes(p.weight.columns, [&](int64_t k, int64_t n) {
    Lanes x[kTokens];
    for (int t = 0; t < kTokens; ++t) x[t] = load_some(p.x + (token + t) * p.x_stride + k, n);
    for (int r = 0; r < kRows; ++r) {
      const Lanes w = load_elements<Row>(row_of<Row>(p.weight, row + r) + k, n);
      for (int t = 0; t < kTokens; ++t) sums[r][t] = fma(x[t], w, sums[r][t]);
    }
  });
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      const float bias = p.bias ? p.bias[row + r] : 0.0f;
      float* y = p.y + (token + t) * p.y_stride + row + r;
      const float sum = sum_of(sums[r][t]) + bias;
      *y = p.accumulate ? *y + sum : sum;
    }
  }
}

template <typename Row, int kRows>
inline void dense_tokens(const ql::DenseProblem& p, int64_t row) {
  int64_t token = 0;
  for (; token + 4 <= p.tokens; token += 4) dense_block<Row, kRows, 4>(p, row, token);
  for (; token < p.tokens; ++token) dense_block<Row, kRows, 1>(p, row, token);
}

template <typename Row>
void dense_rows_of(const ql::DenseProblem& p, int64_t first, int64_t last) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) dense_tokens<Row, 4>(p, row);
  for (; row < last; ++row) dense_tokens<Row, 1>(p, row);
}

void dense_rows(const ql::DenseProblem& p, int64_t first, int64_t last) {
  switch (p.weight.type) {
    case QL_DENSE_F32: return dense_rows_of<F32Row>(p, first, last);
    case QL_DENSE_F16: return dense_rows_of<F16Row>(p, first, last);
    default: return dense_rows_of<Bf16Row>(p, first, last);
  }
}

template <typename Row>
void dense_row_of(const ql::DenseWeight& weight, int64_t row, float* out) {
  for_lanes(weight.columns, [&](int64_t i, int64_t n) {
    store_some(out + i, load_elements<Row>(row_of<Row>(weight, row) + i, n), n);
  });
}

void dense_row(const ql::DenseWeight& weight, int64_t row, float* out) {
  switch (weight.type) {
    case QL_DENSE_F32: return dense_row_of<F32Row>(weight, row, out);
    case QL_DENSE_F16: return dense_row_of<F16Row>(weight, row, out);
    default: return dense_row_of<Bf16Row>(weight, row, out);
  }
}

constexpr ql::EngineKernels kEngineKernels = {
    rms_norm, add_to,  multiply_by, rotate,     turn,      round_to_levels,
    gate,     softcap, largest,     dense_rows, dense_row};

}  // namespace
