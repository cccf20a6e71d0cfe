// Rows of a tiled weight as float32 (dequantize_rows of tiles.h), for units with vectors.
#pragma once

#include "tile_meta.h"

namespace {

inline uint32_t load_word(const uint8_t* from) {
  uint32_t word;
  memcpy(&word, from, sizeof(word));
  return word;
}

// The codes of `columns` columns of row `row` (0..15) of a block.
inline void row_codes(const uint8_t* block, int32_t bits, int64_t row, int64_t columns,
                      uint8_t* codes) {
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t chunk = 0; chunk < columns / ql::kChunkColumns; ++chunk, codes += 4) {
    if (8 % bits == 0) {
      const uint32_t word = load_word(block + chunk * bits / 8 * 64 + 4 * row);
      const uint32_t four = word >> (chunk * bits % 8) & mask * 0x01010101u;
      memcpy(codes, &four, 4);
    } else {  // four codes side by side, beginning at half a byte in odd rows of odd widths
      const uint8_t* from = block + chunk * 8 * bits + row * bits / 2;
      const uint32_t four = load_word(from) >> (row * bits % 2 * 4);
      for (int j = 0; j < 4; ++j) codes[j] = static_cast<uint8_t>(four >> (j * bits) & mask);
    }
  }
}

// (value(code) - zero) * scale of a piece.
inline void piece_values(const ql::TileSegment& s, const uint8_t* codes, int64_t count, float zero,
                         float scale, float* out) {
  const Lanes zeros = broadcast(zero), scales = broadcast(scale);
  for (int64_t k = 0; k < count; k += kLanes) {
    Lanes value;
    if (s.float_values) {
      float looked_up[16];
      for (int i = 0; i < 16; ++i) looked_up[i] = s.float_values[codes[k + i]];
      value = load(looked_up) * scales;
    } else {
      value = (floats_of(load_u8(codes + k)) - zeros) * scales;
    }
    store_first(out + k, value, smaller_of(count - k, kLanes));
  }
}

void dequantize_row(const ql::TiledWeight& w, int64_t row, float* out) {
  const int64_t block = row / ql::kBlockRows, lane = row % ql::kBlockRows;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const BlockPlace place(w, s, block);
    for (int64_t piece = 0; piece < s.pieces; ++piece) {
      uint8_t codes[ql::kMaxPiece];
      row_codes(place.codes_of(s, piece), s.bits, lane, piece_columns(s, piece), codes);
      const BlockMeta meta = block_meta(s, place.meta_of(s, piece), place.factors);
      float scale[16], zero[16];
      store(scale, meta.scale);
      store(zero, meta.zero);
      const int64_t start = piece * s.piece;
      piece_values(s, codes, smaller_of(s.length - start, s.piece), zero[lane], scale[lane],
                   out + s.start + start);
    }
  }
}

void dequantize_rows(const ql::TiledWeight& w, const int64_t* ids, int64_t first, int64_t count,
                     float* out) {
  for (int64_t i = 0; i < count; ++i) {
    dequantize_row(w, ids ? ids[i] : first + i, out + i * w.columns);
  }
}

}  // namespace
