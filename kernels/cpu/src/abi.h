// The plain C interface of the CPU kernels: what Python fills in (kernels/cpu/library.py mirrors
// these structs) and calls. The decoder's own part of it is in engine.h.
//
// A weight comes in the canonical tensors of a checkpoint (QlWeight) and is rearranged once into
// tiles (tiles.h); everything is computed from those. The caller owns all memory. The handle of a
// tiled weight is a pointer to a ql::TiledWeight, filled by ql_tile_describe; it may be copied and
// put in arrays, as long as the memory of the tiles lives.
#pragma once

#include "tiles.h"

#define QL_API extern "C" __attribute__((visibility("default")))

constexpr int32_t QL_ABI_VERSION = 3;

// BEST: what the environment variable QUANTLIB_ISA names, else the best of this processor.
enum QlIsa : int32_t {
  QL_ISA_BEST = 0,
  QL_ISA_PORTABLE = 1,
  QL_ISA_AVX2 = 2,        // with FMA, F16C and BMI2
  QL_ISA_AVX2VNNI = 3,    // ... and AVX-VNNI
  QL_ISA_AVX512VNNI = 4,  // F, BW, DQ, VL, VNNI
  QL_ISA_AVX512 = 5       // ... and VBMI
};

enum QlStatus : int32_t {
  QL_OK = 0,
  QL_NO_MEMORY = 1,
  QL_NO_SUCH_ISA = 2,
  QL_ROW_OUT_OF_RANGE = 3
};

// Columns [start, start + length) of a canonical weight, in one format. ql_tile_pack reads the four
// tensors, ql_tile_unpack writes them; the pointers need no alignment. What the other fields mean
// for a kernel is said in tiles.h.
struct QlSegment {
  // Rows of row_bytes: codes bit-contiguous along K, least significant bit first, then zeros.
  uint8_t* packed;
  // Rows of scale_row_bytes: float16 or bytes [groups], or as many codes of scale_bits each.
  uint8_t* scale;
  // SCALE_CODE: float16 [N]. SCALE_E4M3: float32 [1]. Else null.
  uint8_t* row_scale;
  // int32 [ceil(N*zero_bits/32), groups]: codes packed along N; null when zero_bits is 0.
  uint8_t* zero_point;
  const float* float_values;
  const uint8_t* integer_values;
  int64_t row_bytes;
  int64_t scale_row_bytes;  // 0: one row of scales and zero points serves all rows
  int64_t start;
  int64_t length;
  int64_t group_size;  // a multiple of 16; 0: the whole segment is one group
  int64_t groups;
  int32_t bits;        // 2..8
  int32_t scale_kind;  // ql::ScaleKind
  int32_t scale_bits;  // of one stored scale
  int32_t zero_bits;   // 0: symmetric
  float zero_step;
  float zero_constant;
  float integer_unit;
  int32_t reserved;
};

struct QlWeight {
  const QlSegment* segments;
  int64_t segment_count;
  int64_t rows;     // N, output features
  int64_t columns;  // K, input features
};

QL_API int32_t ql_abi_version();

// sizeof QlSegment, ql::TileSegment, ql::TileForm and ql::TileRounding, for the other side to
// compare.
QL_API void ql_struct_bytes(int64_t sizes[4]);

// What QL_ISA_BEST stands for; 0 when QUANTLIB_ISA names nothing that this processor has.
QL_API int32_t ql_chosen_isa();
QL_API int32_t ql_supports_isa(int32_t isa);

// Memory for tiles: 64-byte aligned, in huge pages where the system allows it. Null: there is none.
QL_API uint8_t* ql_allocate(int64_t bytes);
QL_API void ql_free(uint8_t* memory, int64_t bytes);  // `bytes` as asked for

// Bytes of the memory that holds the tiles of a weight.
QL_API int64_t ql_tile_bytes(const QlWeight* weight);

// Fill tiles[segment_count] for tiles in `memory`, 64-byte aligned; tensors are not looked at.
QL_API void ql_tile_describe(const QlWeight* weight, const uint8_t* memory,
                             ql::TileSegment* tiles);

// Canonical tensors -> memory of ql_tile_bytes, and back, bit for bit. Return a QlStatus.
QL_API int32_t ql_tile_pack(const QlWeight* weight, uint8_t* memory, int32_t isa, int32_t threads);
QL_API int32_t ql_tile_unpack(const QlWeight* weight, const uint8_t* memory, int32_t isa,
                              int32_t threads);

// y [M, N] = x [M, K] * weight^T + bias, float32, row-major; bias may be null. Returns a QlStatus.
//   int8:  x is rounded to int8 per token, or per token and `act_group` columns when that is not 0
//          (a multiple of 128). Weights with an element that has no int8 mode are multiplied with
//          the rounded x in floats.
//   exact: x as it is.
// The number of threads changes no bit.
QL_API int32_t ql_linear_int8(const ql::TiledWeight* weight, const float* x, int64_t tokens,
                              int64_t act_group, const float* bias, float* y, int32_t isa,
                              int32_t threads);
QL_API int32_t ql_linear_exact(const ql::TiledWeight* weight, const float* x, int64_t tokens,
                               const float* bias, float* y, int32_t isa, int32_t threads);

// The same with tokens in a form (tiles.h): rotated, put in order, and rounded segment by segment of
// the weight, as its elements allow; exact when the form does not round.
QL_API int32_t ql_linear_as(const ql::TiledWeight* weight, const ql::TileForm* form,
                            const float* x, int64_t tokens, const float* bias, float* y,
                            int32_t isa, int32_t threads);

// out [count, K] float32: the dequantized rows `ids` (int64 [count]), or first .. first + count - 1
// when ids is null.
QL_API int32_t ql_dequantize(const ql::TiledWeight* weight, const int64_t* ids, int64_t first,
                             int64_t count, float* out, int32_t isa, int32_t threads);
