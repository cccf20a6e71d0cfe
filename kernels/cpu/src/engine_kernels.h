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
  bool accumulate;  // y += instead of y =
};

// Heads of some rows times a matrix [size, padded] from the right, in place: `heads` of `size`
// numbers side by side in each row.
struct TurnProblem {
  const float* matrix;  // columns padded with zeros to a multiple of 16
  float* x;
  int64_t stride;  // of rows
  int64_t rows;
  int64_t heads;
  int64_t size;  // at most kKvMaxHeadDim
};

// Rows of numbers side by side: `count` of each row, rows `stride` floats apart.
struct GateProblem {
  const float* gate;
  const float* up;
  float* out;
  int64_t in_stride;
  int64_t out_stride;
  int64_t rows;
  int64_t count;
  int32_t activation;  // QlActivation
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
  // One fma per product, in the order of the matrix's rows.
  void (*turn)(const TurnProblem& problem);
  // x [count] becomes codes within +-levels times its largest magnitude / levels; NaN when one is
  // not finite.
  void (*round_to_levels)(float* x, int64_t count, float levels);
  // out[i] = activation(gate[i]) * up[i].
  void (*gate)(const GateProblem& problem);
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
