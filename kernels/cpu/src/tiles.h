// Tiles: how the CPU kernels keep a weight in memory, and what they are given to compute with it.
//
// A checkpoint stores rows, bit-contiguous along K. A kernel that multiplies 16 output rows at a
// time (one 32-bit lane each) wants them side by side, so a weight is rearranged once, at load
// (tile_pack.h), into *strips* of 32 rows: two *blocks* of 16. Along K a strip is cut into *pieces*
// of 16, 32, 64 or 128 columns that share one scale per row (a piece is one group, or 128 columns of
// a longer one), and a piece into *chunks* of 4 columns x 16 rows = 64 codes, byte 4*r + j of a chunk
// being column j of row r: one VPDPBUSD with four broadcast activations.
//
//   codes of a strip:  for each piece: block 0's chunks, then block 1's
//   meta of a strip:   for each piece: block 0's scales [, zeros], then block 1's
//
// Chunks of a piece, by the width b of a code:
//   8        64 bytes a chunk
//   4        64 bytes hold two chunks: low nibbles the first, high nibbles the second
//   2        64 bytes hold four chunks: bits 0-1 the first, 2-3 the second, ...
//   3 5 6 7  8*b bytes a chunk: eight codes (two rows) to b bytes, least significant bit first
//
// Columns of a segment are padded to a multiple of 32 and rows to a multiple of 32; padded codes are
// 0 and meet activations of 0, padded rows have scales of 0 and are not stored to the output. A last
// strip of at most 16 rows has block 0 only.
//
// The arithmetic is fixed, so that every instruction set, number of threads and number of tokens
// gives the same bits. Per output row and token:
//
//   int8:   y = bias (0 when there is none); for each segment in order:
//             total = 0; for each run of its columns that share a scale, in order:
//               dot   = sum over the run of code * a                  int32, exact
//               t     = fma(-zero, float(sum of a), float(dot))       both exact in float32
//               [act_group: t *= scale of the activation group]
//               total = fma(t, scale, total)
//             y = fma(total, scale of the token in the segment, y)    (1 when groups have theirs)
//   exact:  total = 0; for each piece of all segments in order:
//             acc   = fma(x[k], value(code) - zero, acc)  from 0, k in order over the piece
//             total = fma(acc, scale, total)
//           y = fma(total, token scale, bias)      (token scale 1: x was not rounded)
//
// A run is a piece; where activation groups are shorter than pieces (16, 32 or 64 columns of 128,
// say) it is a group, and several runs meet the same scale of the weight.
//
// Two-level scales are integers but for one number per row: where activations have no groups, the
// pieces of 512 columns are summed as integers (has_whole_sums), which costs less and rounds less.
// With zero_step = zero_units / code_units in lowest terms, the loop above is
//
//             for every kWholeRun columns:
//               t     = sum over their pieces of
//                       scale code * (code_units * dot - zero_units * zero code * sum of a)
//                                                                        int32, exact
//               total = fma(float(t), factor of the row * (1 / code_units), total)
//
// where for the same zero in all rows zero_units * zero code is zero_constant.
//
// Elsewhere scale = stored scale as a number * factor of the row (* integer_unit in int8 mode, which is 1 for
// integers); `a` are activations rounded to integers. Float elements are looked up in the segment's
// table first: as small integers where those exist (e2m1 in halves to e2m4 in sixteenths:
// `integer_values`), which is what int8 mode needs, as floats in exact mode. Others (e2m5 and those
// of more exponent bits) have no int8 mode: their inputs are rounded and multiplied as floats by the
// exact kernel, with the token scale at the end.
//
// How a token is rounded is TileForm's matter: rotation, order of the columns, widths and scales.
#pragma once

#include <cstdint>

namespace ql {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kStripRows = 32;
constexpr int64_t kChunkColumns = 4;
constexpr int64_t kMaxPiece = 128;
constexpr int64_t kColumnPad = 32;
constexpr int64_t kTailBytes = 64;  // readable past the end of codes and of meta: whole-vector loads
constexpr int64_t kWholeRun = 512;     // columns whose sums are integers; see has_whole_sums
constexpr int64_t kMostWhole = 32767;  // code_units * largest code * largest scale code: times 127
                                       // and kWholeRun, it fits 32 bits
constexpr int64_t kSegmentScales = -1;  // as `act_group`: a token has one scale per segment

enum ScaleKind : int32_t {
  SCALE_F16 = 0,   // 16 halves a block
  SCALE_CODE = 1,  // 16 bytes: the number is the code, 1 / (2^b - 1) is in the row's factor
  SCALE_E8M0 = 2,  // 16 bytes: 2^(code - 127)
  SCALE_E4M3 = 3,  // 16 bytes, never negative
};

enum ZeroKind : int32_t {
  ZERO_NONE = 0,   // the same for all: `zero_constant`
  ZERO_BYTE = 1,   // 16 bytes after the scales; zero = byte * zero_step
  ZERO_NIBBLE = 2  // with SCALE_CODE of s bits and z bits, s + z <= 8: byte = scale | zero << s
};

struct TileSegment {
  const uint8_t* codes;     // strips at codes_stride
  const uint8_t* meta;      // strips at meta_stride
  const float* factors;     // [padded rows], never null
  const float* float_values;      // [2^bits] of a float element; null for integers
  const uint8_t* integer_values;  // [2^bits] for e2m1 to e2m4, else null: the number is
                                  // (byte - zero_constant) * integer_unit
  float integer_unit;       // 2^-m for e2m1 to e2m4, m their mantissa bits; 1 for integers
  int64_t codes_stride;
  int64_t meta_stride;
  int64_t start;            // first column in x
  int64_t length;           // columns
  int64_t padded;           // columns, a multiple of kColumnPad
  int64_t piece;            // 16, 32, 64 or 128; the last piece of a segment may be shorter, by
                            // whole 16s
  int64_t pieces;
  int32_t bits;
  int32_t scale_kind;
  int32_t scale_bits;
  int32_t zero_kind;
  int32_t code_units;       // of two-level scales with small enough numbers (kMostWhole), else 0
  int32_t zero_units;       // 0 with ZERO_NONE
  float zero_constant;      // 2^(bits-1) for symmetric integers; 12, 28, 60, 124 for e2m1 to e2m4
                            // in int8 mode; exact mode subtracts it for integers only
  float zero_step;
};

struct TiledWeight {
  const TileSegment* segments;
  int64_t segment_count;
  int64_t rows;     // N
  int64_t columns;  // K
};

// Activations as a kernel reads them: `tokens` rows of padded columns, segment after segment (two
// weights with the same segment lengths can share them). Strides are in elements.
struct TileInput {
  const int8_t* values;   // int8 mode
  const float* floats;    // exact mode
  const float* sums;      // int8 mode: sums of `values`, see sums_of
  const float* scales;    // per token: one, or one per segment or activation group; null in exact
                          // mode when all are 1
  int64_t value_stride;   // of values or floats; an odd multiple of 64 keeps tokens in different
                          // cache sets
  int64_t sum_stride;
  int64_t scale_stride;
  int64_t act_group;      // 0: one scale per token; kSegmentScales: one per segment; else padded
                          // columns that share one: 16, 32, 64 or a multiple of 128. Groups begin
                          // anew with each segment (act_group_count). For int8 mode: elsewhere the
                          // scales of segments and groups are in the floats already
  int64_t tokens;
  const int32_t* terms;   // what fill_terms makes of the sums for this weight; null: int8_strips
                          // does it itself, each time it is called
};

struct TileOutput {
  float* y;            // [tokens, N] at y_stride
  int64_t y_stride;
  const float* bias;   // [N] or null
  bool accumulate;     // y += instead of y =  (after the last fma: a residual connection)
};

// How the columns of one segment are rounded to integers: a number is about code * scale. With the
// extremes of the columns that share a scale, in float32, quotients to nearest, ties to even:
//
//   symmetric   scale = clip * amax / (2^(bits-1) - 1); codes within +-(2^(bits-1) - 1)
//   asymmetric  low = clip * min(x, 0), high = clip * max(x, 0), scale = (high - low) / (2^bits - 1),
//               zero = -low / scale; codes, less the zero, within -zero .. 2^bits - 1 - zero
//
// The scale is NaN, and codes 0, when a number is not finite; codes are 0 when the scale is 0.
struct TileRounding {
  int32_t bits;       // 2..8
  int32_t symmetric;  // 1, or 0: at most 7 bits, so that a code less its zero fits an int8
  float clip;         // share of the range that is kept, above 0 and at most 1
  int32_t joined;     // 1: has the format and (without groups) the scale of the segment before it
  int64_t group;      // columns that share a scale: 16, 32, 64 or a multiple of 128; 0: all
};

// What is done to a token before it is multiplied, in this order:
//
//   1. a rotation, x times blocks of (H (x) S) / sqrt(m s): H [m, m] is `dense`, S Sylvester's
//      Hadamard matrix of order s = `power`. x is multiplied by `norm` first, then by S in stages
//      1, 2, 4, ...: (u, v) -> (u + v, u - v) for numbers so far apart; then each output of H is
//      acc = fma(x[i], H[i][j], acc) from 0, i in order. Where m is 1, blocks need not divide the
//      columns: one more, over the last s of them, then follows the blocks that fit. The last
//      `still` columns stay as they are.
//   2. an order: column k of the weight meets x[order[k]].
//   3. rounding, segment by segment of the weight.
struct TileForm {
  const float* dense;   // null when m is 1
  int64_t dense_order;  // m; 0: no rotation
  int64_t power;        // s: 1, or a power of two of at least 16. K - still is a multiple of m s,
                        // or m is 1 and it is s or more
  const int32_t* order;          // [K], null: as it is
  const TileRounding* rounding;  // [segments], null: tokens stay floats
  float norm;
  int32_t still;
};

// What one instruction set offers for tiled weights. Strips are independent: any thread may compute
// any range, and the result does not depend on it. `scratch` is 64-byte aligned.
struct TileKernels {
  // What int8_strips makes of the sums of a token before it begins: so many numbers (0: nothing),
  // the same for all strips of a weight.
  int64_t (*term_count)(const TiledWeight& w, int64_t act_group);
  void (*fill_terms)(const TiledWeight& w, const TileInput& in, int32_t* terms);
  int64_t (*int8_scratch_bytes)(const TiledWeight& w, int64_t tokens);
  void (*int8_strips)(const TiledWeight& w, const TileInput& in, const TileOutput& out,
                      int64_t first, int64_t last, uint8_t* scratch);
  int64_t (*exact_scratch_bytes)(const TiledWeight& w, int64_t tokens);
  void (*exact_strips)(const TiledWeight& w, const TileInput& in, const TileOutput& out,
                       int64_t first, int64_t last, uint8_t* scratch);
  // One token (K floats in x) -> padded int8 values, their sums and scales; scales are amax / 127,
  // NaN when a value is not finite (then the values are 0).
  void (*round_token)(const TiledWeight& w, const float* x, int64_t act_group, int8_t* values,
                      float* sums, float* scales);
  // The same in the form `form`, with scales per form_act_group. `work` holds form_work_floats.
  void (*round_token_as)(const TiledWeight& w, const TileForm& form, const float* x, float* work,
                         int8_t* values, float* sums, float* scales);
  // Rotation and order alone: padded floats.
  void (*arrange_token)(const TiledWeight& w, const TileForm& form, const float* x, float* work,
                        float* floats);
  // Rows ids[0..count) (or first..first+count when ids is null), dequantized: out [count, K].
  void (*dequantize_rows)(const TiledWeight& w, const int64_t* ids, int64_t first, int64_t count,
                          float* out);
};

}  // namespace ql

// Geometry that all units share. Internal linkage: see kernels.h for why.
namespace {

inline int64_t tile_strips(const ql::TiledWeight& w) {
  return (w.rows + ql::kStripRows - 1) / ql::kStripRows;
}

// Blocks of a strip that hold rows: 2, or 1 for a last strip of at most 16 rows.
inline int64_t tile_blocks(const ql::TiledWeight& w, int64_t strip) {
  return w.rows - strip * ql::kStripRows > ql::kBlockRows ? 2 : 1;
}

// Columns of a piece: less than `piece` only for the last one.
inline int64_t piece_columns(const ql::TileSegment& s, int64_t index) {
  const int64_t left = s.padded - index * s.piece;
  return left < s.piece ? left : s.piece;
}

// Bytes of the codes of one block of a piece of `columns`.
inline int64_t block_code_bytes(int64_t columns, int32_t bits) { return 2 * columns * bits; }

// Bytes of the meta of one block of a piece.
inline int64_t block_meta_bytes(const ql::TileSegment& s) {
  return (s.scale_kind == ql::SCALE_F16 ? 32 : 16) + (s.zero_kind == ql::ZERO_BYTE ? 16 : 0);
}

// Sums of a segment's activations: over every 16 columns, then every 32, every 64, every 128, each
// level after the other, the last of a level over what is left.
inline int64_t sum_count(int64_t padded) {
  return padded / 16 + padded / 32 + (padded + 63) / 64 + (padded + 127) / 128;
}

// Where the sums over pieces of `piece` columns begin within a segment's sums.
inline int64_t sum_offset(int64_t padded, int64_t piece) {
  int64_t at = 0;
  if (piece > 16) at += padded / 16;
  if (piece > 32) at += padded / 32;
  if (piece > 64) at += (padded + 63) / 64;
  return at;
}

// Activation groups of a segment. They begin anew with each segment: padded column k of one has the
// scale k / act_group of that segment's.
inline int64_t act_group_count(int64_t padded, int64_t act_group) {
  return (padded + act_group - 1) / act_group;
}

// Of kernels that read sums as they are.
inline int64_t no_terms(const ql::TiledWeight&, int64_t) { return 0; }
inline void fill_no_terms(const ql::TiledWeight&, const ql::TileInput&, int32_t*) {}

// Whether int8 mode sums a segment's pieces as integers.
inline bool has_whole_sums(const ql::TileSegment& s, int64_t act_group) {
  return s.code_units > 0 && act_group <= 0;
}

// Columns of a run elsewhere (see above); less at the end of a segment.
inline int64_t run_columns(const ql::TileSegment& s, int64_t act_group) {
  return act_group > 0 && act_group < s.piece ? act_group : s.piece;
}

// Of a token in segment `index`: what ends the segment.
inline float segment_scale(const ql::TileInput& in, int64_t token, int64_t index) {
  if (in.act_group > 0) return 1.0f;
  return in.scales[token * in.scale_stride + (in.act_group == ql::kSegmentScales ? index : 0)];
}

inline int64_t tile_padded_columns(const ql::TiledWeight& w) {
  int64_t total = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) total += w.segments[i].padded;
  return total;
}

// Scales of a token: one, or one per segment, or one per activation group of all segments.
inline int64_t tile_scale_count(const ql::TiledWeight& w, int64_t act_group) {
  if (!act_group) return 1;
  if (act_group == ql::kSegmentScales) return w.segment_count;
  int64_t total = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    total += act_group_count(w.segments[i].padded, act_group);
  }
  return total;
}

// The act_group of tokens that are rounded in a form: what all its groups are multiples of. A segment
// that has fewer scales than the others repeats them.
inline int64_t form_act_group(const ql::TiledWeight& w, const ql::TileForm& form) {
  int64_t common = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    for (int64_t rest = form.rounding[i].group; rest;) {
      const int64_t next = common % rest;
      common = rest;
      rest = next;
    }
  }
  return common ? common : ql::kSegmentScales;
}

// What a rotation and an order need to work: two tokens, in whole vectors.
inline int64_t form_work_floats(const ql::TiledWeight& w, const ql::TileForm& form) {
  return form.dense_order || form.order ? 2 * ((w.columns + 15) / 16 * 16) : 0;
}

inline int64_t tile_sum_count(const ql::TiledWeight& w) {
  int64_t total = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) total += sum_count(w.segments[i].padded);
  return total;
}

}  // namespace
