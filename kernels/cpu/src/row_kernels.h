// The kernels of the instruction sets without a byte dot product: one output row is decoded into
// scratch (which stays in the first-level cache), then multiplied with every token.
//
// Weights are widened to int16 with the zero point already subtracted, and multiplied as int16
// pairs: exact for every width. Bytes would be denser, but the x86 instruction for them
// (VPMADDUBSW) saturates with 8-bit weights and needs separate sums for zero points.
//
// An `Isa` supplies
//   Spread                       eight packed codes to eight bytes (see common.h)
//   Vector                       a GCC vector of floats
//   dot4(w, stride, a, n, sums)  sums[r] = sum over i < n of w[r * stride + i] * a[i], for four r;
//                                n is a multiple of 16
#pragma once

#include "common.h"

namespace {

constexpr int64_t kRowBlock = 4;  // output rows that share a load of the activations

template <class Isa>
struct RowKernels {
  struct Int8Token {
    float* scale;
    int16_t* values;
    float* sums;  // [pieces], for what whole zero points leave

    Int8Token(const QlWeight& w, Arena& arena) {
      scale = arena.take<float>(1);
      values = arena.take<int16_t>(padded_columns(w));
      sums = arena.take<float>(total_pieces(w));
    }
  };

  static Int8Token token_at(const Problem& p, int64_t token) {
    Arena arena{p.token_data + token * p.token_bytes};
    return Int8Token(*p.weight, arena);
  }

  static int64_t int8_token_bytes(const QlWeight& w, int64_t) {
    Arena arena{nullptr};
    Int8Token(w, arena);
    return arena.used;
  }

  static void int8_prepare(const Problem& p, int64_t index) {
    const QlWeight& w = *p.weight;
    const Int8Token token = token_at(p, index);
    *token.scale = round_padded_token(w, p.x + index * w.columns, token.values);
    sum_pieces(w, token.values, token.sums);
  }

  struct Int8Scratch {
    RowGroups row;
    int16_t* weights;  // [kRowBlock, padded columns], whole zero points subtracted
    float* scales;     // [pieces, kRowBlock]
    float* rests;      // likewise

    Int8Scratch(const QlWeight& w, Arena& arena) : row(w, arena, padded_columns(w)) {
      weights = arena.take<int16_t>(kRowBlock * padded_columns(w));
      scales = arena.take<float>(kRowBlock * total_pieces(w));
      rests = arena.take<float>(kRowBlock * total_pieces(w));
    }
  };

  static int64_t int8_scratch_bytes(const QlWeight& w, int64_t) {
    Arena arena{nullptr};
    Int8Scratch(w, arena);
    return arena.used;
  }

  static void decode_int8_row(const QlWeight& w, int64_t row, int64_t slot,
                              const Int8Scratch& scratch) {
    int16_t* out = scratch.weights + slot * padded_columns(w);
    int64_t at = slot;
    for (int64_t i = 0; i < w.segment_count; ++i) {
      const QlSegment& s = w.segments[i];
      scratch.row.decode_and_split(s, row);
      unpack_row<typename Isa::Spread>(s.packed + row * s.row_bytes, s.row_bytes, s.bits, padded(s),
                                       scratch.row.codes);
      for (int64_t piece = 0; piece < pieces(s); ++piece, at += kRowBlock) {
        const int64_t group = group_of_piece(s, piece), k = piece * piece_span(s);
        const int64_t end = smaller(k + piece_span(s), padded(s));
        const int32_t zero = scratch.row.whole[group];
        for (int64_t j = k; j < end; ++j) {
          out[j] = static_cast<int16_t>(scratch.row.codes[j] - zero);
        }
        scratch.scales[at] = scratch.row.scales[group];
        scratch.rests[at] = scratch.row.rest[group];
      }
      out += padded(s);
    }
  }

  static void int8_rows(const Problem& p, int64_t begin, int64_t end, uint8_t* scratch_memory) {
    const QlWeight& w = *p.weight;
    Arena arena{scratch_memory};
    const Int8Scratch scratch(w, arena);
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int64_t count = smaller(kRowBlock, end - row);
      for (int64_t r = 0; r < kRowBlock; ++r) {
        decode_int8_row(w, row + smaller(r, count - 1), r, scratch);
      }
      for (int64_t token = 0; token < p.tokens; ++token) int8_block(p, row, count, token, scratch);
    }
  }

  static void int8_block(const Problem& p, int64_t row, int64_t count, int64_t index,
                         const Int8Scratch& scratch) {
    const QlWeight& w = *p.weight;
    const Int8Token token = token_at(p, index);
    int64_t base = 0, at = 0;
    float totals[kRowBlock] = {};
    for (int64_t i = 0; i < w.segment_count; ++i) {
      const QlSegment& s = w.segments[i];
      for (int64_t k = 0; k < padded(s); k += piece_span(s), ++at) {
        const float* scales = scratch.scales + at * kRowBlock;
        const float* rests = scratch.rests + at * kRowBlock;
        int32_t dots[kRowBlock];
        Isa::dot4(scratch.weights + base + k, padded_columns(w), token.values + base + k,
                  smaller(piece_span(s), padded(s) - k), dots);
        for (int r = 0; r < kRowBlock; ++r) {
          totals[r] += static_cast<float>(dots[r]) * scales[r] - token.sums[at] * rests[r];
        }
      }
      base += padded(s);
    }
    for (int64_t r = 0; r < count; ++r) {
      const float bias = p.bias ? p.bias[row + r] : 0.0f;
      p.y[index * w.rows + row + r] = totals[r] * *token.scale + bias;
    }
  }

  // Decodes one row to floats, segment after segment, at `out` plus the segment's offset: `padding`
  // to the next multiple of 64 for the exact kernel, none for an output row.
  template <bool padding>
  static void decode_float_row(const QlWeight& w, int64_t row, const RowGroups& scratch,
                               float* out) {
    for (int64_t i = 0; i < w.segment_count; ++i) {
      const QlSegment& s = w.segments[i];
      const int64_t length = padding ? padded(s) : s.length;
      scratch.decode(s, row);
      unpack_row<typename Isa::Spread>(s.packed + row * s.row_bytes, s.row_bytes, s.bits, length,
                                       scratch.codes);
      for (int64_t piece = 0; piece < pieces(s); ++piece) {
        const int64_t group = group_of_piece(s, piece), k = piece * piece_span(s);
        const int64_t end = smaller(k + piece_span(s), length);
        const float scale = scratch.scales[group];
        if (s.code_book) {
          for (int64_t j = k; j < end; ++j) out[j] = s.code_book[scratch.codes[j]] * scale;
        } else {
          const float zero = scratch.zeros[group];
          for (int64_t j = k; j < end; ++j)
            out[j] = (static_cast<float>(scratch.codes[j]) - zero) * scale;
        }
      }
      out += length;
    }
  }

  static int64_t dequantize_scratch_bytes(const QlWeight& w) {
    Arena arena{nullptr};
    RowGroups(w, arena, padded_columns(w));
    return arena.used;
  }

  static void dequantize_row(const QlWeight& w, int64_t row, float* out, uint8_t* scratch_memory) {
    Arena arena{scratch_memory};
    decode_float_row<false>(w, row, RowGroups(w, arena, padded_columns(w)), out);
  }

  static int64_t exact_token_bytes(const QlWeight& w, int64_t) { return 4 * padded_columns(w); }

  static void exact_prepare(const Problem& p, int64_t token) {
    pad_token(*p.weight, p.x + token * p.weight->columns,
              reinterpret_cast<float*>(p.token_data + token * p.token_bytes));
  }

  static int64_t exact_scratch_bytes(const QlWeight& w, int64_t) {
    Arena arena{nullptr};
    RowGroups(w, arena, padded_columns(w));
    arena.take<float>(padded_columns(w));
    return arena.used;
  }

  static void exact_rows(const Problem& p, int64_t begin, int64_t end, uint8_t* scratch_memory) {
    const QlWeight& w = *p.weight;
    Arena arena{scratch_memory};
    const RowGroups scratch(w, arena, padded_columns(w));
    const int64_t columns = padded_columns(w);
    float* weights = arena.take<float>(columns);
    for (int64_t row = begin; row < end; ++row) {
      decode_float_row<true>(w, row, scratch, weights);
      for (int64_t token = 0; token < p.tokens; ++token) {
        const float* x = reinterpret_cast<const float*>(p.token_data + token * p.token_bytes);
        p.y[token * w.rows + row] = dot(weights, x, columns) + (p.bias ? p.bias[row] : 0.0f);
      }
    }
  }

  // Sixteen running sums whatever the vector width, so that this order of additions is the same
  // everywhere.
  static float dot(const float* w, const float* x, int64_t count) {
    using Vector = typename Isa::Vector;
    constexpr int64_t width = sizeof(Vector) / sizeof(float), vectors = 16 / width;
    Vector sums[vectors] = {};
    for (int64_t k = 0; k < count; k += 16) {
      for (int64_t v = 0; v < vectors; ++v) {
        sums[v] += load<Vector>(w + k + v * width) * load<Vector>(x + k + v * width);
      }
    }
    float total = 0.0f;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t lane = 0; lane < width; ++lane) total += sums[v][lane];
    }
    return total;
  }

  static constexpr ql::IsaKernels table(int64_t serial_work) {
    return {
        {kRowBlock, serial_work, int8_token_bytes, int8_scratch_bytes, int8_prepare, int8_rows},
        {kRowBlock, serial_work, exact_token_bytes, exact_scratch_bytes, exact_prepare, exact_rows},
        dequantize_scratch_bytes,
        dequantize_row,
    };
  }
};

}  // namespace
