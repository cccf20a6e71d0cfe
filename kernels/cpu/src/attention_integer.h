// The two products of attention on packed blocks in integers: queries and weights are rounded to 16
// bits (attention.h says how), which are two bytes, and bytes are multiplied with the codes as they
// stand in the cache. Integer sums are exact, so their order does not matter. Needs lanes.h.
#pragma once

#include "attention_direct.h"
#include "attention_softmax.h"
#include "kv_pack.h"

namespace {

constexpr int64_t kMostKvGroups = ql::kKvMaxHeadDim / ql::kKvLanes;

// As many accumulators as registers allow, two for each vector of a row.
#if defined(__AVX512F__)
constexpr int kIntegerRows = 6;
constexpr int integer_vectors(int rows) { return rows <= 3 ? 4 : 2; }
#else
constexpr int kIntegerRows = 2;
constexpr int integer_vectors(int) { return 1; }
#endif

#if defined(__AVX512VNNI__)
// The compiler takes __m512i for eight int64, and copies a sum of that type in every pass of a
// loop: see tile_avx512.h.
typedef int32_t DotSums __attribute__((vector_size(64)));
inline DotSums no_dots() { return DotSums{}; }
inline IntLanes ints_of(DotSums sums) { return {reinterpret_cast<__m512i>(sums)}; }
#else
using DotSums = IntLanes;
inline DotSums no_dots() { return broadcast_int(0); }
inline IntLanes ints_of(DotSums sums) { return sums; }
#endif

// sums + products of four unsigned bytes of each lane of `codes` with the four signed ones at
// `four`.
inline DotSums dot4(DotSums sums, IntLanes codes, const int8_t* four) {
#if defined(__AVX512VNNI__)
  int32_t word;
  memcpy(&word, four, 4);
  return reinterpret_cast<DotSums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes.v,
                                                       _mm512_set1_epi32(word)));
#elif defined(__AVX2__)
  // Pairs of 16 bits: bytes 0 and 2, then 1 and 3. VPMADDUBSW would saturate.
  const __m256i even = _mm256_set1_epi32(static_cast<uint16_t>(four[0]) | four[2] * 65536);
  const __m256i odd = _mm256_set1_epi32(static_cast<uint16_t>(four[1]) | four[3] * 65536);
  const __m256i bytes = _mm256_set1_epi16(0xFF);
  const auto half = [&](__m256i sum, __m256i code) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(code, bytes), even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(code, 8), odd));
  };
  return {half(sums.lo, codes.lo), half(sums.hi, codes.hi)};
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) sums.v[i] += (codes.v[i] >> 8 * j & 0xFF) * four[j];
  }
  return sums;
#endif
}

// Numbers rounded to 16 bits: n = 256 * high + low, x = n * step.
constexpr float kMostRounded = 127.0f * 256.0f;
constexpr float kLeastLargest = 0x1p-100f;  // where everything is smaller, everything counts as 0

struct Rounding {
  float inverse;  // n = rint(x * inverse); 0: all n are 0
  float step;
};

// `bits` are those of the largest magnitude.
inline Rounding rounding_of(int32_t bits) {
  if (bits >= 0x7F800000) return {0.0f, __builtin_nanf("")};
  const float largest = float_from(static_cast<uint32_t>(bits));
  if (largest < kLeastLargest) return {0.0f, 0.0f};
  return {kMostRounded / largest, largest / kMostRounded};
}

// Sixteen numbers to bytes; returns them rounded, as floats.
inline Lanes round_sixteen(Lanes x, const Rounding& rounding, int8_t* high, int8_t* low) {
  if (rounding.inverse == 0.0f) {  // some may not be finite
    memset(high, 0, 16);
    memset(low, 0, 16);
    return zero_lanes();
  }
  const IntLanes n = rounded_ints(x * broadcast(rounding.inverse));
  const IntLanes top = shift_right_signed(n + broadcast_int(128), 8);
  store_i8(high, top);
  store_i8(low, n - (top << 8));
  return floats_of(n);
}

inline int32_t highest_int(IntLanes a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(a.v);
#else
  int32_t lane[16];
  store_int(lane, a);
  int32_t top = lane[0];
  for (int i = 1; i < 16; ++i) top = lane[i] > top ? lane[i] : top;
  return top;
#endif
}

inline IntLanes magnitude_bits(Lanes a) { return float_bits(a) & broadcast_int(INT32_MAX); }

// A query: [2][padded] bytes, high ones first; its step; and the sums of its numbers over each
// group of the keys' columns.
struct RoundedQuery {
  int8_t* bytes;
  float* step;
  float* sums;  // [kMostKvGroups]
};

inline void round_query(const ql::KvFormat& f, int64_t head_dim, const float* x,
                        const RoundedQuery& out) {
  const int64_t padded = kv_padded(head_dim);
  IntLanes largest = broadcast_int(0);
  for (int64_t at = 0; at < padded; at += 16) {
    largest = max_int(largest, magnitude_bits(load(x + at)));
  }
  const Rounding rounding = rounding_of(highest_int(largest));
  *out.step = rounding.step;
  float* sum = out.sums;
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    Lanes sums = zero_lanes();
    for (int64_t at = g.start; at < g.start + g.columns; at += 16) {
      sums = sums + round_sixteen(load(x + at), rounding, out.bytes + at, out.bytes + padded + at);
    }
    *sum++ = sum_of(sums);  // whole numbers below 2^23: exact
  });
}

// Codes of a word, one byte each: all of them with 8 bits, low or high nibbles with 4.
template <int kBits>
inline IntLanes bytes_of(IntLanes words, int part) {
  if constexpr (kBits == 8) return words;
  return (part == 0 ? words : words >> 4) & broadcast_int(0x0F0F0F0F);
}

// Two sums of products, with high and with low bytes.
template <int kRows, int kVectors>
struct IntegerSums {
  DotSums high[kRows][kVectors];
  DotSums low[kRows][kVectors];

  IntegerSums() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) high[r][v] = low[r][v] = no_dots();
    }
  }

  // `bytes` are those of row 0 for the four columns (or positions) of the words' bytes; low bytes
  // are `half` behind high ones, rows 2 * half apart.
  template <int kBits>
  void add(const uint8_t* codes, const int8_t* bytes, int64_t half) {
    IntLanes words[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      words[v] = load_int(reinterpret_cast<const int32_t*>(codes + 64 * v));
    }
#pragma GCC unroll 2
    for (int part = 0; part < 8 / kBits; ++part) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int8_t* four = bytes + 2 * r * half + 4 * part;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const IntLanes some = bytes_of<kBits>(words[v], part);
          high[r][v] = dot4(high[r][v], some, four);
          low[r][v] = dot4(low[r][v], some, four + half);
        }
      }
    }
  }

  Lanes total(int r, int v) const {
    return floats_of((ints_of(high[r][v]) << 8) + ints_of(low[r][v]));
  }
};

// One group of a block of keys against a few queries.
struct KeyProduct {
  const int8_t* bytes;  // of the first query, from the group's first column on
  const float* sums;    // of the group's columns: [rows] at kMostKvGroups
  const float* steps;   // [rows]; null unless it is the last group
  const uint8_t* group;
  float* scores;  // [rows][64]
  int64_t padded;
  int64_t columns;
  bool fresh;  // scores are nothing yet
};

template <int kBits, int kRows, int kVectors>
inline void integer_score_tile(const KeyProduct& p, int64_t position) {
  IntegerSums<kRows, kVectors> sums;
  const uint8_t* codes = p.group + 4 * kWordsPerBlock + 4 * position;
  constexpr int64_t kColumns = 32 / kBits;
  for (int64_t column = 0; column < p.columns; column += kColumns, codes += 4 * ql::kKvBlock) {
    sums.template add<kBits>(codes, p.bytes + column, p.padded);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const IntLanes meta =
        load_int(reinterpret_cast<const int32_t*>(p.group) + position + 16 * v);
    const Lanes scale = bits_as_floats(meta & broadcast_int(static_cast<int32_t>(0xFFFF0000u)));
    const Lanes minus_zero = zero_lanes() - floats_of(shift_right_signed(meta << 16, 16));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* to = p.scores + r * ql::kKvBlock + position + 16 * v;
      const Lanes sum = broadcast(p.sums[r * kMostKvGroups]);
      const Lanes term = fma(minus_zero, sum, sums.total(r, v));
      Lanes score = fma(term, scale, p.fresh ? zero_lanes() : load(to));
      if (p.steps) score = score * broadcast(p.steps[r]);
      store(to, score);
    }
  }
}

template <int kBits, int kRows>
inline void integer_score_rows(const KeyProduct& p, int64_t positions) {
  constexpr int kVectors = integer_vectors(kRows);
  int64_t position = 0;
  for (; position + 16 * (kVectors - 1) < positions; position += 16 * kVectors) {
    integer_score_tile<kBits, kRows, kVectors>(p, position);
  }
  for (; position < positions; position += 16) {
    integer_score_tile<kBits, kRows, 1>(p, position);
  }
}

// scores [rows][64] = queries * keys of the first `positions` positions of a block, and some more.
// `queries` is the first of them; those after it lie behind it in each of its parts.
inline void integer_scores(const ql::KvFormat& f, int64_t head_dim, const uint8_t* block,
                           int64_t rows, int64_t positions, const RoundedQuery& queries,
                           float* scores) {
  const int64_t padded = kv_padded(head_dim);
  int64_t index = 0;
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    const bool last = g.start + g.columns >= padded;
    for (int64_t row = 0; row < rows; row += kIntegerRows) {
      const KeyProduct p = {queries.bytes + 2 * row * padded + g.start,
                            queries.sums + row * kMostKvGroups + index,
                            last ? queries.step + row : nullptr,
                            block + g.offset,
                            scores + row * ql::kKvBlock,
                            padded,
                            g.columns,
                            g.start == 0};
      with_rows<kIntegerRows>(smaller_of(rows - row, kIntegerRows), [&](auto count) {
        if (g.bits == 8) {
          integer_score_rows<8, count.value>(p, positions);
        } else {
          integer_score_rows<4, count.value>(p, positions);
        }
      });
    }
    ++index;
  });
}

// Weights of a tile's rows, times the scales of a group, rounded.
struct RoundedWeights {
  alignas(64) int8_t bytes[kTileRows][2][ql::kKvBlock];  // high, then low ones
  float steps[kTileRows];
  float shifts[kTileRows];  // sums of rounded weights times zeros
};

inline void round_weights(const uint8_t* group, int64_t rows, const Sight& sight,
                          const float* weights, RoundedWeights* out) {
  const int64_t first = sight.first / 16, last = (sight.last + 15) / 16;
  Lanes scales[ql::kKvBlock / 16], zeros[ql::kKvBlock / 16];
  for (int64_t v = first; v < last; ++v) {
    const IntLanes meta = load_int(reinterpret_cast<const int32_t*>(group) + 16 * v);
    scales[v] = bits_as_floats(meta & broadcast_int(static_cast<int32_t>(0xFFFF0000u)));
    zeros[v] = floats_of(shift_right_signed(meta << 16, 16));
  }
  for (int64_t r = 0; r < rows; ++r) {
    Lanes scaled[ql::kKvBlock / 16];
    IntLanes largest = broadcast_int(0);
    for (int64_t v = first; v < last; ++v) {
      scaled[v] = load(weights + r * ql::kKvBlock + 16 * v) * scales[v];
      // What a row does not see may be a NaN of former times.
      if (sight.begin[r] > 16 * v || sight.end[r] < 16 * v + 16) {
        scaled[v] = select(between(v, sight.begin[r], sight.end[r]), scaled[v], zero_lanes());
      }
      largest = max_int(largest, magnitude_bits(scaled[v]));
    }
    const Rounding rounding = rounding_of(highest_int(largest));
    Lanes shift = zero_lanes();
    for (int64_t v = first; v < last; ++v) {
      const Lanes n =
          round_sixteen(scaled[v], rounding, out->bytes[r][0] + 16 * v, out->bytes[r][1] + 16 * v);
      shift = fma(n, zeros[v], shift);
    }
    out->steps[r] = rounding.step;
    out->shifts[r] = sum_of(shift);
  }
}

// One group of a block of values, times a few rows of weights.
struct ValueProduct {
  const int8_t* bytes;  // of the first row
  const float* steps;   // [rows]
  const float* shifts;
  const float* carry;  // factors of the outputs so far
  const uint8_t* group;
  float* outputs;  // [rows] at `padded`, from the group's first column on
  int64_t padded;
  int64_t columns;
  int64_t begin;  // positions, multiples of 8
  int64_t end;
};

template <int kBits, int kRows, int kVectors>
inline void integer_output_tile(const ValueProduct& p, int64_t column) {
  IntegerSums<kRows, kVectors> sums;
  constexpr int64_t kPositions = 32 / kBits;
  const uint8_t* codes =
      p.group + 4 * kWordsPerBlock + 4 * (column + p.begin / kPositions * p.columns);
  for (int64_t position = p.begin; position < p.end; position += kPositions) {
    sums.template add<kBits>(codes, p.bytes + position, ql::kKvBlock);
    codes += 4 * p.columns;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = p.outputs + r * p.padded + column + 16 * v;
      const Lanes term = sums.total(r, v) - broadcast(p.shifts[r]);
      store(to, fma(term, broadcast(p.steps[r]), load(to) * broadcast(p.carry[r])));
    }
  }
}

template <int kBits, int kRows>
inline void integer_output_rows(const ValueProduct& p) {
  constexpr int kVectors = integer_vectors(kRows);
  int64_t column = 0;
  for (; column + 16 * kVectors <= p.columns; column += 16 * kVectors) {
    integer_output_tile<kBits, kRows, kVectors>(p, column);
  }
  for (; column < p.columns; column += 16) integer_output_tile<kBits, kRows, 1>(p, column);
}

// outputs [rows][padded] = outputs * carry + weights [rows][64] * values of what each row sees.
inline void integer_outputs(const ql::KvFormat& f, int64_t head_dim, const uint8_t* block,
                            int64_t rows, const Sight& sight, const float* weights,
                            const float* carry, float* outputs) {
  const int64_t padded = kv_padded(head_dim);
  RoundedWeights rounded;
  for_kv_groups(f, head_dim, [&](const ql::KvGroup& g) {
    round_weights(block + g.offset, rows, sight, weights, &rounded);
    for (int64_t row = 0; row < rows; row += kIntegerRows) {
      const ValueProduct p = {rounded.bytes[row][0],
                              rounded.steps + row,
                              rounded.shifts + row,
                              carry + row,
                              block + g.offset,
                              outputs + row * padded + g.start,
                              padded,
                              g.columns,
                              sight.first / 16 * 16,
                              sight.last};
      with_rows<kIntegerRows>(smaller_of(rows - row, kIntegerRows), [&](auto count) {
        if (g.bits == 8) {
          integer_output_rows<8, count.value>(p);
        } else {
          integer_output_rows<4, count.value>(p);
        }
      });
    }
  });
}

}  // namespace
