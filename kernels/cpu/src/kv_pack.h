// Into the packed KV cache and out of it, one position or one block at a time (kv_cache.h says what
// stands where). Needs lanes.h.
#pragma once

#include "kv_cache.h"
#include "lanes.h"

namespace {

constexpr int64_t kWordsPerBlock = ql::kKvBlock;  // meta words of a group

// Sign of entry (row, column) of the Walsh-Hadamard matrix: -1 to the number of common bits.
struct HadamardRows {
  float rows[16][16];
  constexpr HadamardRows() : rows() {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        int common = row & column, ones = 0;
        for (; common != 0; common &= common - 1) ++ones;
        rows[row][column] = ones % 2 == 0 ? 1.0f : -1.0f;
      }
    }
  }
};
constexpr HadamardRows kHadamard;

inline int64_t hadamard_size(int64_t head_dim) { return head_dim & -head_dim; }

// x [columns] = x * H / sqrt(n) in every n columns, n = 16, 32, ..., 256; its own inverse. Sums of
// 16 run in order, then halves are added and subtracted at distances 16, 32, ...
inline void rotate_head(float* x, int64_t columns, int64_t n) {
  const Lanes factor = broadcast(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(n))));
  for (int64_t at = 0; at < columns; at += 16) {
    Lanes sum = zero_lanes();
    for (int i = 0; i < 16; ++i) {
      sum = fma(broadcast(x[at + i]), load(kHadamard.rows[i]), sum);
    }
    store(x + at, sum * factor);
  }
  for (int64_t distance = 16; distance < n; distance *= 2) {
    for (int64_t at = 0; at < columns; at += 16) {
      if ((at & distance) != 0) continue;
      const Lanes a = load(x + at), b = load(x + at + distance);
      store(x + at, a + b);
      store(x + at + distance, a - b);
    }
  }
}

// Codes of one group at one position, and its meta word.
struct RoundedGroup {
  IntLanes codes[ql::kKvMaxHeadDim / 16];
  uint32_t meta;
};

struct Extent {
  float low;
  float high;
  bool finite;
};

inline Extent extent_of(const float* x, int64_t columns) {
  Lanes low = load(x), high = low, difference = zero_lanes();
  for (int64_t at = 0; at < columns; at += 16) {
    const Lanes value = load(x + at);
    low = min_of(low, value);
    high = max_of(high, value);
    difference = difference + (value - value);  // NaN for infinities and NaNs
  }
  return {-highest(-low), highest(high), sum_of(difference) == 0.0f};
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_from(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline void round_group(const float* x, int64_t columns, int64_t bits, RoundedGroup* out) {
  const Extent extent = extent_of(x, columns);
  const float levels = bits == 8 ? 255.0f : 15.0f;
  float scale = 0.0f, zero = 0.0f;
  if (extent.finite) {
    const float widest = -extent.low > extent.high ? -extent.low : extent.high;
    const float spread = extent.high / levels - extent.low / levels;
    const float step = spread > widest / 32767.0f ? spread : widest / 32767.0f;
    scale = float_from((bits_of(step) + 0xFFFFu) & 0xFFFF0000u);
  }
  if (scale == 0.0f) {
    for (int64_t at = 0; at < columns; at += 16) out->codes[at / 16] = broadcast_int(0);
    out->meta = extent.finite ? 0 : 0x7FC00000u;
    return;
  }
  zero = __builtin_rintf(-extent.low / scale);
  const Lanes scales = broadcast(scale), zeros = broadcast(zero), top = broadcast(levels);
  for (int64_t at = 0; at < columns; at += 16) {
    const Lanes code = round_to_even(load(x + at) / scales) + zeros;
    out->codes[at / 16] = rounded_ints(min_of(max_of(code, zero_lanes()), top));
  }
  out->meta = bits_of(scale) | static_cast<uint16_t>(static_cast<int32_t>(zero));
}

// Keys: the 4 (or 8) columns of a chunk at one position are one word.
inline void store_key_group(uint8_t* group, const ql::KvGroup& g, int64_t position,
                            const RoundedGroup& rounded) {
  uint32_t words[ql::kKvMaxHeadDim / 4];
  for (int64_t at = 0; at < g.columns; at += 16) {
    store_i8(reinterpret_cast<int8_t*>(words) + at, rounded.codes[at / 16] - broadcast_int(128));
  }
  memcpy(group + 4 * position, &rounded.meta, 4);
  uint8_t* codes = group + 4 * kWordsPerBlock + 4 * position;
  const int64_t step = g.bits == 8 ? 1 : 2;
  for (int64_t quad = 0; quad < g.columns / 4; quad += step) {
    uint32_t word = words[quad] ^ 0x80808080u;
    if (step == 2) word |= (words[quad + 1] ^ 0x80808080u) << 4;
    memcpy(codes + quad / step * 4 * ql::kKvBlock, &word, 4);
  }
}

// Values: a position is one byte, or one nibble, of the words of its chunks.
inline void store_value_group(uint8_t* group, const ql::KvGroup& g, int64_t position,
                              const RoundedGroup& rounded) {
  memcpy(group + 4 * position, &rounded.meta, 4);
  const int64_t per_chunk = g.bits == 8 ? 4 : 8;
  const int shift = static_cast<int>(position % 4 * 8 + position % per_chunk / 4 * 4);
  const int32_t mask = static_cast<int32_t>((g.bits == 8 ? 0xFFu : 0xFu) << shift);
  uint8_t* codes = group + 4 * kWordsPerBlock + position / per_chunk * 4 * g.columns;
  for (int64_t at = 0; at < g.columns; at += 16) {
    int32_t* words = reinterpret_cast<int32_t*>(codes + 4 * at);
    const IntLanes others = load_int(words) & broadcast_int(~mask);
    store_int(words, others | (rounded.codes[at / 16] << shift));
  }
}

// x holds padded columns; the padding repeats a number of its group. Keys or values of one
// position.
inline void store_position(const ql::KvFormat& f, int64_t head_dim, bool keys, uint8_t* block,
                           int64_t position, const float* x) {
  RoundedGroup rounded;
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    round_group(x + g.start, g.columns, g.bits, &rounded);
    if (keys) {
      store_key_group(block + g.offset, g, position, rounded);
    } else {
      store_value_group(block + g.offset, g, position, rounded);
    }
  });
}

inline void store_floats(int64_t head_dim, bool keys, uint8_t* block, int64_t position,
                         const float* x) {
  float* floats = reinterpret_cast<float*>(block);
  if (!keys) {
    memcpy(floats + position * kv_padded(head_dim), x, static_cast<size_t>(head_dim) * 4);
    return;
  }
  for (int64_t column = 0; column < head_dim; ++column) {
    floats[column * ql::kKvBlock + position] = x[column];
  }
}

// A position that is kept in float32: `x` has padded columns.
struct Sinks {
  float* block;
  int64_t count;
  bool keys;

  void put(int64_t position, const float* x, int64_t columns) const {
    if (!keys) {
      memcpy(block + position * columns, x, static_cast<size_t>(columns) * 4);
      return;
    }
    const int64_t stride = kv_sink_stride(count);
    for (int64_t c = 0; c < columns; ++c) block[c * stride + position] = x[c];
  }

  void get(int64_t position, float* x, int64_t columns) const {
    const int64_t apart = keys ? kv_sink_stride(count) : 1;
    const float* from = block + position * (keys ? 1 : columns);
    for (int64_t c = 0; c < columns; ++c) x[c] = from[c * apart];
  }
};

inline Sinks sinks_of(const ql::KvLayer& cache, bool keys, int64_t sequence, int64_t kv_head) {
  const ql::KvFormat& f = keys ? cache.key : cache.value;
  float* base = keys ? cache.sink_keys : cache.sink_values;
  const int64_t count = kv_sinks(f, cache);
  return {count ? kv_sink_block(cache, f, base, sequence, kv_head) : nullptr, count, keys};
}

// Positions [first, first + count) of one side of one head.
inline void append_side(const ql::KvFormat& f, int64_t head_dim, const Sinks& sinks,
                        uint8_t* blocks, int64_t first, int64_t count, const float* x,
                        int64_t stride) {
  const bool keys = sinks.keys;
  alignas(64) float padded[ql::kKvMaxHeadDim];
  const int64_t columns = kv_padded(head_dim), block_bytes = kv_block_bytes(f, head_dim);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = (first + i) % ql::kKvBlock;
    uint8_t* block = blocks + (first + i) / ql::kKvBlock * block_bytes;
    if (f.bits == 32) {
      store_floats(head_dim, keys, block, position, x + i * stride);
      continue;
    }
    memcpy(padded, x + i * stride, static_cast<size_t>(head_dim) * 4);
    for (int64_t c = head_dim; c < columns; ++c) padded[c] = padded[head_dim - 1];
    if (f.rotate) rotate_head(padded, columns, hadamard_size(head_dim));
    if (first + i < sinks.count) {
      for (int64_t c = head_dim; c < columns; ++c) padded[c] = 0.0f;
      sinks.put(first + i, padded, columns);
      continue;
    }
    store_position(f, head_dim, keys, block, position, padded);
  }
}

// Scales and -zero * scale of 16 positions: a number is fma(code, scale, offset), exactly.
struct Steps {
  Lanes scale;
  Lanes offset;
};

inline Steps steps_of(const uint8_t* group, int64_t position) {
  const IntLanes meta = load_int(reinterpret_cast<const int32_t*>(group) + position);
  const Lanes scale = bits_as_floats(meta & broadcast_int(static_cast<int32_t>(0xFFFF0000u)));
  const Lanes zero = floats_of(shift_right_signed(meta << 16, 16));
  return {scale, zero_lanes() - zero * scale};
}

inline Lanes number_of(IntLanes words, int shift, int32_t mask, const Steps& steps) {
  return fma(floats_of((words >> shift) & broadcast_int(mask)), steps.scale, steps.offset);
}

// A group of keys as floats [columns][64], 16 positions at a time for the first `vectors` of them.
template <int kBits>
inline void load_key_group(const uint8_t* group, int64_t columns, int64_t vectors, float* out) {
  constexpr int32_t mask = (1 << kBits) - 1;
  const uint8_t* codes = group + 4 * kWordsPerBlock;
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const Steps steps = steps_of(group, 16 * vector);
    for (int64_t column = 0; column < columns; column += 32 / kBits) {
      const IntLanes words = load_int(reinterpret_cast<const int32_t*>(
          codes + column * kBits / 8 * ql::kKvBlock + 64 * vector));
      float* to = out + column * ql::kKvBlock + 16 * vector;
      for (int j = 0; j < 4; ++j) {
        store(to + j * ql::kKvBlock, number_of(words, 8 * j, mask, steps));
        if (kBits == 4) {
          store(to + (4 + j) * ql::kKvBlock, number_of(words, 8 * j + 4, mask, steps));
        }
      }
    }
  }
}

// A group of values as floats [64][row], the first `positions` of them rounded up to a chunk.
template <int kBits>
inline void load_value_group(const uint8_t* group, int64_t columns, int64_t positions, int64_t row,
                             float* out) {
  constexpr int32_t mask = (1 << kBits) - 1;
  constexpr int64_t kPositions = 32 / kBits;
  alignas(64) float scales[ql::kKvBlock], offsets[ql::kKvBlock];
  for (int64_t position = 0; position < positions; position += 16) {
    const Steps steps = steps_of(group, position);
    store(scales + position, steps.scale);
    store(offsets + position, steps.offset);
  }
  const uint8_t* codes = group + 4 * kWordsPerBlock;
  for (int64_t first = 0; first < positions; first += kPositions, codes += 4 * columns) {
    for (int j = 0; j < kPositions; ++j) {
      const int64_t position = first + j;
      const Steps steps = {broadcast(scales[position]), broadcast(offsets[position])};
      for (int64_t at = 0; at < columns; at += 16) {
        const IntLanes words = load_int(reinterpret_cast<const int32_t*>(codes + 4 * at));
        store(out + position * row + at, number_of(words, j % 4 * 8 + j / 4 * 4, mask, steps));
      }
    }
  }
}

// Keys of a block as floats [padded columns][64]; the first `positions`, and some more.
inline const float* load_keys(const ql::KvFormat& f, int64_t head_dim, const uint8_t* block,
                              int64_t positions, float* panel) {
  if (f.bits == 32) return reinterpret_cast<const float*>(block);
  const int64_t vectors = (positions + 15) / 16;
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    const auto load_group = g.bits == 8 ? load_key_group<8> : load_key_group<4>;
    load_group(block + g.offset, g.columns, vectors, panel + g.start * ql::kKvBlock);
  });
  return panel;
}

// Values of a block as floats [64][padded columns]; the first `positions`, and some more.
inline const float* load_values(const ql::KvFormat& f, int64_t head_dim, const uint8_t* block,
                                int64_t positions, float* panel) {
  if (f.bits == 32) return reinterpret_cast<const float*>(block);
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    const auto load_group = g.bits == 8 ? load_value_group<8> : load_value_group<4>;
    load_group(block + g.offset, g.columns, positions, kv_padded(head_dim), panel + g.start);
  });
  return panel;
}

}  // namespace
