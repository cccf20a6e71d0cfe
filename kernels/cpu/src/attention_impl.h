// Attention on lanes.h: AttentionKernels (attention.h says what is computed, and in which order),
// compiled into every instruction set's unit.
#pragma once

#include "attention.h"
#include "attention_direct.h"
#include "attention_integer.h"
#include "attention_softmax.h"
#include "attention_tile.h"
#include "kv_pack.h"

namespace {

// Up to so many queries, blocks are read packed by every tile of rows; more share their numbers.
constexpr int64_t kDirectRows = 2 * kTileRows;

// Sums of a softmax over some positions, for `rows` queries: before division.
struct Sums {
  float* highest;  // [rows]
  float* weights;  // [rows][16]: sums of p over positions i, i + 16, ...
  float* values;   // [rows][padded]
};

struct Workspace {
  Sums total;
  Sums split;
  float* queries;  // [rows][padded]
  float* keys;     // [padded][64]
  float* values;   // [64][padded]
  float* weights;  // [kTileRows][64]
  RoundedQuery rounded;  // [rows] each
};

// Hands out pieces of the scratch memory, or with a null base counts what it would hand out.
struct Carver {
  uint8_t* base;
  int64_t used;

  float* take(int64_t floats) {
    uint8_t* at = base ? base + used : nullptr;
    used += (floats * 4 + 63) / 64 * 64;
    return reinterpret_cast<float*>(at);
  }
  Sums take_sums(int64_t padded) {
    constexpr int64_t rows = ql::kAttentionRows;
    return {take(rows), take(rows * 16), take(rows * padded)};
  }
  RoundedQuery take_queries(int64_t padded) {
    constexpr int64_t rows = ql::kAttentionRows;
    int8_t* bytes = reinterpret_cast<int8_t*>(take(rows * padded / 2));
    return {bytes, take(rows), take(rows * kMostKvGroups)};
  }
  Workspace take_workspace(int64_t padded) {
    return {
        take_sums(padded),           take_sums(padded),           take(ql::kAttentionRows * padded),
        take(ql::kKvBlock * padded), take(ql::kKvBlock * padded), take(kTileRows * ql::kKvBlock),
        take_queries(padded)};
  }
};

inline Workspace workspace_at(uint8_t* scratch, int64_t padded) {
  return Carver{scratch, 0}.take_workspace(padded);
}

int64_t attention_scratch_bytes(const ql::KvLayer& cache) {
  Carver counter{nullptr, 0};
  counter.take_workspace(kv_padded(cache.head_dim));
  return counter.used;
}

// The query heads of one KV head for some tokens of a sequence: row token * group + head.
struct Queries {
  const ql::KvLayer* cache;
  const ql::AttentionShape* shape;
  const uint8_t* keys;  // blocks of this sequence and head
  const uint8_t* values;
  Sinks key_sinks;
  Sinks value_sinks;
  int64_t padded;
  int64_t group;  // query heads
  int64_t rows;
  int64_t first;  // position of the first token

  int64_t position(int64_t row) const { return first + row / group; }
  bool integer_keys() const { return shape->integer && cache->key.bits != 32; }
  bool integer_values() const { return shape->integer && cache->value.bits != 32; }
};

inline Queries queries_of(const ql::KvLayer& cache, const ql::AttentionShape& shape,
                          int64_t sequence, int64_t kv_head, int64_t first, int64_t tokens) {
  const int64_t group = shape.heads / cache.kv_heads;
  return {&cache,
          &shape,
          kv_head_blocks(cache, cache.key, cache.keys, sequence, kv_head),
          kv_head_blocks(cache, cache.value, cache.values, sequence, kv_head),
          sinks_of(cache, true, sequence, kv_head),
          sinks_of(cache, false, sequence, kv_head),
          kv_padded(cache.head_dim),
          group,
          tokens * group,
          first};
}

// The part of row `row` on.
inline RoundedQuery rounded_from(const Queries& q, int64_t row, const Workspace& work) {
  return {work.rounded.bytes + 2 * row * q.padded, work.rounded.step + row,
          work.rounded.sums + row * kMostKvGroups};
}

// Scaled, rotated and padded copies, rounded where keys are multiplied in integers. `query` points
// to the first head of the group.
inline void gather_queries(const Queries& q, const float* query, int64_t stride,
                           const Workspace& work) {
  const int64_t head_dim = q.cache->head_dim;
  float* out = work.queries;
  for (int64_t row = 0; row < q.rows; ++row, out += q.padded) {
    const float* from = query + row / q.group * stride + row % q.group * head_dim;
    for (int64_t at = 0; at < q.padded; at += 16) {
      const int64_t left = head_dim - at;
      const Lanes x = left < 16 ? load_first(from + at, left) : load(from + at);
      store(out + at, x * broadcast(q.shape->scale));
    }
    if (q.cache->key.rotate) rotate_head(out, q.padded, hadamard_size(head_dim));
    if (q.integer_keys()) round_query(q.cache->key, head_dim, out, rounded_from(q, row, work));
  }
}

inline int64_t within_block(int64_t position) {
  return position < 0 ? 0 : position > ql::kKvBlock ? ql::kKvBlock : position;
}

inline Sight sight_of(const Queries& q, int64_t row, int64_t rows, int64_t block_start) {
  Sight sight;
  int64_t position = q.position(row), head = row % q.group;
  for (int64_t r = 0; r < rows; ++r, ++head) {
    if (head == q.group) {
      head = 0;
      ++position;
    }
    sight.begin[r] = within_block(attention_begin(*q.shape, position) - block_start);
    sight.end[r] = within_block(position + 1 - block_start);
  }
  sight.first = sight.begin[0];
  sight.last = sight.end[rows - 1];
  return sight;
}

// A block of the cache: packed, and as numbers where that pays (else null).
struct Block {
  int64_t start;  // position
  const uint8_t* packed_keys;
  const uint8_t* packed_values;
  const float* keys;
  const float* values;
};

inline void score_rows(const Queries& q, const Block& block, int64_t row, int64_t rows,
                       int64_t positions, const Workspace& work) {
  const float* queries = work.queries + row * q.padded;
  float* scores = work.weights;
  if (q.integer_keys()) {
    return integer_scores(q.cache->key, q.cache->head_dim, block.packed_keys, rows, positions,
                          rounded_from(q, row, work), scores);
  }
  if (!block.keys) {
    return direct_scores(q.cache->key, q.cache->head_dim, block.packed_keys, rows, positions,
                         queries, scores);
  }
  const Product p = {queries,  block.keys,   scores,       nullptr,
                     q.padded, ql::kKvBlock, ql::kKvBlock, q.padded};
  product(p, rows, (positions + 15) / 16 * 16);
}

// outputs = outputs * carry + weights * values of positions [begin, end) of a block.
inline void add_values(const Queries& q, const Block& block, int64_t rows, int64_t begin,
                       int64_t end, const float* weights, const float* carry, float* outputs) {
  if (!block.values) {
    return direct_outputs(q.cache->value, q.cache->head_dim, block.packed_values, rows, begin, end,
                          weights, carry, outputs);
  }
  const Product p = {weights + begin, block.values + begin * q.padded,
                     outputs,         carry,
                     ql::kKvBlock,    q.padded,
                     q.padded,        end - begin};
  product(p, rows, q.padded);
}

// The same of the positions that each row sees. What only some rows see is added to these alone: in
// the others its weight is 0, which makes a NaN of a value that is not finite.
inline void add_seen_values(const Queries& q, const Block& block, int64_t rows, const Sight& sight,
                            const float* weights, const float* carry, float* outputs) {
  if (q.integer_values()) {
    return integer_outputs(q.cache->value, q.cache->head_dim, block.packed_values, rows, sight,
                           weights, carry, outputs);
  }
  float factors[kTileRows];  // of what the outputs are now: 1 from the first addition on
  for (int64_t r = 0; r < rows; ++r) factors[r] = carry[r];
  const auto add_row = [&](int64_t r, int64_t begin, int64_t end) {
    if (begin >= end) return;
    add_values(q, block, 1, begin, end, weights + r * ql::kKvBlock, factors + r,
               outputs + r * q.padded);
    factors[r] = 1.0f;
  };
  const int64_t begin = sight.begin[rows - 1], end = sight.end[0];  // seen by all
  if (begin >= end) {
    for (int64_t r = 0; r < rows; ++r) add_row(r, sight.begin[r], sight.end[r]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) add_row(r, sight.begin[r], begin);
  add_values(q, block, rows, begin, end, weights, factors, outputs);
  for (int64_t r = 0; r < rows; ++r) factors[r] = 1.0f;
  for (int64_t r = 0; r < rows; ++r) add_row(r, end, sight.end[r]);
}

// Scores of the first positions, from keys in float32.
inline void score_sinks(const Queries& q, int64_t row, int64_t rows, const Workspace& work) {
  const int64_t count = q.key_sinks.count, stride = kv_sink_stride(count);
  for (int64_t r = 0; r < rows; ++r) {
    const float* query = work.queries + (row + r) * q.padded;
    for (int64_t v = 0; 16 * v < count; ++v) {
      Lanes sums = zero_lanes();
      for (int64_t c = 0; c < q.padded; ++c) {
        sums = fma(broadcast(query[c]), load(q.key_sinks.block + c * stride + 16 * v), sums);
      }
      float* to = work.weights + r * ql::kKvBlock + 16 * v;
      store(to, select(between(v, 0, count), sums, load(to)));
    }
  }
}

// outputs = outputs * carry + weights * values in float32, of what each row sees of the first
// positions, which leaves its sight.
inline void add_sink_values(const Queries& q, int64_t rows, Sight& sight, const float* weights,
                            const float* carry, float* outputs) {
  const int64_t count = q.value_sinks.count;
  for (int64_t r = 0; r < rows; ++r, weights += ql::kKvBlock, outputs += q.padded) {
    const int64_t end = sight.end[r] < count ? sight.end[r] : count;
    for (int64_t at = 0; at < q.padded; at += 16) {
      Lanes sum = load(outputs + at) * broadcast(carry[r]);
      for (int64_t i = sight.begin[r]; i < end; ++i) {
        sum = fma(broadcast(weights[i]), load(q.value_sinks.block + i * q.padded + at), sum);
      }
      store(outputs + at, sum);
    }
    if (sight.begin[r] < count) sight.begin[r] = count;
    if (sight.end[r] < count) sight.end[r] = count;
  }
  sight.first = sight.begin[0];
  sight.last = sight.end[rows - 1];
}

// Adds what `rows` rows from `row` on see of one block.
inline void attend_tile(const Queries& q, int64_t row, int64_t rows, const Block& block,
                        const Workspace& work, const Sums& sums) {
  Sight sight = sight_of(q, row, rows, block.start);
  if (sight.first >= sight.last) return;
  score_rows(q, block, row, rows, sight.last, work);
  if (block.start < q.key_sinks.count) score_sinks(q, row, rows, work);
  alignas(64) float carry[16];
  soften(work.weights, rows, sight, q.shape->softcap, sums.highest + row, sums.weights + 16 * row,
         carry);
  if (block.start < q.value_sinks.count) {
    add_sink_values(q, rows, sight, work.weights, carry, sums.values + row * q.padded);
    if (sight.first >= sight.last) return;
    for (float& factor : carry) factor = 1.0f;
  }
  add_seen_values(q, block, rows, sight, work.weights, carry, sums.values + row * q.padded);
}

// The block at position `start`, of which positions before `end` are seen.
inline Block open_block(const Queries& q, int64_t start, int64_t end, const Workspace& work) {
  const ql::KvLayer& cache = *q.cache;
  const int64_t index = start / ql::kKvBlock, seen = within_block(end - start);
  Block block = {start, q.keys + index * kv_block_bytes(cache.key, cache.head_dim),
                 q.values + index * kv_block_bytes(cache.value, cache.head_dim), nullptr, nullptr};
  const bool many = q.rows > kDirectRows;
  if (cache.key.bits == 32 || (many && !q.integer_keys())) {
    block.keys = load_keys(cache.key, cache.head_dim, block.packed_keys, seen, work.keys);
  }
  if (cache.value.bits == 32 || (many && !q.integer_values())) {
    block.values = load_values(cache.value, cache.head_dim, block.packed_values, seen, work.values);
  }
  return block;
}

// One split: `sums` of all rows, from nothing.
inline void attend_rows(const Queries& q, int64_t split, const Workspace& work, const Sums& sums) {
  for (int64_t row = 0; row < q.rows; ++row) {
    sums.highest[row] = kNothing;
    for (int64_t i = 0; i < 16; ++i) sums.weights[16 * row + i] = 0.0f;
    for (int64_t i = 0; i < q.padded; ++i) sums.values[row * q.padded + i] = 0.0f;
  }
  const int64_t tiles = (q.rows + kTileRows - 1) / kTileRows;
  const int64_t tile = (q.rows + tiles - 1) / tiles;
  const int64_t begin = attention_begin(*q.shape, q.first), end = q.position(q.rows - 1) + 1;
  const int64_t split_end = (split + 1) * ql::kSplitPositions;
  int64_t start = split * ql::kSplitPositions;
  if (start < begin) start = begin / ql::kKvBlock * ql::kKvBlock;
  for (; start < split_end && start < end; start += ql::kKvBlock) {
    const Block block = open_block(q, start, end, work);
    for (int64_t row = 0; row < q.rows; row += tile) {
      const int64_t rows = q.rows - row < tile ? q.rows - row : tile;
      attend_tile(q, row, rows, block, work, sums);
    }
  }
}

// out [head_dim] = values / sum of weights, rotated back; destroys `values`.
inline void finish_row(const ql::KvLayer& cache, const float* weights, float* values, float* out) {
  const int64_t padded = kv_padded(cache.head_dim);
  const Lanes sum = broadcast(sum_of(load(weights)));
  for (int64_t at = 0; at < padded; at += 16) store(values + at, load(values + at) / sum);
  if (cache.value.rotate) rotate_head(values, padded, hadamard_size(cache.head_dim));
  memcpy(out, values, static_cast<size_t>(cache.head_dim) * 4);
}

void attend_tokens(const ql::KvLayer& cache, const ql::AttentionShape& shape, int64_t sequence,
                   int64_t kv_head, int64_t first, int64_t tokens, const float* query,
                   int64_t query_stride, float* out, int64_t out_stride, uint8_t* scratch) {
  const Queries q = queries_of(cache, shape, sequence, kv_head, first, tokens);
  const Workspace work = workspace_at(scratch, q.padded);
  const int64_t column = kv_head * q.group * cache.head_dim;
  gather_queries(q, query + column, query_stride, work);
  const int64_t first_split = attention_begin(shape, first) / ql::kSplitPositions;
  const int64_t last_split = (first + tokens - 1) / ql::kSplitPositions;
  attend_rows(q, first_split, work, work.total);
  const Sums &total = work.total, &more = work.split;
  for (int64_t split = first_split + 1; split <= last_split; ++split) {
    attend_rows(q, split, work, more);
    for (int64_t row = 0; row < q.rows; ++row) {
      merge_row(total.highest + row, total.weights + 16 * row, total.values + row * q.padded,
                more.highest[row], more.weights + 16 * row, more.values + row * q.padded, q.padded);
    }
  }
  for (int64_t row = 0; row < q.rows; ++row) {
    finish_row(cache, total.weights + 16 * row, total.values + row * q.padded,
               out + row / q.group * out_stride + column + row % q.group * cache.head_dim);
  }
}

// A partial: values [group][padded], weights [group][16], then the highest [group][16], one a row.
inline Sums partial_at(float* partial, int64_t group, int64_t padded) {
  return {partial + group * (padded + 16), partial + group * padded, partial};
}

void attend_split(const ql::KvLayer& cache, const ql::AttentionShape& shape, int64_t sequence,
                  int64_t kv_head, int64_t position, int64_t split, const float* query,
                  float* partial, uint8_t* scratch) {
  const Queries q = queries_of(cache, shape, sequence, kv_head, position, 1);
  const Workspace work = workspace_at(scratch, q.padded);
  gather_queries(q, query + kv_head * q.group * cache.head_dim, 0, work);
  const int64_t first_split = attention_begin(shape, position) / ql::kSplitPositions;
  attend_rows(q, first_split + split, work, partial_at(partial, q.group, q.padded));
}

void merge_splits(const ql::KvLayer& cache, const ql::AttentionShape& shape, int64_t kv_head,
                  int64_t splits, const float* partials, float* out, uint8_t* scratch) {
  const int64_t padded = kv_padded(cache.head_dim), group = shape.heads / cache.kv_heads;
  const int64_t floats = partial_floats(cache, shape);
  const Sums total = workspace_at(scratch, padded).total;
  for (int64_t row = 0; row < group; ++row) {
    float highest = kNothing;
    for (int64_t split = 0; split < splits; ++split) {
      const Sums more = partial_at(const_cast<float*>(partials) + split * floats, group, padded);
      const float* more_values = more.values + row * padded;
      if (split == 0) {
        memcpy(total.values, more_values, static_cast<size_t>(padded) * 4);
        memcpy(total.weights, more.weights + 16 * row, 64);
        highest = more.highest[row];
      } else {
        merge_row(&highest, total.weights, total.values, more.highest[row], more.weights + 16 * row,
                  more_values, padded);
      }
    }
    finish_row(cache, total.weights, total.values, out + (kv_head * group + row) * cache.head_dim);
  }
}

void append_positions(const ql::KvLayer& cache, int64_t sequence, int64_t kv_head, int64_t first,
                      int64_t count, const float* key, int64_t key_stride, const float* value,
                      int64_t value_stride) {
  append_side(cache.key, cache.head_dim, sinks_of(cache, true, sequence, kv_head),
              kv_head_blocks(cache, cache.key, cache.keys, sequence, kv_head), first, count, key,
              key_stride);
  append_side(cache.value, cache.head_dim, sinks_of(cache, false, sequence, kv_head),
              kv_head_blocks(cache, cache.value, cache.values, sequence, kv_head), first, count,
              value, value_stride);
}

void dequantize_positions(const ql::KvLayer& cache, int64_t sequence, int64_t kv_head,
                          int64_t first, int64_t count, float* key, int64_t key_stride,
                          float* value, int64_t value_stride, uint8_t* scratch) {
  const int64_t head_dim = cache.head_dim, padded = kv_padded(head_dim);
  const Workspace work = workspace_at(scratch, padded);
  const Queries q = {nullptr,
                     nullptr,
                     kv_head_blocks(cache, cache.key, cache.keys, sequence, kv_head),
                     kv_head_blocks(cache, cache.value, cache.values, sequence, kv_head),
                     sinks_of(cache, true, sequence, kv_head),
                     sinks_of(cache, false, sequence, kv_head),
                     padded,
                     1,
                     1,
                     0};
  const float *keys = nullptr, *values = nullptr;
  float* row = work.queries;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = (first + i) / ql::kKvBlock, at = (first + i) % ql::kKvBlock;
    if (i == 0 || at == 0) {
      keys = load_keys(cache.key, head_dim, q.keys + block * kv_block_bytes(cache.key, head_dim),
                       ql::kKvBlock, work.keys);
      values = load_values(cache.value, head_dim,
                           q.values + block * kv_block_bytes(cache.value, head_dim), ql::kKvBlock,
                           work.values);
    }
    if (first + i < q.key_sinks.count) {
      q.key_sinks.get(first + i, row, padded);
    } else {
      for (int64_t c = 0; c < padded; ++c) row[c] = keys[c * ql::kKvBlock + at];
    }
    if (cache.key.rotate) rotate_head(row, padded, hadamard_size(head_dim));
    memcpy(key + i * key_stride, row, static_cast<size_t>(head_dim) * 4);
    if (first + i < q.value_sinks.count) {
      q.value_sinks.get(first + i, row, padded);
    } else {
      memcpy(row, values + at * padded, static_cast<size_t>(padded) * 4);
    }
    if (cache.value.rotate) rotate_head(row, padded, hadamard_size(head_dim));
    memcpy(value + i * value_stride, row, static_cast<size_t>(head_dim) * 4);
  }
}

constexpr ql::AttentionKernels kAttention = {append_positions, attention_scratch_bytes,
                                             attend_tokens,    attend_split,
                                             merge_splits,     dequantize_positions};

}  // namespace
