// The arithmetic of tiles.h, executed as it is written there: plain C++, in loops over the 16 rows of
// a block, which a compiler can vectorize. Every other instruction set must give the same bits.
//
// A block is decoded once, into scratch, and multiplied with all tokens.
#pragma once

#include "kernels.h"
#include "numbers.h"
#include "tile_rounding.h"

namespace {

using ql::kBlockRows;
using ql::kStripRows;
using ql::TiledWeight;
using ql::TileInput;
using ql::TileOutput;
using ql::TileSegment;

// Scales and zero points of the 16 rows of a block in one piece. With whole sums, what a dot product
// and a sum of activations are multiplied by: integers.
struct PieceMeta {
  float scales[kBlockRows];
  float zeros[kBlockRows];
};

template <bool int8>
auto value_type() {
  if constexpr (int8) {
    return uint8_t{};
  } else {
    return float{};
  }
}

// A block in scratch: [pieces] meta, then 16 rows of each column: the bytes that int8 mode
// multiplies, or the values less the zero points.
template <bool int8>
struct Scratch {
  using Value = decltype(value_type<int8>());
  PieceMeta* meta;
  Value* values;

  Scratch(uint8_t* memory, int64_t pieces) : meta(reinterpret_cast<PieceMeta*>(memory)) {
    values = reinterpret_cast<Value*>(meta + pieces);
  }
};

inline int64_t total_pieces(const TiledWeight& w) {
  int64_t total = 0;
  for (int64_t i = 0; i < w.segment_count; ++i) total += w.segments[i].pieces;
  return total;
}

int64_t scratch_bytes(const TiledWeight& w, int64_t) {
  return total_pieces(w) * static_cast<int64_t>(sizeof(PieceMeta)) +
         tile_padded_columns(w) * kBlockRows * static_cast<int64_t>(sizeof(float));
}

// The code of row r and column k of a block of a piece.
inline uint32_t code_at(const uint8_t* block, int32_t bits, int64_t k, int64_t r) {
  const int64_t chunk = k / ql::kChunkColumns, byte = 4 * r + k % ql::kChunkColumns;
  const uint32_t mask = (1u << bits) - 1;
  if (bits == 8 || bits == 4 || bits == 2) {
    const int64_t chunks = 8 / bits;  // that share 64 bytes
    return block[chunk / chunks * 64 + byte] >> (chunk % chunks * bits) & mask;
  }
  const int64_t bit = (chunk * 64 + byte) * bits;
  uint32_t word = block[bit / 8];
  if (bit % 8 + bits > 8) word |= static_cast<uint32_t>(block[bit / 8 + 1]) << 8;
  return word >> (bit % 8) & mask;
}

inline float stored_scale(const TileSegment& s, const uint8_t* meta, int64_t r) {
  switch (s.scale_kind) {
    case ql::SCALE_F16: return half_to_float(load<uint16_t>(meta + 2 * r));
    case ql::SCALE_CODE: return static_cast<float>(meta[r] & ((1u << s.scale_bits) - 1));
    case ql::SCALE_E8M0: return e8m0_to_float(meta[r]);
    default: return e4m3_to_float(meta[r]);
  }
}

inline float zero_of(const TileSegment& s, const uint8_t* meta, int64_t r) {
  switch (s.zero_kind) {
    case ql::ZERO_BYTE:
      return static_cast<float>(meta[block_meta_bytes(s) - kBlockRows + r]) * s.zero_step;
    case ql::ZERO_NIBBLE:
      return static_cast<float>(meta[r] >> s.scale_bits) * s.zero_step;
    default:
      return s.zero_constant;
  }
}

// The zero point of a segment with whole sums.
inline int32_t zero_in_units(const TileSegment& s, const uint8_t* meta, int64_t r) {
  switch (s.zero_kind) {
    case ql::ZERO_BYTE: return meta[kBlockRows + r] * s.zero_units;
    case ql::ZERO_NIBBLE: return (meta[r] >> s.scale_bits) * s.zero_units;
    default: return static_cast<int32_t>(s.zero_constant);
  }
}

// Where a piece of a block lies: `blocks` of the strip follow one another in each piece.
inline const uint8_t* codes_at(const TileSegment& s, int64_t strip, int64_t blocks, int64_t block,
                               int64_t piece) {
  return s.codes + strip * s.codes_stride +
         blocks * block_code_bytes(piece * s.piece, s.bits) +
         block * block_code_bytes(piece_columns(s, piece), s.bits);
}

inline const uint8_t* meta_at(const TileSegment& s, int64_t strip, int64_t blocks, int64_t block,
                              int64_t piece) {
  return s.meta + strip * s.meta_stride + (blocks * piece + block) * block_meta_bytes(s);
}

// The codes of a chunk to bytes: 4 * r + j is that of row r and column j.
inline void decode_chunk(const uint8_t* block, int32_t bits, int64_t chunk, uint8_t* codes) {
  const uint32_t mask = (1u << bits) - 1;
  if (bits == 8 || bits == 4 || bits == 2) {
    const int64_t chunks = 8 / bits;
    const uint8_t* line = block + chunk / chunks * 64;
    const int shift = static_cast<int>(chunk % chunks) * bits;
    for (int64_t i = 0; i < 64; ++i) codes[i] = static_cast<uint8_t>(line[i] >> shift & mask);
    return;
  }
  for (int64_t i = 0; i < 8; ++i) {  // what is read past the codes is dropped
    const uint64_t word = load<uint64_t>(block + (chunk * 8 + i) * bits);
    for (int64_t j = 0; j < 8; ++j) codes[8 * i + j] = static_cast<uint8_t>(word >> j * bits & mask);
  }
}

// The scales and zero points of the rows of a block in one piece. In int8 mode the unit of float
// elements goes into the scales, and they have zero points.
template <bool int8>
void decode_meta(const TileSegment& s, const uint8_t* stored, const float* factors, bool whole,
                 PieceMeta* meta) {
  for (int64_t r = 0; r < kBlockRows; ++r) {
    if (whole) {
      const int32_t scale = stored[r] & ((1 << s.scale_bits) - 1);
      meta->scales[r] = static_cast<float>(scale * s.code_units);
      meta->zeros[r] = static_cast<float>(scale * zero_in_units(s, stored, r));
      continue;
    }
    meta->scales[r] = stored_scale(s, stored, r) * factors[r];
    if (int8) meta->scales[r] *= s.integer_unit;
    meta->zeros[r] = s.float_values && !int8 ? 0.0f : zero_of(s, stored, r);
  }
}

template <bool int8>
void decode_block(const TiledWeight& w, int64_t strip, int64_t block, int64_t act_group,
                  const Scratch<int8>& scratch) {
  const int64_t blocks = tile_blocks(w, strip);
  PieceMeta* meta = scratch.meta;
  auto* values = scratch.values;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const TileSegment& s = w.segments[i];
    const float* factors = s.factors + strip * kStripRows + block * kBlockRows;
    const bool whole = int8 && has_whole_sums(s, act_group);
    for (int64_t piece = 0; piece < s.pieces; ++piece, ++meta) {
      decode_meta<int8>(s, meta_at(s, strip, blocks, block, piece), factors, whole, meta);
      const uint8_t* stored = codes_at(s, strip, blocks, block, piece);
      for (int64_t chunk = 0; chunk < piece_columns(s, piece) / ql::kChunkColumns; ++chunk) {
        uint8_t codes[64];
        decode_chunk(stored, s.bits, chunk, codes);
        for (int64_t k = 0; k < ql::kChunkColumns; ++k, values += kBlockRows) {
          for (int64_t r = 0; r < kBlockRows; ++r) {
            const uint8_t code = codes[ql::kChunkColumns * r + k];
            if constexpr (int8) {
              values[r] = s.integer_values ? s.integer_values[code] : code;
            } else {
              const float value = s.float_values ? s.float_values[code] : static_cast<float>(code);
              values[r] = value - meta->zeros[r];
            }
          }
        }
      }
    }
  }
}

// What a block's rows start from: the bias.
inline void begin(const TiledWeight& w, const TileOutput& out, int64_t first_row, float* y) {
  for (int64_t r = 0; r < kBlockRows; ++r) {
    y[r] = out.bias && first_row + r < w.rows ? out.bias[first_row + r] : 0.0f;
  }
}

inline void finish(const TiledWeight& w, const TileOutput& out, int64_t first_row, int64_t token,
                   const float* y) {
  for (int64_t r = 0; r < kBlockRows && first_row + r < w.rows; ++r) {
    float* to = out.y + token * out.y_stride + first_row + r;
    *to = out.accumulate ? *to + y[r] : y[r];
  }
}

// Where a token and a block are, in a segment.
struct Cursor {
  const int8_t* a;
  const float* sums;
  const float* act_scales;
  const PieceMeta* meta;
  const uint8_t* values;
};

// The dot products of columns [first, last) of a segment: at.a and at.values go on.
inline void dot_columns(Cursor& at, int64_t first, int64_t last, int32_t* dots) {
  for (int64_t r = 0; r < kBlockRows; ++r) dots[r] = 0;
  for (int64_t k = first; k < last; ++k, ++at.a, at.values += kBlockRows) {
    for (int64_t r = 0; r < kBlockRows; ++r) dots[r] += at.values[r] * *at.a;
  }
}

void add_runs(const TileSegment& s, int64_t act_group, Cursor& at, float* totals) {
  const int64_t run = run_columns(s, act_group);
  const float* sums = at.sums + sum_offset(s.padded, run);
  for (int64_t k = 0; k < s.padded; k += run, ++sums) {
    const PieceMeta& own = at.meta[k / s.piece];
    int32_t dots[kBlockRows];
    dot_columns(at, k, smaller_of(k + run, s.padded), dots);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      float t = __builtin_fmaf(-own.zeros[r], *sums, static_cast<float>(dots[r]));
      if (act_group > 0) t *= at.act_scales[k / act_group];
      totals[r] = __builtin_fmaf(t, own.scales[r], totals[r]);
    }
  }
}

// `factors` are those of the block's rows.
void add_whole_runs(const TileSegment& s, const float* factors, Cursor& at, float* totals) {
  const float* sums = at.sums + sum_offset(s.padded, s.piece);
  const PieceMeta* own = at.meta;
  const float unit = 1.0f / static_cast<float>(s.code_units);
  for (int64_t begin = 0; begin < s.padded; begin += ql::kWholeRun) {
    const int64_t end = smaller_of(begin + ql::kWholeRun, s.padded);
    int32_t t[kBlockRows] = {};
    for (int64_t k = begin; k < end; k += s.piece, ++sums, ++own) {
      int32_t dots[kBlockRows];
      dot_columns(at, k, smaller_of(k + s.piece, end), dots);
      for (int64_t r = 0; r < kBlockRows; ++r) {
        t[r] += static_cast<int32_t>(own->scales[r]) * dots[r] -
                static_cast<int32_t>(own->zeros[r]) * static_cast<int32_t>(*sums);
      }
    }
    for (int64_t r = 0; r < kBlockRows; ++r) {
      totals[r] = __builtin_fmaf(static_cast<float>(t[r]), factors[r] * unit, totals[r]);
    }
  }
}

// One token times the block that begins at `row`: y[16] += its sums.
void multiply(const TiledWeight& w, const TileInput& in, int64_t row, int64_t token,
              const Scratch<true>& scratch, float* y) {
  Cursor at{in.values + token * in.value_stride, in.sums + token * in.sum_stride,
            in.scales + token * in.scale_stride, scratch.meta, scratch.values};
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const TileSegment& s = w.segments[i];
    float totals[kBlockRows] = {};
    if (has_whole_sums(s, in.act_group)) {
      add_whole_runs(s, s.factors + row, at, totals);
    } else {
      add_runs(s, in.act_group, at, totals);
    }
    const float scale = segment_scale(in, token, i);
    for (int64_t r = 0; r < kBlockRows; ++r) y[r] = __builtin_fmaf(totals[r], scale, y[r]);
    at.meta += s.pieces;
    at.sums += sum_count(s.padded);
    if (in.act_group > 0) at.act_scales += act_group_count(s.padded, in.act_group);
  }
}

void multiply(const TiledWeight& w, const TileInput& in, int64_t, int64_t token,
              const Scratch<false>& scratch, float* y) {
  const float* x = in.floats + token * in.value_stride;
  const PieceMeta* meta = scratch.meta;
  const float* values = scratch.values;
  float totals[kBlockRows] = {};
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const TileSegment& s = w.segments[i];
    for (int64_t piece = 0; piece < s.pieces; ++piece, ++meta) {
      float sums[kBlockRows] = {};
      for (int64_t k = 0; k < piece_columns(s, piece); ++k, ++x, values += kBlockRows) {
        for (int64_t r = 0; r < kBlockRows; ++r) {
          sums[r] = __builtin_fmaf(*x, values[r], sums[r]);
        }
      }
      for (int64_t r = 0; r < kBlockRows; ++r) {
        totals[r] = __builtin_fmaf(sums[r], meta->scales[r], totals[r]);
      }
    }
  }
  const float scale = in.scales ? in.scales[token * in.scale_stride] : 1.0f;
  for (int64_t r = 0; r < kBlockRows; ++r) y[r] = __builtin_fmaf(totals[r], scale, y[r]);
}

template <bool int8>
void strips(const TiledWeight& w, const TileInput& in, const TileOutput& out, int64_t first,
            int64_t last, uint8_t* memory) {
  const Scratch<int8> scratch(memory, total_pieces(w));
  for (int64_t strip = first; strip < last; ++strip) {
    for (int64_t block = 0; block < tile_blocks(w, strip); ++block) {
      const int64_t row = strip * kStripRows + block * kBlockRows;
      decode_block(w, strip, block, in.act_group, scratch);
      for (int64_t token = 0; token < in.tokens; ++token) {
        float y[kBlockRows];
        begin(w, out, row, y);
        multiply(w, in, row, token, scratch, y);
        finish(w, out, row, token, y);
      }
    }
  }
}

void dequantize_row(const TiledWeight& w, int64_t row, float* out) {
  const int64_t strip = row / kStripRows, block = row % kStripRows / kBlockRows;
  const int64_t blocks = tile_blocks(w, strip), r = row % kBlockRows;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const TileSegment& s = w.segments[i];
    for (int64_t piece = 0; piece < s.pieces; ++piece) {
      const uint8_t* meta = meta_at(s, strip, blocks, block, piece);
      const uint8_t* codes = codes_at(s, strip, blocks, block, piece);
      const float scale = stored_scale(s, meta, r) * s.factors[row];
      const float zero = s.float_values ? 0.0f : zero_of(s, meta, r);
      for (int64_t k = 0; k < piece_columns(s, piece); ++k) {
        const int64_t column = piece * s.piece + k;
        if (column >= s.length) break;
        const uint32_t code = code_at(codes, s.bits, k, r);
        const float value = s.float_values ? s.float_values[code] : static_cast<float>(code);
        out[s.start + column] = (value - zero) * scale;
      }
    }
  }
}

void dequantize_rows(const TiledWeight& w, const int64_t* ids, int64_t first, int64_t count,
                     float* out) {
  for (int64_t i = 0; i < count; ++i) {
    dequantize_row(w, ids ? ids[i] : first + i, out + i * w.columns);
  }
}

}  // namespace
