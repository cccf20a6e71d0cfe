// The two products of attention on packed blocks, numbers made in registers: for a few queries,
// where writing a block's numbers out first (kv_pack.h) would cost more than using them. The same
// sums in the same order as product() on what load_keys and load_values give. Needs lanes.h.
#pragma once

#include "attention_tile.h"
#include "kv_pack.h"

namespace {

// Vectors side by side in a tile of so many rows.
constexpr int direct_vectors(int rows) {
#if defined(__AVX512F__)
  return rows <= 4 ? 4 : 2;
#else
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
#endif
}

// Codes of 4 columns (or positions) a byte, 8 a nibble, as floats: j = 0, 1, ... of a chunk.
template <int kBits>
inline Lanes code_of(IntLanes words, int j) {
  return floats_of((words >> (j % 4 * 8 + j / 4 * 4)) & broadcast_int((1 << kBits) - 1));
}

// A few rows of queries or weights against one group of a block.
struct DirectProduct {
  const float* a;  // [rows]: queries from the group's first column, or weights of positions
  const uint8_t* group;
  float* c;            // [rows]: scores of 64 positions, or outputs from the group's first column
  const float* carry;  // [rows] or null: factors of c
  int64_t a_stride;
  int64_t c_stride;
  int64_t columns;
  int64_t begin;  // positions, of values
  int64_t end;
};

template <int kRows, int kVectors>
struct DirectSums {
  Lanes lanes[kRows][kVectors];

  DirectSums(const DirectProduct& p, int64_t at, bool fresh) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        lanes[r][v] = fresh ? zero_lanes() : load(p.c + r * p.c_stride + at + 16 * v);
        if (p.carry) lanes[r][v] = lanes[r][v] * broadcast(p.carry[r]);
      }
    }
  }

  void add(const DirectProduct& p, int64_t depth, const Lanes* from_b) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Lanes from_a = broadcast(p.a[r * p.a_stride + depth]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) lanes[r][v] = fma(from_a, from_b[v], lanes[r][v]);
    }
  }

  void put(const DirectProduct& p, int64_t at) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(p.c + r * p.c_stride + at + 16 * v, lanes[r][v]);
    }
  }
};

// Scores of positions [position, position + 16 * kVectors) += queries * keys of one group.
template <int kBits, int kRows, int kVectors>
inline void score_tile(const DirectProduct& p, int64_t position, bool fresh) {
  constexpr int kColumns = 32 / kBits;
  DirectSums<kRows, kVectors> sums(p, position, fresh);
  Steps steps[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) steps[v] = steps_of(p.group, position + 16 * v);
  const uint8_t* codes = p.group + 4 * kWordsPerBlock + 4 * position;
  for (int64_t column = 0; column < p.columns; column += kColumns, codes += 4 * ql::kKvBlock) {
    IntLanes words[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      words[v] = load_int(reinterpret_cast<const int32_t*>(codes + 64 * v));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      Lanes numbers[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        numbers[v] = fma(code_of<kBits>(words[v], j), steps[v].scale, steps[v].offset);
      }
      sums.add(p, column + j, numbers);
    }
  }
  sums.put(p, position);
}

// Scales and offsets of a group's positions, one by one; 0 outside [begin, end), so that whole
// chunks can be added: weights are 0 there, and codes finite, but a scale may be a NaN of former
// times.
struct PositionSteps {
  alignas(64) float scales[ql::kKvBlock];
  alignas(64) float offsets[ql::kKvBlock];

  PositionSteps(const uint8_t* group, int64_t begin, int64_t end) {
    const int64_t first = begin / 16 * 16, last = (end + 15) / 16 * 16;
    for (int64_t position = first; position < last; position += 16) {
      const Steps steps = steps_of(group, position);
      store(scales + position, steps.scale);
      store(offsets + position, steps.offset);
    }
    for (int64_t i = first; i < begin; ++i) scales[i] = offsets[i] = 0.0f;
    for (int64_t i = end; i < last; ++i) scales[i] = offsets[i] = 0.0f;
  }
};

// Outputs of columns [column, column + 16 * kVectors) of a group += weights * values.
template <int kBits, int kRows, int kVectors>
inline void output_tile(const DirectProduct& p, int64_t column, const PositionSteps& steps) {
  constexpr int64_t kPositions = 32 / kBits;
  DirectSums<kRows, kVectors> sums(p, column, false);
  const int64_t begin = p.begin / kPositions;
  const uint8_t* codes = p.group + 4 * kWordsPerBlock + 4 * (column + begin * p.columns);
  for (int64_t first = begin * kPositions; first < p.end; first += kPositions) {
    IntLanes words[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      words[v] = load_int(reinterpret_cast<const int32_t*>(codes + 64 * v));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kPositions; ++j) {
      const Lanes scale = broadcast(steps.scales[first + j]);
      const Lanes offset = broadcast(steps.offsets[first + j]);
      Lanes numbers[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        numbers[v] = fma(code_of<kBits>(words[v], j), scale, offset);
      }
      sums.add(p, first + j, numbers);
    }
    codes += 4 * p.columns;
  }
  sums.put(p, column);
}

template <int kBits, int kRows, int kVectors>
inline void output_columns(const DirectProduct& p, int64_t column, const PositionSteps& steps) {
  for (; column + 16 * kVectors <= p.columns; column += 16 * kVectors) {
    output_tile<kBits, kRows, kVectors>(p, column, steps);
  }
  if constexpr (kVectors > 1) {
    output_columns<kBits, kRows, kVectors / 2>(p, column, steps);
  }
}

// Of positions [position, p.end), rounded up to whole vectors.
template <int kBits, int kRows, int kVectors>
inline void score_positions(const DirectProduct& p, int64_t position, bool fresh) {
  for (; position + 16 * (kVectors - 1) < p.end; position += 16 * kVectors) {
    score_tile<kBits, kRows, kVectors>(p, position, fresh);
  }
  if constexpr (kVectors > 1) {
    score_positions<kBits, kRows, kVectors / 2>(p, position, fresh);
  }
}

template <int kBits, int kRows>
inline void output_group(const DirectProduct& p) {
  const PositionSteps steps(p.group, p.begin, p.end);
  output_columns<kBits, kRows, direct_vectors(kRows)>(p, 0, steps);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls function(Constant<rows>), 1 <= rows <= kTileRows.
template <int kRows = kTileRows, class Function>
inline void with_rows(int64_t rows, const Function& function) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return with_rows<kRows - 1>(rows, function);
  }
  function(Constant<kRows>());
}

// scores [rows][64] = queries [rows][padded] * keys of the first `positions` positions of a block,
// and some more.
inline void direct_scores(const ql::KvFormat& f, int64_t head_dim, const uint8_t* block,
                          int64_t rows, int64_t positions, const float* queries, float* scores) {
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    const DirectProduct p = {
        queries + g.start, block + g.offset, scores, nullptr,  kv_padded(head_dim),
        ql::kKvBlock,      g.columns,        0,      positions};
    const bool fresh = g.start == 0;
    with_rows(rows, [&](auto count) {
      if (g.bits == 8) {
        score_positions<8, count.value, direct_vectors(count.value)>(p, 0, fresh);
      } else {
        score_positions<4, count.value, direct_vectors(count.value)>(p, 0, fresh);
      }
    });
  });
}

// outputs [rows][padded] = outputs * carry + weights [rows][64] * values of positions [begin, end).
inline void direct_outputs(const ql::KvFormat& f, int64_t head_dim, const uint8_t* block,
                           int64_t rows, int64_t begin, int64_t end, const float* weights,
                           const float* carry, float* outputs) {
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    const DirectProduct p = {weights,      block + g.offset,    outputs + g.start, carry,
                             ql::kKvBlock, kv_padded(head_dim), g.columns,         begin,
                             end};
    with_rows(rows, [&](auto count) {
      if (g.bits == 8) {
        output_group<8, count.value>(p);
      } else {
        output_group<4, count.value>(p);
      }
    });
  });
}

}  // namespace
