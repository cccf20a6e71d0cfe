// What an instruction set offers to the decoder engine beside tiled linears and attention. All sums
// run over 16 lanes in a fixed order and every product is a fused one, so that results depend on no
// instruction set; rows and tokens are independent, so that any thread may compute any of them.
#pragma once

#include <cstdint>

namespace ql {

// A weight kept as numbers: [rows, columns], rows contiguous.
struct DenseWeight {
  const void* data;
  int64_t rows;
  int64_t columns;
  int32_t type;  // QlDenseType
};

// One piece of work on dense weights: y [tokens, rows] = x * weight^T + bias.
struct DenseProblem {
  DenseWeight weight;
  const float* x;  // [tokens, columns] at x_stride
  float* y;        // [tokens, rows] at y_stride
  const float* bias;  // [rows] or null
  int64_t x_stride;
  int64_t y_stride;
  int64_t tokens;
};

struct EngineKernels {
  // out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]; out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float epsilon, float* out);
  // x[i] += y[i]
  void (*add)(float* x, const float* y, int64_t count);
  // x[i] *= factor
  void (*multiply)(float* x, float factor, int64_t count);
  // Rotates pairs (x[i], x[i + count]) by angles given by their cosines and sines [count].
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t count);
  // out[i] = activation(gate[i]) * up[i], a QlActivation; out may be gate or up.
  void (*gate)(const float* gate, const float* up, int64_t count, int32_t activation, float* out);
  // x[i] = softcap(x[i] * scale, cap), see engine.h.
  void (*softcap)(float* x, int64_t count, float scale, float cap);
  // The first index of the largest of x[0..count), count >= 1; the first NaN where there is one.
  int64_t (*largest)(const float* x, int64_t count);
  // Output rows [first, last) of a dense problem.
  void (*dense_rows)(const DenseProblem& problem, int64_t first, int64_t last);
  // out [columns] = row `row` of a dense weight, as floats.
  void (*dense_row)(const DenseWeight& weight, int64_t row, float* out);
};

// One table per width of vectors.
extern const EngineKernels portable_engine;
extern const EngineKernels avx2_engine;  // where build.py compiles them
extern const EngineKernels avx512_engine;

// The kernels of a QlIsa; null when this processor does not have it.
const EngineKernels* engine_kernels_of(int32_t isa);

}  // namespace ql
