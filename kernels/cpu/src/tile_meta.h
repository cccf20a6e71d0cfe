// Where the blocks of a weight lie in its tiles, and what the meta of a block says: scale and zero
// point of its 16 rows in one piece. On lanes.h, for every unit.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace {

// The 16 rows `16 * (block % 2)` .. of a strip, in one segment. Blocks are counted through all
// strips.
struct BlockPlace {
  const uint8_t* codes;  // of the strip
  const uint8_t* meta;
  const float* factors;  // of the block's rows
  int64_t in_strip;      // 0 or 1
  int64_t blocks;        // of the strip

  BlockPlace(const ql::TiledWeight& w, const ql::TileSegment& s, int64_t block) {
    const int64_t strip = block / 2;
    codes = s.codes + strip * s.codes_stride;
    meta = s.meta + strip * s.meta_stride;
    factors = s.factors + block * ql::kBlockRows;
    in_strip = block % 2;
    blocks = tile_blocks(w, strip);
  }

  const uint8_t* codes_of(const ql::TileSegment& s, int64_t piece) const {
    return codes + blocks * block_code_bytes(piece * s.piece, s.bits) +
           in_strip * block_code_bytes(piece_columns(s, piece), s.bits);
  }
  const uint8_t* meta_of(const ql::TileSegment& s, int64_t piece) const {
    return meta + (blocks * piece + in_strip) * block_meta_bytes(s);
  }
};

struct BlockMeta {
  Lanes scale;  // stored scale * factor of the row
  Lanes zero;   // ZERO_NONE: zero_constant
};

// A code is 8 exponent bits of a float32; 2^-127, code 0, is half of the smallest that has some.
inline Lanes e8m0_lanes(IntLanes codes) {
  return bits_as_floats(max_int(codes << 23, broadcast_int(1 << 22)));
}

// Exponent and mantissa of e4m3 at those of a float32, whose bias is 120 higher.
inline Lanes e4m3_lanes(IntLanes codes) {
  return bits_as_floats((codes & broadcast_int(0x7F)) << 20) * broadcast(0x1p120f);
}

inline Lanes stored_scales(const ql::TileSegment& s, const uint8_t* meta) {
  switch (s.scale_kind) {
    case ql::SCALE_F16:
      return load_f16(meta);
    case ql::SCALE_CODE:
      return floats_of(load_u8(meta) & broadcast_int((1 << s.scale_bits) - 1));
    case ql::SCALE_E8M0:
      return e8m0_lanes(load_u8(meta));
    default:
      return e4m3_lanes(load_u8(meta));
  }
}

inline Lanes zero_lanes_of(const ql::TileSegment& s, const uint8_t* meta) {
  switch (s.zero_kind) {
    case ql::ZERO_BYTE:
      return floats_of(load_u8(meta + block_meta_bytes(s) - 16)) * broadcast(s.zero_step);
    case ql::ZERO_NIBBLE:
      return floats_of(load_u8(meta) >> s.scale_bits) * broadcast(s.zero_step);
    default:
      return broadcast(s.zero_constant);
  }
}

inline BlockMeta block_meta(const ql::TileSegment& s, const uint8_t* meta, const float* factors) {
  return {stored_scales(s, meta) * load(factors), zero_lanes_of(s, meta)};
}

// The biases of the `rows` rows from `first_row` on, at most 16.
inline Lanes bias_of(const ql::TileOutput& out, int64_t first_row, int64_t rows) {
  if (!out.bias || rows <= 0) return zero_lanes();
  return rows >= kLanes ? load(out.bias + first_row) : load_first(out.bias + first_row, rows);
}

// Writes the first `rows` lanes of y of a token (all 16 when rows >= 16).
inline void store_rows(const ql::TileOutput& out, int64_t token, int64_t first_row, int64_t rows,
                       Lanes value) {
  float* y = out.y + token * out.y_stride + first_row;
  if (rows >= kLanes) {
    store(y, out.accumulate ? load(y) + value : value);
  } else {
    store_first(y, out.accumulate ? load_first(y, rows) + value : value, rows);
  }
}

// The same of a total: times the token scale, plus the bias.
inline void finish_rows(const ql::TileOutput& out, int64_t token, int64_t first_row, int64_t rows,
                        float token_scale, Lanes total) {
  const Lanes bias = bias_of(out, first_row, rows);
  store_rows(out, token, first_row, rows, fma(total, broadcast(token_scale), bias));
}

}  // namespace
