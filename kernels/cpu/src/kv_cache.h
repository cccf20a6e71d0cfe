// The KV cache: how keys and values of past tokens are kept, in float32, 8 or 4 bits.
//
// A layer's cache is static: `capacity` positions for each of `batch` sequences and each KV head,
// allocated once by the owner (memory that the system maps at first touch grows by itself). How
// many positions of a sequence are valid is the owner's to know, one number for all layers;
// functions take positions. Keys and values have a format each.
//
// A head's positions are kept in *blocks* of 64, its columns in *groups* that share a scale and a
// zero per position: first the `wide` columns at 8 bits, then the others at `bits`, `group` columns
// at a time. A block is all its groups one after the other, a group
//
//   meta    64 words of 32 bits, one a position: the scale as bfloat16 in the high half, the zero
//           as int16 in the low half
//   codes   chunks of 64 codes. Keys: 4 columns x 16 positions, byte 4*i + j of a chunk being
//           column j of position i; the chunks of 64 positions side by side, then the next 4
//           columns. Values: 4 positions x 16 columns, byte 4*i + j being position j of column i,
//           the chunks of all columns of the group side by side, then the next 4 positions. With 4
//           bits, 64 bytes hold two chunks: low nibbles 4 columns (positions), high nibbles the
//           next 4.
//
// and a float32 block is 64 x padded floats: keys [column][position], values [position][column].
// Columns are padded to a multiple of 16; what stands in the padding is never used.
//
// A number is (code - zero) * scale, which float32 holds exactly. For the numbers x of a group at a
// position, in float32, with levels = 2^bits - 1:
//
//   step  = max(max(x) / levels - min(x) / levels, max(|x|) / 32767)
//   scale = step rounded up to bfloat16
//   zero  = rint(-min(x) / scale)                                    0 when scale is 0
//   code  = clamp(rint(x / scale) + zero, 0, levels)                 0 when scale is 0
//
// An x that is not finite makes the scale of its group NaN: all its numbers become NaN. With
// `rotate`, what is kept is x * H / sqrt(n), H the Walsh-Hadamard matrix of the largest power of
// two n that divides head_dim, in each n columns: it spreads the outliers of keys over all columns.
// Queries are rotated with it, and what comes out of values back.
//
// The first `sinks` positions of a sequence can be kept in float32 (rotated likewise): attention
// looks at them from everywhere, and their numbers are unlike all others. They lie apart, one block
// for each sequence and head, keys [column][round_up(sinks, 16)], values [sinks][padded]; the codes
// at these positions are never used. A float32 side has no need of them.
#pragma once

#include <cstdint>

namespace ql {

constexpr int64_t kKvBlock = 64;  // positions
constexpr int64_t kKvMaxHeadDim = 256;
constexpr int64_t kKvLanes = 16;  // columns are padded to a multiple of it

struct KvFormat {
  int32_t bits;   // 32 (float32), 8 or 4
  int32_t wide;   // with 4 bits: so many first columns have 8; a multiple of 16, less than head_dim
  int32_t group;  // columns that share a scale: a multiple of 16, or 0 for all that are not wide
  int32_t rotate;  // 1 or 0; with head_dim a multiple of 16
};

// One layer's cache. keys and values are 64-byte aligned, [batch][kv_heads][capacity / 64] blocks;
// they must have been written with anything once (zeros) before codes are appended.
struct KvLayer {
  KvFormat key;
  KvFormat value;
  int64_t batch;
  int64_t kv_heads;
  int64_t head_dim;  // 1..256
  int64_t capacity;  // positions of a sequence, a multiple of 64
  uint8_t* keys;
  uint8_t* values;
  int64_t sinks;  // 0..64 first positions kept in float32
  float* sink_keys;    // [batch][kv_heads] blocks, 64-byte aligned; null unless they are needed
  float* sink_values;
};

// Columns [start, start + columns) with one scale per position; `offset` in bytes from the block.
struct KvGroup {
  int64_t start;
  int64_t columns;
  int64_t bits;
  int64_t offset;
};

}  // namespace ql

// Geometry. Internal linkage: see kernels.h for why.
namespace {

inline int64_t kv_padded(int64_t head_dim) {
  return (head_dim + ql::kKvLanes - 1) / ql::kKvLanes * ql::kKvLanes;
}

// Calls body(group) for the groups of a quantized format, in order.
template <class Body>
inline void for_kv_groups(const ql::KvFormat& f, int64_t head_dim, const Body& body) {
  const int64_t padded = kv_padded(head_dim);
  ql::KvGroup g = {0, 0, 0, 0};
  while (g.start < padded) {
    const bool is_wide = g.start < f.wide;
    const int64_t left = (is_wide ? f.wide : padded) - g.start;
    g.columns = is_wide || f.group == 0 || f.group > left ? left : f.group;
    g.bits = is_wide ? 8 : f.bits;
    body(g);
    g.start += g.columns;
    g.offset += ql::kKvBlock * (4 + g.columns * g.bits / 8);
  }
}

// Bytes of a block of 64 positions of one KV head; a multiple of 64.
inline int64_t kv_block_bytes(const ql::KvFormat& f, int64_t head_dim) {
  if (f.bits == 32) return ql::kKvBlock * kv_padded(head_dim) * 4;
  int64_t bytes = 0;
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    bytes += ql::kKvBlock * (4 + g.columns * g.bits / 8);
  });
  return bytes;
}

// Bytes of `keys` (or `values`) of a layer.
inline int64_t kv_side_bytes(const ql::KvFormat& f, const ql::KvLayer& c) {
  return c.batch * c.kv_heads * (c.capacity / ql::kKvBlock) * kv_block_bytes(f, c.head_dim);
}

// The first block of one sequence and KV head.
inline uint8_t* kv_head_blocks(const ql::KvLayer& c, const ql::KvFormat& f, uint8_t* base,
                               int64_t sequence, int64_t kv_head) {
  return base + (sequence * c.kv_heads + kv_head) * (c.capacity / ql::kKvBlock) *
                    kv_block_bytes(f, c.head_dim);
}

// First positions of a side that are kept in float32 beside its blocks.
inline int64_t kv_sinks(const ql::KvFormat& f, const ql::KvLayer& c) {
  return f.bits == 32 ? 0 : c.sinks;
}

// From column to column of sink keys.
inline int64_t kv_sink_stride(int64_t sinks) {
  return (sinks + ql::kKvLanes - 1) / ql::kKvLanes * ql::kKvLanes;
}

// Floats of the sinks of one sequence and head, on either side.
inline int64_t kv_sink_floats(const ql::KvFormat& f, const ql::KvLayer& c) {
  return kv_padded(c.head_dim) * kv_sink_stride(kv_sinks(f, c));
}

// Those of one sequence and head; `base` is sink_keys or sink_values.
inline float* kv_sink_block(const ql::KvLayer& c, const ql::KvFormat& f, float* base,
                            int64_t sequence, int64_t kv_head) {
  return base + (sequence * c.kv_heads + kv_head) * kv_sink_floats(f, c);
}

inline bool kv_format_is_valid(const ql::KvFormat& f, int64_t head_dim) {
  const bool plain = f.wide == 0 && f.group == 0;
  const bool rotates = f.rotate == 0 || (f.rotate == 1 && head_dim % ql::kKvLanes == 0);
  if (f.bits == 32) return plain && f.rotate == 0;
  if (f.bits != 8 && f.bits != 4) return false;
  const bool wide =
      f.wide == 0 || (f.bits == 4 && f.wide > 0 && f.wide % ql::kKvLanes == 0 && f.wide < head_dim);
  return wide && f.group >= 0 && f.group % ql::kKvLanes == 0 && rotates;
}

}  // namespace
