// Exact mode and dequantization: codes become floats in registers.
#pragma once

#include "avx512_codes.h"

namespace {

constexpr int64_t kTokenBlock = 4;  // tokens that share decoded weights

// How 16 codes (int32 lanes) become weights. `set` is called at the start of every group. Each
// gives the float32 number (code - zero) * scale, or value_of(code) * scale, that the reference
// gives.
struct IntegerTable {  // up to 4 bits: all sixteen weights of the group fit a register
  explicit IntegerTable(const QlSegment&) : table(_mm512_setzero_ps()) {}
  __m512 table;
  void set(float scale, float zero) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    table = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
  }
  __m512 operator()(__m512i codes) const { return _mm512_permutexvar_ps(codes, table); }
};

struct IntegerLinear {
  explicit IntegerLinear(const QlSegment&) : scale(_mm512_setzero_ps()), zero(scale) {}
  __m512 scale, zero;
  void set(float scale_, float zero_) {
    scale = _mm512_set1_ps(scale_);
    zero = _mm512_set1_ps(zero_);
  }
  __m512 operator()(__m512i codes) const {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero), scale);
  }
};

struct FloatBook {
  explicit FloatBook(const QlSegment& s) : book(s.code_book), scale(_mm512_setzero_ps()) {}
  const float* book;
  __m512 scale;
  void set(float scale_, float) { scale = _mm512_set1_ps(scale_); }
  __m512 operator()(__m512i codes) const {
    return _mm512_mul_ps(_mm512_i32gather_ps(codes, book, 4), scale);
  }
};

// Decodes a row of a segment and hands it to sink(k, Constant<k / 16 % 4>, 16 weights), in order,
// padding included.
template <int bits, class Decoder, class Sink>
inline void decode_row(const QlSegment& s, int64_t row, const RowGroups& groups, const Sink& sink) {
  const Codes<bits> codes(s.packed + row * s.row_bytes, s.row_bytes);
  Decoder decoder(s);
  int64_t piece = 0, next = 0;
  for (int64_t k = 0; k < padded(s); k += kChunk) {
    const __m512i chunk = codes.at(k);
    const auto quarter = [&](auto q, __m128i sixteen) {
      if (k + 16 * q.value == next) {
        const int64_t group = group_of_piece(s, piece++);
        decoder.set(groups.scales[group], groups.zeros[group]);
        next += piece_span(s);
      }
      sink(k + 16 * q.value, q, decoder(_mm512_cvtepu8_epi32(sixteen)));
    };
    quarter(Constant<0>{}, _mm512_extracti32x4_epi32(chunk, 0));
    quarter(Constant<1>{}, _mm512_extracti32x4_epi32(chunk, 1));
    quarter(Constant<2>{}, _mm512_extracti32x4_epi32(chunk, 2));
    quarter(Constant<3>{}, _mm512_extracti32x4_epi32(chunk, 3));
  }
}

template <class Sink>
inline void decode_any_row(const QlSegment& s, int64_t row, const RowGroups& groups,
                           const Sink& sink) {
  groups.decode(s, row);
  with_constant<2, 8>(s.bits, [&](auto bits) {
    constexpr int width = bits.value;
    if constexpr (width == 4 || width == 6 || width == 8) {  // the widths of floats
      if (s.code_book) return decode_row<width, FloatBook>(s, row, groups, sink);
    }
    if constexpr (width <= 4) {
      decode_row<width, IntegerTable>(s, row, groups, sink);
    } else {
      decode_row<width, IntegerLinear>(s, row, groups, sink);
    }
  });
}

int64_t exact_token_bytes(const QlWeight& w, int64_t) {
  return padded_columns(w) * static_cast<int64_t>(sizeof(float));
}

int64_t groups_scratch_bytes(const QlWeight& w) {
  Arena arena{nullptr};
  RowGroups(w, arena);
  return arena.used;
}

int64_t exact_scratch_bytes(const QlWeight& w, int64_t) { return groups_scratch_bytes(w); }

void exact_prepare(const Problem& p, int64_t token) {
  pad_token(*p.weight, p.x + token * p.weight->columns,
            reinterpret_cast<float*>(p.token_data + token * p.token_bytes));
}

template <int tokens>
void exact_row(const Problem& p, int64_t row, int64_t first, const RowGroups& groups) {
  const QlWeight& w = *p.weight;
  const float* x[tokens];
  for (int t = 0; t < tokens; ++t) {
    x[t] = reinterpret_cast<const float*>(p.token_data + (first + t) * p.token_bytes);
  }
  __m512 sums[tokens][4] = {};  // four chains of additions hide the latency of one
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    decode_any_row(s, row, groups, [&](int64_t k, auto quarter, __m512 weights) {
      constexpr int q = quarter.value;
      for (int t = 0; t < tokens; ++t) {
        sums[t][q] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x[t] + k), sums[t][q]);
      }
    });
    for (int t = 0; t < tokens; ++t) x[t] += padded(s);
  }
  for (int t = 0; t < tokens; ++t) {
    const __m512 low = _mm512_add_ps(sums[t][0], sums[t][1]);
    const __m512 high = _mm512_add_ps(sums[t][2], sums[t][3]);
    const float total = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    p.y[(first + t) * w.rows + row] = total + (p.bias ? p.bias[row] : 0.0f);
  }
}

void exact_rows(const Problem& p, int64_t begin, int64_t end, uint8_t* scratch) {
  Arena arena{scratch};
  const RowGroups groups(*p.weight, arena);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t token = 0; token < p.tokens; token += kTokenBlock) {
      with_constant<1, kTokenBlock>(smaller(p.tokens - token, kTokenBlock), [&](auto count) {
        exact_row<count.value>(p, row, token, groups);
      });
    }
  }
}

void dequantize_row(const QlWeight& w, int64_t row, float* out, uint8_t* scratch) {
  Arena arena{scratch};
  const RowGroups groups(w, arena);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    decode_any_row(s, row, groups, [&](int64_t k, auto, __m512 weights) {
      _mm512_mask_storeu_ps(out + s.start + k, lanes_below(s.length - k), weights);
    });
  }
}

}  // namespace
