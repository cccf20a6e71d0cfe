// Rearranging weights on any processor, and the geometry of their tiles.
#include <numeric>

#include "tile_pack.h"

namespace {

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Where two-level scales have sums in integers (has_whole_sums): of how many a code's step and a
// zero point's consist.
void set_units(const QlSegment& s, TileSegment& t) {
  if (s.scale_kind != ql::SCALE_CODE || s.float_values) return;
  const int64_t largest = (1 << s.bits) - 1, zeros = (1 << s.zero_bits) - 1;
  const int64_t common = s.zero_bits ? std::gcd(largest, zeros) : 1;
  const int64_t units = s.zero_bits ? zeros / common : 1;
  if (units * largest * ((1 << s.scale_bits) - 1) > ql::kMostWhole) return;
  t.code_units = static_cast<int32_t>(units);
  t.zero_units = s.zero_bits ? static_cast<int32_t>(largest / common) : 0;
}

// Fills everything of a segment's tiles but its pointers.
TileSegment geometry(const QlSegment& s) {
  TileSegment t = {};
  t.float_values = s.float_values;
  t.integer_values = s.integer_values;
  t.integer_unit = s.integer_unit;
  t.start = s.start;
  t.length = s.length;
  t.padded = round_up(s.length, ql::kColumnPad);
  const bool short_group = s.group_size > 0 && s.group_size < ql::kMaxPiece;
  t.piece = short_group ? s.group_size : ql::kMaxPiece;
  t.pieces = (t.padded + t.piece - 1) / t.piece;
  t.bits = s.bits;
  t.scale_kind = s.scale_kind;
  t.scale_bits = s.scale_bits;
  const bool fits = s.scale_kind == ql::SCALE_CODE && s.scale_bits + s.zero_bits <= 8;
  t.zero_kind = s.zero_bits == 0 ? ql::ZERO_NONE : fits ? ql::ZERO_NIBBLE : ql::ZERO_BYTE;
  t.zero_constant = s.zero_constant;
  t.zero_step = s.zero_step;
  set_units(s, t);
  t.codes_stride = 2 * block_code_bytes(t.padded, t.bits);
  t.meta_stride = 2 * t.pieces * block_meta_bytes(t);
  return t;
}

// Where the parts of a segment's tiles begin, after the codes. Kernels may read past the codes, into
// the meta, and past the meta, into the factors; so only the end of all segments needs a tail.
struct Extent {
  int64_t meta;
  int64_t factors;
  int64_t end;
};

Extent extent_of(const TileSegment& t, int64_t rows) {
  const int64_t strips = (rows + kStripRows - 1) / kStripRows;
  const bool half = blocks_of(rows, strips - 1) == 1;
  Extent extent;
  extent.meta = round_up(strips * t.codes_stride - (half ? t.codes_stride / 2 : 0), 64);
  extent.factors =
      extent.meta + round_up(strips * t.meta_stride - (half ? t.meta_stride / 2 : 0), 64);
  extent.end = extent.factors + strips * kStripRows * static_cast<int64_t>(sizeof(float));
  return extent;
}

}  // namespace

namespace ql {
const TilePacker portable_packer = {pack_strip<move_any_codes<true>>, unpack_strip};
}

void ql_tile_describe(const QlWeight* weight, const uint8_t* memory, ql::TileSegment* tiles) {
  for (int64_t i = 0; i < weight->segment_count; ++i) {
    TileSegment& t = tiles[i] = geometry(weight->segments[i]);
    const Extent extent = extent_of(t, weight->rows);
    t.codes = memory;
    t.meta = memory + extent.meta;
    t.factors = reinterpret_cast<const float*>(memory + extent.factors);
    memory += extent.end;
  }
}

int64_t ql_tile_bytes(const QlWeight* weight) {
  int64_t bytes = ql::kTailBytes;
  for (int64_t i = 0; i < weight->segment_count; ++i) {
    bytes += extent_of(geometry(weight->segments[i]), weight->rows).end;
  }
  return bytes;
}
