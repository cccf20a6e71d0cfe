// AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
//
// VPERMB brings the bytes that hold eight codes into each quadword, VPMULTISHIFTQB picks the eight fields out of it, and a
// mask clears the neighbours: 64 codes of any width in three instructions, straight from the checkpoint's bit stream.
// VPDPBUSD then multiplies unsigned codes with signed activations and adds fours of them into int32 lanes, exactly.
// Zero points are subtracted as integers, lane by lane (sum of (q - z) a = sum of q a - z * sum of a), because the two
// sums are nearly equal when activations have a mean, and floats would lose what is left.
#include <immintrin.h>

#include "common.h"

namespace {

constexpr int64_t kChunk = 64;        // codes per vector
constexpr int64_t kTokenBlock = 4;    // tokens that share decoded weights in exact mode
constexpr int64_t kManyTokens = 5;    // from here on rows of int8 products are decoded once, into a panel
constexpr int64_t kPanelRows = 32;    // output rows of a panel: two vectors of int32 lanes
constexpr int64_t kPanelTokens = 6;   // 6 x 2 int32 and 6 x 2 float accumulators fill the 32 registers best

// Accumulators of VPDPBUSD. The compiler takes __m512i for eight int64, and when such a value lives across the passes of a
// loop it copies it on each: with the type that the instruction works on, it does not.
typedef int32_t Lanes __attribute__((vector_size(64)));

inline Lanes dot4(Lanes sums, __m512i codes, __m512i values) {
  return reinterpret_cast<Lanes>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, values));
}

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// Calls body(Constant<n>) for n = count in [first, last].
template <int first, int last, class Body>
inline void with_constant(int64_t count, const Body& body) {
  if constexpr (first < last) {
    if (count > first) return with_constant<first + 1, last>(count, body);
  }
  body(Constant<first>{});
}

template <int bits>
class Codes {  // one packed row, 64 codes at a time
 public:
  Codes(const uint8_t* row, int64_t bytes) : row_(row), bytes_(bytes), low_(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))) {
    alignas(64) uint8_t places[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = static_cast<uint8_t>(i % 8 < bits ? i / 8 * bits + i % 8 : 0);
      shifts[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    places_ = _mm512_load_si512(places);
    shifts_ = _mm512_load_si512(shifts);
  }

  // The codes k .. k + 63; past the end of the row, zeros.
  __m512i at(int64_t k) const {
    const int64_t offset = k / 8 * bits, left = bytes_ - offset;
    const uint64_t whole = ~0ull >> (64 - 8 * bits);
    const __mmask64 mask = left >= 8 * bits ? whole : left > 0 ? ~0ull >> (64 - left) : 0;
    const __m512i stream = _mm512_maskz_loadu_epi8(mask, row_ + offset);
    if constexpr (bits == 8) return stream;
    const __m512i spread = _mm512_permutexvar_epi8(places_, stream);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts_, spread), low_);
  }

 private:
  const uint8_t* row_;
  int64_t bytes_;
  __m512i places_, shifts_, low_;
};

// --- int8 activations, few tokens: codes are multiplied as they are decoded, and never stored -------------------------

// Integer sums are kept per lane over a block: a piece, or 64 codes when groups are shorter than that.
inline int64_t lane_blocks(const QlSegment& s) { return piece_span(s) < kChunk ? padded(s) / kChunk : pieces(s); }

// A prepared token: its scale; int8 values; then the sums the zero points multiply. For few tokens these are per block
// and lane; for many, per piece.
struct Int8Token {
  float* scale;
  int8_t* values;
  int32_t* sums;

  Int8Token(const QlWeight& w, int64_t tokens, Arena& arena) {
    int64_t count = 0;
    for (int64_t i = 0; i < w.segment_count; ++i) {
      count += tokens < kManyTokens ? 16 * lane_blocks(w.segments[i]) : pieces(w.segments[i]);
    }
    scale = arena.take<float>(1);
    values = arena.take<int8_t>(padded_columns(w));
    sums = arena.take<int32_t>(count);
  }
};

inline Int8Token token_at(const Problem& p, int64_t token) {
  Arena arena{p.token_data + token * p.token_bytes};
  return Int8Token(*p.weight, p.tokens, arena);
}

int64_t int8_token_bytes(const QlWeight& w, int64_t tokens) {
  Arena arena{nullptr};
  Int8Token(w, tokens, arena);
  return arena.used;
}

// Sums of 64 activations at a time, four to a lane.
inline __m512i lane_sums(const int8_t* values, int64_t count) {
  Lanes sums = {};
  for (int64_t k = 0; k < count; k += kChunk) {
    sums = dot4(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(values + k));
  }
  return reinterpret_cast<__m512i>(sums);
}

void int8_prepare(const Problem& p, int64_t index) {
  const QlWeight& w = *p.weight;
  const Int8Token token = token_at(p, index);
  *token.scale = round_padded_token(w, p.x + index * w.columns, token.values);
  const int8_t* values = token.values;
  int32_t* sums = token.sums;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    if (p.tokens < kManyTokens) {
      const int64_t span = piece_span(s) < kChunk ? kChunk : piece_span(s);
      for (int64_t k = 0; k < padded(s); k += span, sums += 16) {
        _mm512_storeu_si512(sums, lane_sums(values + k, smaller(span, padded(s) - k)));
      }
    } else {
      for (int64_t k = 0; k < padded(s); k += piece_span(s), ++sums) {
        const int64_t end = smaller(k + piece_span(s), padded(s));
        int32_t sum = 0;
        for (int64_t j = k; j < end; ++j) sum += values[j];
        *sums = sum;
      }
    }
    values += padded(s);
  }
}

template <int tokens>
struct LaneTotals {  // what one row has summed for each token
  const int8_t* values[tokens];
  const int32_t* sums[tokens];
  __m512 totals[tokens];

  inline void add(const Lanes (&dots)[tokens], __m512i zero, __m512 scale) {
    for (int t = 0; t < tokens; ++t) {
      const __m512i shift = _mm512_mullo_epi32(zero, _mm512_loadu_si512(sums[t]));
      totals[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(reinterpret_cast<__m512i>(dots[t]), shift)), scale, totals[t]);
      sums[t] += 16;
    }
  }
};

// Groups of 64 and more: one scale for all lanes, flushed at the end of each piece.
template <int bits, int tokens>
inline void dot_wide_groups(const QlSegment& s, const Codes<bits>& codes, const RowGroups& groups, LaneTotals<tokens>& lanes) {
  const int64_t columns = padded(s), span = piece_span(s);
  for (int64_t k = 0, piece = 0; k < columns; ++piece) {
    const int64_t end = smaller(k + span, columns), group = group_of_piece(s, piece);
    Lanes dots[tokens] = {};
    do {
      const __m512i chunk = codes.at(k);
      for (int t = 0; t < tokens; ++t) dots[t] = dot4(dots[t], chunk, _mm512_loadu_si512(lanes.values[t] + k));
      k += kChunk;
    } while (k < end);
    lanes.add(dots, _mm512_set1_epi32(groups.zeros[group]), _mm512_set1_ps(groups.scales[group]));
  }
}

// Groups of 16 and 32: a chunk holds four or two, each with its own lanes.
template <int bits, int tokens>
inline void dot_narrow_groups(const QlSegment& s, const Codes<bits>& codes, const RowGroups& groups, LaneTotals<tokens>& lanes) {
  const int64_t span = piece_span(s);
  alignas(64) int32_t group_of_lane[16];
  for (int lane = 0; lane < 16; ++lane) group_of_lane[lane] = static_cast<int32_t>(lane * 4 / span);
  const __m512i select = _mm512_load_si512(group_of_lane);
  for (int64_t k = 0; k < padded(s); k += kChunk) {
    const __m512i chunk = codes.at(k);
    Lanes dots[tokens] = {};
    for (int t = 0; t < tokens; ++t) dots[t] = dot4(dots[t], chunk, _mm512_loadu_si512(lanes.values[t] + k));
    const __m512i zeros = _mm512_permutexvar_epi32(select, _mm512_loadu_si512(groups.zeros + k / span));
    lanes.add(dots, zeros, _mm512_permutexvar_ps(select, _mm512_loadu_ps(groups.scales + k / span)));
  }
}

template <int tokens>
void int8_row(const Problem& p, int64_t row, const RowGroups& groups) {
  const QlWeight& w = *p.weight;
  LaneTotals<tokens> lanes = {};
  for (int t = 0; t < tokens; ++t) {
    const Int8Token token = token_at(p, t);
    lanes.values[t] = token.values;
    lanes.sums[t] = token.sums;
  }
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    groups.decode(s, row);
    with_constant<2, 8>(s.bits, [&](auto bits) {
      const Codes<bits.value> codes(s.packed + row * s.row_bytes, s.row_bytes);
      if (piece_span(s) < kChunk) {
        dot_narrow_groups(s, codes, groups, lanes);
      } else {
        dot_wide_groups(s, codes, groups, lanes);
      }
    });
    for (int t = 0; t < tokens; ++t) lanes.values[t] += padded(s);
  }
  for (int t = 0; t < tokens; ++t) {
    const float total = _mm512_reduce_add_ps(lanes.totals[t]) * *token_at(p, t).scale;
    p.y[t * w.rows + row] = total + (p.bias ? p.bias[row] : 0.0f);
  }
}

// --- int8 activations, many tokens: 32 rows are decoded once into a panel ordered for the multiplication ---------------

struct Panel {
  RowGroups groups;
  uint8_t* codes;   // [padded columns / 4][kPanelRows][4]: a vector is four consecutive codes of 16 rows
  float* scales;    // [pieces of all segments][kPanelRows]
  int32_t* zeros;   // likewise

  Panel(const QlWeight& w, Arena& arena) : groups(w, arena) {
    codes = arena.take<uint8_t>(kPanelRows * padded_columns(w));
    scales = arena.take<float>(kPanelRows * total_pieces(w));
    zeros = arena.take<int32_t>(kPanelRows * total_pieces(w));
  }
};

// Transposes a 16 x 16 matrix of int32, one row per vector: interleave rows by ones, by twos, then move quarters.
inline void transpose(__m512i (&v)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  }
  // b[4 i + j] holds, in quarter q, column 4 q + j of rows 4 i .. 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
    v[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    v[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    v[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
}

// Rows past the last one are read as empty: codes 0.
template <int bits>
void fill_panel_codes(const QlSegment& s, int64_t row, int64_t count, uint8_t* out) {
  for (int64_t half = 0; half < kPanelRows; half += 16) {
    for (int64_t k = 0; k < padded(s); k += kChunk) {
      __m512i v[16];
      for (int64_t r = 0; r < 16; ++r) {
        const bool exists = half + r < count;
        v[r] = Codes<bits>(s.packed + (exists ? row + half + r : row) * s.row_bytes, exists ? s.row_bytes : 0).at(k);
      }
      transpose(v);
      for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(out + (k / 4 + j) * kPanelRows * 4 + half * 4, v[j]);
    }
  }
}

void fill_panel(const QlWeight& w, int64_t row, int64_t count, const Panel& panel) {
  uint8_t* codes = panel.codes;
  int64_t base = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    with_constant<2, 8>(s.bits, [&](auto bits) { fill_panel_codes<bits.value>(s, row, count, codes); });
    for (int64_t r = 0; r < kPanelRows; ++r) {
      panel.groups.decode(s, row + smaller(r, count - 1));
      for (int64_t piece = 0; piece < pieces(s); ++piece) {
        panel.scales[(base + piece) * kPanelRows + r] = panel.groups.scales[group_of_piece(s, piece)];
        panel.zeros[(base + piece) * kPanelRows + r] = panel.groups.zeros[group_of_piece(s, piece)];
      }
    }
    codes += padded(s) * kPanelRows;
    base += pieces(s);
  }
}

// Dot products of `tokens` tokens, `stride` bytes apart, with the panel's 32 rows over `count` columns.
template <int tokens>
inline void dot_piece(const uint8_t* codes, const int8_t* values, int64_t stride, int64_t count,
                      Lanes (&dots)[tokens][2]) {
  const int8_t* const end = values + count;
  do {
    const __m512i low = _mm512_load_si512(codes);
    const __m512i high = _mm512_load_si512(codes + 64);
    for (int t = 0; t < tokens; ++t) {
      const __m512i a = _mm512_set1_epi32(load<int32_t>(values + t * stride));
      dots[t][0] = dot4(dots[t][0], low, a);
      dots[t][1] = dot4(dots[t][1], high, a);
    }
    codes += 4 * kPanelRows;
    values += 4;
  } while (values < end);
}

template <int tokens>
void panel_tile(const Problem& p, int64_t row, int64_t count, int64_t first, const Panel& panel) {
  const QlWeight& w = *p.weight;
  const Int8Token token = token_at(p, first);  // the others follow at intervals of token_bytes
  const auto sum_of = [&](int t, int64_t piece) {
    return load<int32_t>(reinterpret_cast<const uint8_t*>(token.sums + piece) + t * p.token_bytes);
  };
  __m512 totals[tokens][2] = {};
  const float* scales = panel.scales;
  const int32_t* zeros = panel.zeros;
  int64_t base = 0, index = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    const int64_t columns = base + padded(s), span = piece_span(s);
    for (; base < columns; base += span, ++index, scales += kPanelRows, zeros += kPanelRows) {
      Lanes dots[tokens][2] = {};
      dot_piece(panel.codes + base * kPanelRows, token.values + base, p.token_bytes, smaller(span, columns - base), dots);
      for (int h = 0; h < 2; ++h) {
        const __m512 scale = _mm512_load_ps(scales + 16 * h);
        const __m512i zero = _mm512_load_si512(zeros + 16 * h);
        for (int t = 0; t < tokens; ++t) {
          const __m512i shift = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum_of(t, index)));
          const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(reinterpret_cast<__m512i>(dots[t][h]), shift));
          totals[t][h] = _mm512_fmadd_ps(dot, scale, totals[t][h]);
        }
      }
    }
    base = columns;
  }
  for (int h = 0; h < 2; ++h) {
    const int64_t left = count - 16 * h;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0);
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + row + 16 * h) : _mm512_setzero_ps();
    for (int t = 0; t < tokens; ++t) {
      const __m512 scale = _mm512_set1_ps(*token_at(p, first + t).scale);
      float* out = p.y + (first + t) * w.rows + row + 16 * h;
      _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(totals[t][h], scale, bias));
    }
  }
}

int64_t int8_scratch_bytes(const QlWeight& w, int64_t tokens) {
  Arena arena{nullptr};
  if (tokens < kManyTokens) {
    RowGroups(w, arena);
  } else {
    Panel(w, arena);
  }
  return arena.used;
}

void int8_rows(const Problem& p, int64_t begin, int64_t end, uint8_t* scratch) {
  Arena arena{scratch};
  if (p.tokens < kManyTokens) {
    const RowGroups groups(*p.weight, arena);
    for (int64_t row = begin; row < end; ++row) {
      with_constant<1, kManyTokens - 1>(p.tokens, [&](auto count) { int8_row<count.value>(p, row, groups); });
    }
    return;
  }
  const Panel panel(*p.weight, arena);
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int64_t rows = smaller(kPanelRows, end - row);
    fill_panel(*p.weight, row, rows, panel);
    for (int64_t token = 0; token < p.tokens; token += kPanelTokens) {
      with_constant<1, kPanelTokens>(smaller(p.tokens - token, kPanelTokens),
                                     [&](auto count) { panel_tile<count.value>(p, row, rows, token, panel); });
    }
  }
}

// --- exact: codes become floats in registers --------------------------------------------------------------------------

// How 16 codes (int32 lanes) become weights. `set` is called at the start of every group. Each gives the float32 number
// (code - zero) * scale, or value_of(code) * scale, that the reference gives.
struct IntegerTable {  // up to 4 bits: all sixteen weights of the group fit a register
  explicit IntegerTable(const QlSegment&) : table(_mm512_setzero_ps()) {}
  __m512 table;
  void set(float scale, int32_t zero) {
    const __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    table = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(zero))), _mm512_set1_ps(scale));
  }
  __m512 operator()(__m512i codes) const { return _mm512_permutexvar_ps(codes, table); }
};

struct IntegerLinear {
  explicit IntegerLinear(const QlSegment&) : scale(_mm512_setzero_ps()), zero(_mm512_setzero_si512()) {}
  __m512 scale;
  __m512i zero;
  void set(float scale_, int32_t zero_) {
    scale = _mm512_set1_ps(scale_);
    zero = _mm512_set1_epi32(zero_);
  }
  __m512 operator()(__m512i codes) const {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, zero)), scale);
  }
};

struct FloatBook {
  explicit FloatBook(const QlSegment& s) : book(s.code_book), scale(_mm512_setzero_ps()) {}
  const float* book;
  __m512 scale;
  void set(float scale_, int32_t) { scale = _mm512_set1_ps(scale_); }
  __m512 operator()(__m512i codes) const { return _mm512_mul_ps(_mm512_i32gather_ps(codes, book, 4), scale); }
};

// Decodes a row of a segment and hands it to sink(k, Constant<k / 16 % 4>, 16 weights), in order, padding included.
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
inline void decode_any_row(const QlSegment& s, int64_t row, const RowGroups& groups, const Sink& sink) {
  groups.decode(s, row);
  with_constant<2, 8>(s.bits, [&](auto bits) {
    constexpr int width = bits.value;
    if (s.code_book) {
      decode_row<width, FloatBook>(s, row, groups, sink);
    } else if constexpr (width <= 4) {
      decode_row<width, IntegerTable>(s, row, groups, sink);
    } else {
      decode_row<width, IntegerLinear>(s, row, groups, sink);
    }
  });
}

int64_t exact_token_bytes(const QlWeight& w, int64_t) { return padded_columns(w) * static_cast<int64_t>(sizeof(float)); }

int64_t groups_scratch_bytes(const QlWeight& w) {
  Arena arena{nullptr};
  RowGroups(w, arena);
  return arena.used;
}

int64_t exact_scratch_bytes(const QlWeight& w, int64_t) { return groups_scratch_bytes(w); }

void exact_prepare(const Problem& p, int64_t token) {
  pad_token(*p.weight, p.x + token * p.weight->columns, reinterpret_cast<float*>(p.token_data + token * p.token_bytes));
}

template <int tokens>
void exact_row(const Problem& p, int64_t row, int64_t first, const RowGroups& groups) {
  const QlWeight& w = *p.weight;
  const float* x[tokens];
  for (int t = 0; t < tokens; ++t) x[t] = reinterpret_cast<const float*>(p.token_data + (first + t) * p.token_bytes);
  __m512 sums[tokens][4] = {};  // four chains of additions hide the latency of one
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    decode_any_row(s, row, groups, [&](int64_t k, auto quarter, __m512 weights) {
      constexpr int q = quarter.value;
      for (int t = 0; t < tokens; ++t) sums[t][q] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x[t] + k), sums[t][q]);
    });
    for (int t = 0; t < tokens; ++t) x[t] += padded(s);
  }
  for (int t = 0; t < tokens; ++t) {
    const __m512 total = _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3]));
    p.y[(first + t) * w.rows + row] = _mm512_reduce_add_ps(total) + (p.bias ? p.bias[row] : 0.0f);
  }
}

void exact_rows(const Problem& p, int64_t begin, int64_t end, uint8_t* scratch) {
  Arena arena{scratch};
  const RowGroups groups(*p.weight, arena);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t token = 0; token < p.tokens; token += kTokenBlock) {
      with_constant<1, kTokenBlock>(smaller(p.tokens - token, kTokenBlock),
                                    [&](auto count) { exact_row<count.value>(p, row, token, groups); });
    }
  }
}

void dequantize_row(const QlWeight& w, int64_t row, float* out, uint8_t* scratch) {
  Arena arena{scratch};
  const RowGroups groups(w, arena);
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const QlSegment& s = w.segments[i];
    decode_any_row(s, row, groups, [&](int64_t k, auto, __m512 weights) {
      const int64_t left = s.length - k;
      const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0);
      _mm512_mask_storeu_ps(out + s.start + k, mask, weights);
    });
  }
}

}  // namespace

namespace ql {
const IsaKernels avx512_kernels = {
    {kPanelRows, 2000000, int8_token_bytes, int8_scratch_bytes, int8_prepare, int8_rows},
    {8, 1000000, exact_token_bytes, exact_scratch_bytes, exact_prepare, exact_rows},
    groups_scratch_bytes,
    dequantize_row,
};
}
