// The plain C interface of the CPU kernels: what Python fills in (kernels/cpu/library.py mirrors
// these structs) and calls.
//
// A weight is used exactly as the checkpoint stores it, so its file can be mapped and nothing is
// copied: every pointer below points into a canonical tensor, with no alignment beyond that of
// bytes.
#pragma once

#include <cstdint>

#define QL_API extern "C" __attribute__((visibility("default")))

constexpr int32_t QL_ABI_VERSION = 1;

enum QlIsa : int32_t { QL_ISA_BEST = 0, QL_ISA_PORTABLE = 1, QL_ISA_AVX2 = 2, QL_ISA_AVX512 = 3 };

enum QlStatus : int32_t {
  QL_OK = 0,
  QL_NO_MEMORY = 1,
  QL_NO_SUCH_ISA = 2,
  QL_ROW_OUT_OF_RANGE = 3
};

enum QlRowScale : int32_t { QL_ROW_SCALE_NONE = 0, QL_ROW_SCALE_F16 = 1, QL_ROW_SCALE_F32 = 2 };

// Columns [start, start + length) of a weight, in one format.
struct QlSegment {
  // Rows of row_bytes: codes bit-contiguous along K, least significant bit first.
  const uint8_t* packed;
  // Rows of scale_row_bytes: float16 [groups], or as many scale codes of scale_bits each.
  const uint8_t* scale;
  // A further factor of all scales of a row, float16 or float32; null when there is none.
  const uint8_t* row_scale;
  // int32 [ceil(N*zero_bits/32), groups]: codes packed along N, each worth zero_step weight codes;
  // null when symmetric.
  const uint8_t* zero_point;
  const float* code_book;   // 2^bits values of a float element; null for integers
  const float* scale_book;  // 2^scale_bits values of the scale codes; null for float16 scales
  int64_t row_bytes;
  int64_t scale_row_bytes;   // 0: one row of scales and zero points serves all rows
  int64_t row_scale_stride;  // in elements; 0: one value serves all rows
  int64_t start;
  int64_t length;
  int64_t group_size;  // a multiple of 16; 0: the whole segment is one group
  int32_t groups;
  int32_t bits;            // 2..8
  int32_t scale_bits;      // 16 for float16
  int32_t row_scale_kind;  // QlRowScale
  int32_t zero_bits;
  float zero_step;
};

struct QlWeight {
  const QlSegment* segments;
  int64_t rows;     // N, output features
  int64_t columns;  // K, input features
  int64_t segment_count;
};

QL_API int32_t ql_abi_version();
QL_API int64_t ql_segment_bytes();  // sizeof(QlSegment), for the other side to compare
QL_API int32_t ql_best_isa();
QL_API int32_t ql_supports_isa(int32_t isa);

// y [M, N] = x [M, K] * weight^T + bias, float32, row-major; bias may be null. Returns a QlStatus.
//   int8:  x is rounded per token to int8 (scale amax/127) and multiplied in integers; every
//   element
//          must be an integer.
//   exact: x stays float32. Meant for few tokens: the weight is decoded again for every four.
QL_API int32_t ql_linear_int8(const QlWeight* weight, const float* x, int64_t tokens,
                              const float* bias, float* y, int32_t isa, int32_t threads);
QL_API int32_t ql_linear_exact(const QlWeight* weight, const float* x, int64_t tokens,
                               const float* bias, float* y, int32_t isa, int32_t threads);

// out [count, K] float32: the dequantized rows `ids` (int64 [count]), or first .. first + count - 1
// when ids is null.
QL_API int32_t ql_dequantize(const QlWeight* weight, const int64_t* ids, int64_t first,
                             int64_t count, float* out, int32_t isa, int32_t threads);
