// What an instruction set's translation unit offers to the driver: tables of functions, no symbols
// shared by name.
//
// One rule keeps the dispatch safe. A translation unit built with -mavx512* must not emit code that
// the linker could merge with that of another unit: an inline function or template with external
// linkage, instantiated here, could replace the portable copy and crash an older CPU. So the ISA
// units and the headers they share use anonymous namespaces only, and nothing from the C++ standard
// library.
#pragma once

#include "abi.h"

namespace ql {

// One call of linear. `tokens_data` holds what `prepare` made of each token, at `token_bytes`
// intervals.
struct Problem {
  const QlWeight* weight;
  const float* x;     // [tokens, K]
  const float* bias;  // [N] or null
  float* y;           // [tokens, N]
  int64_t tokens;
  uint8_t* token_data;
  int64_t token_bytes;
};

// A way of computing y. The driver calls `prepare` once per token, then `rows` on disjoint ranges
// of output rows, from any number of threads. Ranges begin at multiples of row_block, so a row's
// result does not depend on the split.
struct LinearKernel {
  int64_t row_block;
  int64_t serial_work;  // multiply-adds that take about 50 us: below it, waking other threads costs
                        // more than it saves
  int64_t (*token_bytes)(const QlWeight& weight, int64_t tokens);
  int64_t (*scratch_bytes)(const QlWeight& weight, int64_t tokens);
  void (*prepare)(const Problem& problem, int64_t token);
  void (*rows)(const Problem& problem, int64_t begin, int64_t end, uint8_t* scratch);
};

struct IsaKernels {
  LinearKernel int8;
  LinearKernel exact;
  int64_t (*dequantize_scratch_bytes)(const QlWeight& weight);
  void (*dequantize_row)(const QlWeight& weight, int64_t row, float* out, uint8_t* scratch);
};

extern const IsaKernels portable_kernels;
extern const IsaKernels avx2_kernels;    // these two only where build.py compiles them,
extern const IsaKernels avx512_kernels;  // which it tells driver.cpp by QL_X86

}  // namespace ql
