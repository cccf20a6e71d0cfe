// Rearranging weights with AVX-512 VBMI: 64 columns of 16 rows at a time.
//
// VPERMB brings the bytes of eight codes into each quadword and VPMULTISHIFTQB picks the eight fields
// out of it, for any width. Sixteen rows of 16 words of four codes are then transposed, which gives
// 16 chunks, and those are narrowed again by three shifts and merges.
#include "tile_pack.h"

namespace {

constexpr int64_t kColumns = 64;  // that are transposed at once

// The first `count` of 64 bytes: none when it is not positive, all when it is 64 or more.
inline __mmask64 bytes_below(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~0ull : ~0ull >> (64 - count);
}

// 64 codes of a row to bytes.
template <int bits>
class Expand {
 public:
  Expand() : low_(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))) {
    alignas(64) uint8_t places[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = static_cast<uint8_t>(i % 8 < bits ? i / 8 * bits + i % 8 : 0);
      shifts[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    places_ = _mm512_load_si512(places);
    shifts_ = _mm512_load_si512(shifts);
  }

  __m512i operator()(const uint8_t* from, __mmask64 there) const {
    const __m512i stream = _mm512_maskz_loadu_epi8(there, from);
    if constexpr (bits == 8) return stream;
    const __m512i spread = _mm512_permutexvar_epi8(places_, stream);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts_, spread), low_);
  }

 private:
  __m512i places_, shifts_, low_;
};

// rows[i], word j -> rows[j], word i, of 32 bits.
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(fours[c], fours[c + 4], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(fours[c + 8], fours[c + 12], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(fours[c], fours[c + 4], 0xEE);
    const __m512i e = _mm512_shuffle_i32x4(fours[c + 8], fours[c + 12], 0xEE);
    rows[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    rows[c + 4] = _mm512_shuffle_i32x4(a, b, 0xDD);
    rows[c + 8] = _mm512_shuffle_i32x4(d, e, 0x88);
    rows[c + 12] = _mm512_shuffle_i32x4(d, e, 0xDD);
  }
}

// Chunks of one code per byte to their stored form, four at a time.
template <int bits>
class Narrow {
 public:
  Narrow() {
    alignas(64) uint8_t places[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = static_cast<uint8_t>(i < 8 * bits ? i / bits * 8 + i % bits : 0);
    }
    places_ = _mm512_load_si512(places);
    low1_ = _mm512_set1_epi16((1 << bits) - 1);
    low2_ = _mm512_set1_epi32(static_cast<int>((1ull << 2 * bits) - 1));
    low4_ = _mm512_set1_epi64(static_cast<int64_t>((1ull << 4 * bits) - 1));
  }

  void store(uint8_t* to, const __m512i* chunks) const {
    if constexpr (bits == 8) {
      for (int j = 0; j < 4; ++j) _mm512_storeu_si512(to + 64 * j, chunks[j]);
    } else if constexpr (bits == 4) {
      _mm512_storeu_si512(to, above<4>(chunks[0], chunks[1]));
      _mm512_storeu_si512(to + 64, above<4>(chunks[2], chunks[3]));
    } else if constexpr (bits == 2) {
      const __m512i low = above<2>(chunks[0], chunks[1]), high = above<2>(chunks[2], chunks[3]);
      _mm512_storeu_si512(to, above<4>(low, high));
    } else {
      for (int j = 0; j < 4; ++j) {
        const __m512i bytes = _mm512_permutexvar_epi8(places_, squeeze(chunks[j]));
        _mm512_mask_storeu_epi8(to + 8 * bits * j, bytes_below(8 * bits), bytes);
      }
    }
  }

 private:
  // Codes below 2^shift: no bit of a byte reaches the next one.
  template <int shift>
  static __m512i above(__m512i low, __m512i high) {
    return _mm512_or_si512(low, _mm512_slli_epi16(high, shift));
  }

  // Bits of `a` where the mask has ones, of `b` elsewhere.
  static __m512i merge(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(mask, a, b, 0xCA);
  }

  // Octet::squeeze of every quadword.
  __m512i squeeze(__m512i codes) const {
    codes = merge(low1_, codes, _mm512_srli_epi16(codes, 8 - bits));
    codes = merge(low2_, codes, _mm512_srli_epi32(codes, 16 - 2 * bits));
    return merge(low4_, codes, _mm512_srli_epi64(codes, 32 - 4 * bits));
  }

  __m512i places_, low1_, low2_, low4_;
};

// While a strip is rearranged, the rows of the next one come into the cache, in order: the processor
// does not foresee the way through 32 rows at once.
inline void prefetch(const uint8_t* from, const uint8_t* end, int64_t bytes) {
  for (int64_t i = 0; i < bytes && from + i < end; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
  }
}

template <int bits>
void pack_codes(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  const Expand<bits> expand;
  const Narrow<bits> narrow;
  const int64_t blocks = blocks_of(rows, strip), first = strip * kStripRows;
  const int64_t ahead = kColumns / 8 * bits * kStripRows;  // bytes of a step
  const uint8_t* next = s.packed + (first + kStripRows) * s.row_bytes;
  for (int64_t k = 0; k < t.padded; k += kColumns, next += ahead) {
    prefetch(next, s.packed + rows * s.row_bytes, ahead);
    const int64_t offset = k / 8 * bits, left = s.row_bytes - offset;
    const __mmask64 there = bytes_below(left < 8 * bits ? left : 8 * bits);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = first + block * kBlockRows;
      __m512i chunks[16];
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const bool is_row = row + r < rows;
        const uint8_t* from = s.packed + (is_row ? row + r : row) * s.row_bytes + offset;
        chunks[r] = expand(from, is_row ? there : 0);
      }
      transpose(chunks);
      for (int64_t at = k; at < t.padded && at < k + kColumns; at += 16) {
        const int64_t piece = at / t.piece, columns = piece_columns(t, piece);
        uint8_t* to = const_cast<uint8_t*>(t.codes) + place_of(t, strip, piece, blocks).codes +
                      block * block_code_bytes(columns, bits) +
                      block_code_bytes(at % t.piece, bits);
        narrow.store(to, chunks + (at - k) / 4);
      }
    }
  }
}

void pack_any_codes(const QlSegment& s, const TileSegment& t, int64_t rows, int64_t strip) {
  switch (s.bits) {
    case 2: return pack_codes<2>(s, t, rows, strip);
    case 3: return pack_codes<3>(s, t, rows, strip);
    case 4: return pack_codes<4>(s, t, rows, strip);
    case 5: return pack_codes<5>(s, t, rows, strip);
    case 6: return pack_codes<6>(s, t, rows, strip);
    case 7: return pack_codes<7>(s, t, rows, strip);
    default: return pack_codes<8>(s, t, rows, strip);
  }
}

}  // namespace

namespace ql {
const TilePacker avx512_packer = {pack_strip<pack_any_codes>, unpack_strip};
}
