// Between canonical tensors and tiles: the rearrangement itself, for tile_pack*.cpp.
//
// Eight codes of b bits are b bytes in either layout, so everything moves in 64-bit words of eight
// codes, one per byte: eight columns of one row on the canonical side, four columns of two rows in a
// chunk. Two words of one side are two words of the other with their middle halves exchanged.
#pragma once

#ifdef __BMI2__
#include <immintrin.h>
#endif

#include "kernels.h"
#include "numbers.h"

namespace {

using ql::kBlockRows;
using ql::kStripRows;
using ql::TileSegment;

// Eight codes of a width: side by side in the low bytes of a word, or one per byte. PDEP and PEXT
// where there are; else three moves of runs of 4, 2, 1 codes (quantlib/formats/packing.py).
class Octet {
 public:
  explicit Octet(int bits) : bits_(bits), places_(0x0101010101010101ull * ((1u << bits) - 1)) {
    low1_ = ((1ull << bits) - 1) * 0x0001000100010001ull;
    low2_ = (bits < 8 ? (1ull << 2 * bits) - 1 : 0xFFFFull) * 0x0000000100000001ull;
    low4_ = bits < 8 ? (1ull << 4 * bits) - 1 : 0xFFFFFFFFull;
  }

  uint64_t spread(uint64_t word) const {
#ifdef __BMI2__
    return _pdep_u64(word, places_);
#else
    word = (word & low4_) | ((word >> 4 * bits_) & low4_) << 32;
    word = (word & low2_) | ((word >> 2 * bits_) & low2_) << 16;
    return (word & low1_) | ((word >> bits_) & low1_) << 8;
#endif
  }

  uint64_t squeeze(uint64_t word) const {
#ifdef __BMI2__
    return _pext_u64(word, places_);
#else
    word = (word & low1_) | ((word >> 8) & low1_) << bits_;
    word = (word & low2_) | ((word >> 16) & low2_) << 2 * bits_;
    return (word & low4_) | ((word >> 32) & low4_) << 4 * bits_;
#endif
  }

 private:
  int bits_;
  uint64_t places_, low1_, low2_, low4_;
};

// `count` bytes of a stream of `bytes` from `offset` on, zeros past its end; count <= 8.
inline uint64_t read_bytes(const uint8_t* stream, int64_t bytes, int64_t offset, int64_t count) {
  if (offset + 8 <= bytes) return load<uint64_t>(stream + offset);
  uint64_t word = 0;
  const int64_t left = bytes - offset < count ? bytes - offset : count;
  if (left > 0) memcpy(&word, stream + offset, static_cast<size_t>(left));
  return word;
}

// Writes `count` bytes, and zeros behind them where there is room: streams are written in order.
inline void write_bytes(uint8_t* stream, int64_t bytes, int64_t offset, int64_t count,
                        uint64_t word) {
  if (offset + 8 <= bytes) return store(stream + offset, word);
  const int64_t left = bytes - offset < count ? bytes - offset : count;
  if (left > 0) memcpy(stream + offset, &word, static_cast<size_t>(left));
}

inline uint64_t join_low(uint64_t a, uint64_t b) { return (a & 0xFFFFFFFFull) | b << 32; }
inline uint64_t join_high(uint64_t a, uint64_t b) { return a >> 32 | (b & ~0xFFFFFFFFull); }

// Words of the chunks of one piece of a block: word i of a chunk is its rows 2i and 2i + 1. Chunks
// are taken by fours, of 16 columns, which fill whole 64-byte lines at 2, 4 and 8 bits.
template <int bits>
struct Chunks {
  static constexpr int kWordBytes = bits;

  static void put(uint8_t* block, int64_t chunk, int64_t i, const uint64_t (&words)[4],
                  const Octet& octet) {
    if constexpr (bits == 8) {
      for (int j = 0; j < 4; ++j) store(block + (chunk + j) * 64 + 8 * i, words[j]);
    } else if constexpr (bits == 4) {
      uint8_t* to = block + chunk * 32 + 8 * i;
      store(to, words[0] | words[1] << 4);
      store(to + 64, words[2] | words[3] << 4);
    } else if constexpr (bits == 2) {
      store(block + chunk * 16 + 8 * i, words[0] | words[1] << 2 | words[2] << 4 | words[3] << 6);
    } else {
      for (int j = 0; j < 4; ++j) {
        const uint64_t word = octet.squeeze(words[j]);
        memcpy(block + ((chunk + j) * 8 + i) * bits, &word, bits);
      }
    }
  }

  static void get(const uint8_t* block, int64_t chunk, int64_t i, uint64_t (&words)[4],
                  const Octet& octet) {
    if constexpr (bits == 8) {
      for (int j = 0; j < 4; ++j) words[j] = load<uint64_t>(block + (chunk + j) * 64 + 8 * i);
    } else if constexpr (bits == 4 || bits == 2) {
      constexpr int per_byte = 8 / bits;
      constexpr uint64_t low = 0x0101010101010101ull * ((1u << bits) - 1);
      const uint8_t* from = block + chunk * 8 * bits + 8 * i;
      for (int j = 0; j < 4; ++j) {
        words[j] = load<uint64_t>(from + j / per_byte * 64) >> (j % per_byte * bits) & low;
      }
    } else {
      for (int j = 0; j < 4; ++j) {  // what is read past the codes is dropped
        words[j] = octet.spread(load<uint64_t>(block + ((chunk + j) * 8 + i) * bits));
      }
    }
  }
};

// The codes of `columns` columns from `start` on of the 16 rows from `row` on.
template <int bits>
void pack_block(const QlSegment& s, int64_t rows, int64_t row, int64_t start, int64_t columns,
                uint8_t* block) {
  const Octet octet(bits);
  for (int64_t i = 0; i < kBlockRows / 2; ++i) {
    const int64_t first = row + 2 * i;
    const uint8_t* a = s.packed + first * s.row_bytes;
    const uint8_t* b = a + s.row_bytes;
    const int64_t bytes_a = first < rows ? s.row_bytes : 0;
    const int64_t bytes_b = first + 1 < rows ? s.row_bytes : 0;
    for (int64_t k = 0; k < columns; k += 16) {
      uint64_t words[4];
      for (int half = 0; half < 2; ++half) {
        const int64_t offset = (start + k + 8 * half) / 8 * bits;
        const uint64_t row_a = octet.spread(read_bytes(a, bytes_a, offset, bits));
        const uint64_t row_b = octet.spread(read_bytes(b, bytes_b, offset, bits));
        words[2 * half] = join_low(row_a, row_b);
        words[2 * half + 1] = join_high(row_a, row_b);
      }
      Chunks<bits>::put(block, k / 4, i, words, octet);
    }
  }
}

template <int bits>
void unpack_block(const QlSegment& s, int64_t rows, int64_t row, int64_t start, int64_t columns,
                  const uint8_t* block) {
  const Octet octet(bits);
  for (int64_t i = 0; i < kBlockRows / 2; ++i) {
    const int64_t first = row + 2 * i;
    uint8_t* a = s.packed + first * s.row_bytes;
    const int64_t bytes_a = first < rows ? s.row_bytes : 0;
    const int64_t bytes_b = first + 1 < rows ? s.row_bytes : 0;
    for (int64_t k = 0; k < columns; k += 16) {
      uint64_t words[4];
      Chunks<bits>::get(block, k / 4, i, words, octet);
      for (int half = 0; half < 2; ++half) {
        const int64_t offset = (start + k + 8 * half) / 8 * bits;
        const uint64_t low = words[2 * half], high = words[2 * half + 1];
        write_bytes(a, bytes_a, offset, bits, octet.squeeze(join_low(low, high)));
        write_bytes(a + s.row_bytes, bytes_b, offset, bits, octet.squeeze(join_high(low, high)));
      }
    }
  }
}

// Where the codes and the meta of a piece of a strip begin; its blocks follow one another.
struct Place {
  int64_t codes;
  int64_t meta;
};

inline Place place_of(const TileSegment& t, int64_t strip, int64_t piece, int64_t blocks) {
  return {strip * t.codes_stride + blocks * block_code_bytes(piece * t.piece, t.bits),
          strip * t.meta_stride + blocks * piece * block_meta_bytes(t)};
}

inline int64_t blocks_of(int64_t rows, int64_t strip) {
  return rows - strip * kStripRows > kBlockRows ? 2 : 1;
}

template <int bits, bool packing>
void move_codes(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  const int64_t blocks = blocks_of(rows, strip);
  for (int64_t piece = 0; piece < t.pieces; ++piece) {
    const int64_t columns = piece_columns(t, piece), start = piece * t.piece;
    // The memory is the caller's own: `codes` is const for those who compute with it.
    uint8_t* to = const_cast<uint8_t*>(t.codes) + place_of(t, strip, piece, blocks).codes;
    for (int64_t block = 0; block < blocks; ++block, to += block_code_bytes(columns, bits)) {
      const int64_t row = strip * kStripRows + block * kBlockRows;
      if constexpr (packing) {
        pack_block<bits>(s, rows, row, start, columns, to);
      } else {
        unpack_block<bits>(s, rows, row, start, columns, to);
      }
    }
  }
}

template <bool packing>
void move_any_codes(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  switch (s.bits) {
    case 2: return move_codes<2, packing>(s, t, rows, strip);
    case 3: return move_codes<3, packing>(s, t, rows, strip);
    case 4: return move_codes<4, packing>(s, t, rows, strip);
    case 5: return move_codes<5, packing>(s, t, rows, strip);
    case 6: return move_codes<6, packing>(s, t, rows, strip);
    case 7: return move_codes<7, packing>(s, t, rows, strip);
    default: return move_codes<8, packing>(s, t, rows, strip);
  }
}

// Stored scales of the rows of a strip, eight groups at a time: [group][row], zeros for rows and
// groups that are not there.
struct ScaleOctet {
  uint16_t stored[8][kStripRows];
};

inline void read_scales(const QlSegment& s, int64_t rows, int64_t strip, int64_t group,
                        ScaleOctet* out) {
  const Octet octet(s.scale_kind == ql::SCALE_CODE ? s.scale_bits : 8);
  const int64_t bytes = s.scale_kind == ql::SCALE_CODE ? (s.groups * s.scale_bits + 7) / 8
                                                       : s.groups;
  for (int64_t r = 0; r < kStripRows; ++r) {
    const int64_t row = strip * kStripRows + r;
    const uint8_t* from = s.scale + (row < rows ? row : 0) * s.scale_row_bytes;
    uint64_t word = 0;
    if (row < rows && s.scale_kind == ql::SCALE_CODE) {
      word = octet.spread(read_bytes(from, bytes, group / 8 * s.scale_bits, s.scale_bits));
    } else if (row < rows && s.scale_kind != ql::SCALE_F16) {
      word = read_bytes(from, bytes, group, 8);
    }
    for (int64_t j = 0; j < 8; ++j) {
      out->stored[j][r] = static_cast<uint16_t>(word >> 8 * j & 0xFF);
      if (s.scale_kind == ql::SCALE_F16) {
        const bool there = row < rows && group + j < s.groups;
        out->stored[j][r] = there ? load<uint16_t>(from + 2 * (group + j)) : 0;
      }
    }
  }
}

inline void write_scales(const QlSegment& s, int64_t rows, int64_t strip, int64_t group,
                         const ScaleOctet& in) {
  const Octet octet(s.scale_kind == ql::SCALE_CODE ? s.scale_bits : 8);
  const int64_t first = strip * kStripRows;
  for (int64_t r = 0; r < kStripRows && first + r < rows; ++r) {
    if (!s.scale_row_bytes && first + r > 0) return;
    uint8_t* to = s.scale + (first + r) * s.scale_row_bytes;
    if (s.scale_kind == ql::SCALE_F16) {
      for (int64_t j = 0; j < 8 && group + j < s.groups; ++j) {
        store(to + 2 * (group + j), in.stored[j][r]);
      }
      continue;
    }
    uint64_t word = 0;
    for (int64_t j = 0; j < 8; ++j) word |= static_cast<uint64_t>(in.stored[j][r]) << 8 * j;
    if (s.scale_kind == ql::SCALE_CODE) {
      write_bytes(to, (s.groups * s.scale_bits + 7) / 8, group / 8 * s.scale_bits, s.scale_bits,
                  octet.squeeze(word));
    } else {
      write_bytes(to, s.groups, group, 8, word);
    }
  }
}

// Zero points are packed along N: those of a strip's 32 rows are zero_bits whole words, one below
// the other.
inline void read_zeros(const QlSegment& s, int64_t rows, int64_t strip, int64_t group,
                       uint8_t (&zeros)[kStripRows]) {
  const bool shared = !s.scale_row_bytes;
  const int64_t stored_rows = shared ? 1 : rows;
  const int64_t words = (stored_rows * s.zero_bits + 31) / 32;
  const int64_t first = shared ? 0 : strip * s.zero_bits;
  uint8_t stream[4 * 8] = {};
  for (int64_t i = 0; i < s.zero_bits && first + i < words; ++i) {
    store(stream + 4 * i, load<uint32_t>(s.zero_point + 4 * ((first + i) * s.groups + group)));
  }
  const Octet octet(s.zero_bits);
  for (int64_t i = 0; i < 4; ++i) {
    store(zeros + 8 * i, octet.spread(read_bytes(stream, 32, i * s.zero_bits, s.zero_bits)));
  }
  for (int64_t r = 0; r < kStripRows; ++r) {
    const bool there = strip * kStripRows + r < rows;
    zeros[r] = there ? zeros[shared ? 0 : r] : 0;
  }
}

inline void write_zeros(const QlSegment& s, int64_t rows, int64_t strip, int64_t group,
                        const uint8_t (&zeros)[kStripRows]) {
  const bool shared = !s.scale_row_bytes;
  if (shared && strip > 0) return;
  const int64_t stored_rows = shared ? 1 : rows;
  const int64_t words = (stored_rows * s.zero_bits + 31) / 32;
  uint8_t stream[4 * 8] = {};
  const Octet octet(s.zero_bits);
  for (int64_t i = 0; i < 4; ++i) {
    uint64_t word = load<uint64_t>(zeros + 8 * i);
    if (shared) word = i ? 0 : word & 0xFF;
    write_bytes(stream, 32, i * s.zero_bits, s.zero_bits, octet.squeeze(word));
  }
  for (int64_t i = 0; i < s.zero_bits && strip * s.zero_bits + i < words; ++i) {
    store(s.zero_point + 4 * ((strip * s.zero_bits + i) * s.groups + group),
          load<uint32_t>(stream + 4 * i));
  }
}

// The group of a piece; past the last one there is padding.
inline int64_t group_of(const QlSegment& s, const TileSegment& t, int64_t piece) {
  return s.group_size ? piece * t.piece / s.group_size : 0;
}

void pack_meta(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  const int64_t blocks = blocks_of(rows, strip);
  ScaleOctet scales;
  uint8_t zeros[kStripRows] = {};
  int64_t held = -1;
  uint8_t* to = const_cast<uint8_t*>(t.meta) + strip * t.meta_stride;
  for (int64_t piece = 0; piece < t.pieces; ++piece) {
    const int64_t group = group_of(s, t, piece);
    if (group / 8 * 8 != held && group < s.groups) {
      held = group / 8 * 8;
      read_scales(s, rows, strip, held, &scales);
    }
    if (s.zero_bits && group < s.groups) read_zeros(s, rows, strip, group, zeros);
    for (int64_t block = 0; block < blocks; ++block, to += block_meta_bytes(t)) {
      const int64_t first = block * kBlockRows;
      if (group >= s.groups) {
        memset(to, 0, static_cast<size_t>(block_meta_bytes(t)));
        continue;
      }
      const uint16_t* stored = scales.stored[group % 8] + first;
      if (t.scale_kind == ql::SCALE_F16) {
        memcpy(to, stored, 2 * kBlockRows);
      } else {
        for (int64_t r = 0; r < kBlockRows; ++r) to[r] = static_cast<uint8_t>(stored[r]);
      }
      if (t.zero_kind == ql::ZERO_BYTE) {
        memcpy(to + block_meta_bytes(t) - kBlockRows, zeros + first, kBlockRows);
      } else if (t.zero_kind == ql::ZERO_NIBBLE) {
        for (int64_t r = 0; r < kBlockRows; ++r) {
          to[r] = static_cast<uint8_t>(to[r] | zeros[first + r] << t.scale_bits);
        }
      }
    }
  }
}

void unpack_meta(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  const int64_t blocks = blocks_of(rows, strip);
  ScaleOctet scales = {};
  uint8_t zeros[kStripRows] = {};
  const uint8_t* from = t.meta + strip * t.meta_stride;
  for (int64_t piece = 0; piece < t.pieces; ++piece) {
    const int64_t group = group_of(s, t, piece);
    if (group >= s.groups) break;
    for (int64_t r = 0; r < blocks * kBlockRows; ++r) {
      const uint8_t* meta = from + r / kBlockRows * block_meta_bytes(t);
      const int64_t lane = r % kBlockRows;
      uint16_t stored = t.scale_kind == ql::SCALE_F16 ? load<uint16_t>(meta + 2 * lane)
                                                      : meta[lane];
      if (t.zero_kind == ql::ZERO_BYTE) zeros[r] = meta[block_meta_bytes(t) - kBlockRows + lane];
      if (t.zero_kind == ql::ZERO_NIBBLE) {
        zeros[r] = static_cast<uint8_t>(stored >> t.scale_bits);
        stored = static_cast<uint16_t>(stored & ((1u << t.scale_bits) - 1));
      }
      scales.stored[group % 8][r] = stored;
    }
    from += blocks * block_meta_bytes(t);
    if (s.zero_bits) write_zeros(s, rows, strip, group, zeros);
    const bool last_piece = piece + 1 == t.pieces || group_of(s, t, piece + 1) >= s.groups;
    if (last_piece || group_of(s, t, piece + 1) / 8 != group / 8) {
      write_scales(s, rows, strip, group / 8 * 8, scales);
      scales = {};
    }
  }
}

void pack_factors(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  float* to = const_cast<float*>(t.factors) + strip * kStripRows;
  const float largest = static_cast<float>((1 << s.scale_bits) - 1);
  for (int64_t r = 0; r < kStripRows; ++r) {
    const int64_t row = strip * kStripRows + r;
    if (row >= rows) {
      to[r] = 0.0f;
    } else if (s.scale_kind == ql::SCALE_CODE) {
      to[r] = half_to_float(load<uint16_t>(s.row_scale + 2 * row)) / largest;
    } else {
      to[r] = s.scale_kind == ql::SCALE_E4M3 ? load<float>(s.row_scale) : 1.0f;
    }
  }
}

void unpack_factors(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  const float* from = t.factors + strip * kStripRows;
  if (s.scale_kind == ql::SCALE_E4M3 && strip == 0) store(s.row_scale, from[0]);
  if (s.scale_kind != ql::SCALE_CODE) return;
  // The quotient is off by 2^-24 of itself, a half's step is 2^-11: rounding finds the half again.
  const float largest = static_cast<float>((1 << s.scale_bits) - 1);
  for (int64_t r = 0; r < kStripRows && strip * kStripRows + r < rows; ++r) {
    store(s.row_scale + 2 * (strip * kStripRows + r), half_of_float(from[r] * largest));
  }
}

using Move = void(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip);

template <Move* pack_codes>
void pack_strip(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  pack_codes(s, t, rows, strip);
  pack_meta(s, t, rows, strip);
  pack_factors(s, t, rows, strip);
}

void unpack_strip(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  move_any_codes<false>(s, t, rows, strip);
  unpack_meta(s, t, rows, strip);
  unpack_factors(s, t, rows, strip);
}

}  // namespace
