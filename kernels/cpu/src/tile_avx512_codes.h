// Unpacking the codes of tiles.h with AVX-512: 16 columns x 16 rows at a time, one code a byte.
//
// Widths 2, 4 and 8 take masks and shifts. For 3, 5, 6 and 7, eight codes lie in `bits` bytes: with
// VBMI, VPERMB brings them into a quadword and VPMULTISHIFTQB picks the eight fields out of it;
// without, each code's two bytes go into a word, which shifts move into place, the even codes of a
// row pair and the odd ones apart.
#pragma once

#include <immintrin.h>

#include "tiles.h"

namespace vnni {
namespace {

constexpr int64_t kUnitColumns = 16;  // what is unpacked at a time: four chunks
constexpr int kUnitChunks = 4;

// Bytes of a unit's codes.
constexpr int64_t unit_bytes(int bits) { return 2 * kUnitColumns * bits; }

inline __m512i byte_set(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// Plain widths: fields of a byte. Where a token has several chains of sums, and chunk c always goes
// to chain c % chains, most fields need no shift: used where they stand, times 2^shift_of(chain),
// they make sums that are shifted back once, exactly.
template <int bits>
struct Fields {
  static constexpr int kFields = 8 / bits;

  template <int chains>
  static constexpr int shift_of(int chain) {
    return bits * (chain % (chains < kFields ? chains : kFields));
  }

  template <int chains>
  void unpack(const uint8_t* packed, __m512i (&chunks)[kUnitChunks]) const {
#pragma GCC unroll 4
    for (int c = 0; c < kUnitChunks; ++c) {
      const __m512i bytes = _mm512_loadu_si512(packed + 64 * (c / kFields));
      const int place = bits * (c % kFields), kept = shift_of<chains>(c % chains);
      // A shift of words: what comes over from the neighbouring byte is masked away.
      const __m512i moved = place > kept ? _mm512_srli_epi16(bytes, place - kept) : bytes;
      chunks[c] = bits == 8 ? bytes : _mm512_and_si512(moved, byte_set(((1 << bits) - 1) << kept));
    }
  }
};

// Dense widths. A 64-byte load holds two chunks of 3 bits, one of the others.
template <int bits>
struct Dense {
  static constexpr int kLoaded = 64 / (8 * bits);

  __m512i low = byte_set((1 << bits) - 1);
#ifdef __AVX512VBMI__
  __m512i places[kLoaded], shifts;

  Dense() {
    alignas(64) uint8_t at[64], by[64];
    for (int c = 0; c < kLoaded; ++c) {
      for (int i = 0; i < 64; ++i) {
        at[i] = static_cast<uint8_t>(8 * bits * c + (i % 8 < bits ? i / 8 * bits + i % 8 : 0));
        by[i] = static_cast<uint8_t>(i % 8 * bits);
      }
      places[c] = _mm512_load_si512(at);
    }
    shifts = _mm512_load_si512(by);
  }

  __m512i chunk(__m512i bytes, int c) const {
    const __m512i spread = _mm512_permutexvar_epi8(places[c], bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, spread), low);
  }
#else
  __m512i lanes[kLoaded], even, odd, down, up, high;

  // 16 codes fill 2 * bits bytes: VPERMW gives each to a lane of 16 bytes, VPSHUFB takes the two
  // bytes around each code.
  Dense() {
    alignas(64) uint16_t words[32], shift_down[32], shift_up[32];
    alignas(64) uint8_t at_even[64], at_odd[64];
    for (int c = 0; c < kLoaded; ++c) {
      for (int i = 0; i < 32; ++i) {
        words[i] = static_cast<uint16_t>(4 * bits * c + i / 8 * bits + (i % 8 < bits ? i % 8 : 0));
      }
      lanes[c] = _mm512_load_si512(words);
    }
    for (int i = 0; i < 32; ++i) {
      const int first = i % 8 * 2 * bits, second = first + bits;  // bits from the lane's begin
      for (int b = 0; b < 2; ++b) {
        at_even[2 * i + b] = static_cast<uint8_t>(first / 8 + b);
        at_odd[2 * i + b] = static_cast<uint8_t>(second / 8 + b);
      }
      shift_down[i] = static_cast<uint16_t>(first % 8);
      shift_up[i] = static_cast<uint16_t>(8 - second % 8);
    }
    even = _mm512_load_si512(at_even);
    odd = _mm512_load_si512(at_odd);
    down = _mm512_load_si512(shift_down);
    up = _mm512_load_si512(shift_up);
    high = _mm512_slli_epi16(low, 8);
    low = _mm512_srli_epi16(high, 8);
  }

  __m512i chunk(__m512i bytes, int c) const {
    const __m512i own = _mm512_permutexvar_epi16(lanes[c], bytes);
    const __m512i first = _mm512_srlv_epi16(_mm512_shuffle_epi8(own, even), down);
    const __m512i second = _mm512_sllv_epi16(_mm512_shuffle_epi8(own, odd), up);
    constexpr int kOrAnd = 0xF8;  // a | (b & c)
    return _mm512_ternarylogic_epi32(_mm512_and_si512(first, low), second, high, kOrAnd);
  }
#endif

  template <int chains>
  static constexpr int shift_of(int) {
    return 0;
  }

  template <int chains>
  void unpack(const uint8_t* packed, __m512i (&chunks)[kUnitChunks]) const {
#pragma GCC unroll 4
    for (int i = 0; i < kUnitChunks; i += kLoaded) {
      __m512i bytes = _mm512_loadu_si512(packed + 8 * bits * i);
      // It may cross a cache line: without this, the compiler loads it again for each chunk.
      if (kLoaded > 1) asm("" : "+v"(bytes));
#pragma GCC unroll 2
      for (int c = 0; c < kLoaded; ++c) chunks[i + c] = chunk(bytes, c);
    }
  }
};

// Codes of small floats as the bytes of `integer_values`: 16 of them in every lane, 32, 64 or 128.
struct Nibbles {
  __m512i values;
  explicit Nibbles(const uint8_t* table)
      : values(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))) {}
  __m512i operator()(__m512i codes) const { return _mm512_shuffle_epi8(values, codes); }
};

struct Quintets {
  Nibbles lower, upper;
  explicit Quintets(const uint8_t* table) : lower(table), upper(table + 16) {}
  __m512i operator()(__m512i codes) const {
    const __mmask64 is_upper = _mm512_test_epi8_mask(codes, byte_set(16));
    return _mm512_mask_shuffle_epi8(lower(codes), is_upper, upper.values, codes);
  }
};

// What two tables of the half give, chosen by the bit of codes that is worth `size`.
template <class Half, int size>
struct Doubled {
  Half lower, upper;
  explicit Doubled(const uint8_t* table) : lower(table), upper(table + size) {}
  __m512i operator()(__m512i codes) const {
    const __mmask64 is_upper = _mm512_test_epi8_mask(codes, byte_set(size));
    return _mm512_mask_blend_epi8(is_upper, lower(codes), upper(codes));
  }
};

#ifdef __AVX512VBMI__
struct Sextets {
  __m512i values;
  explicit Sextets(const uint8_t* table) : values(_mm512_loadu_si512(table)) {}
  __m512i operator()(__m512i codes) const { return _mm512_permutexvar_epi8(codes, values); }
};
#else
using Sextets = Doubled<Quintets, 32>;
#endif
using Septets = Doubled<Sextets, 64>;

template <int width, bool is_plain = 8 % width == 0>
struct CodesOf : Fields<width> {};
template <int width>
struct CodesOf<width, false> : Dense<width> {};

// The integers of a segment.
template <int width>
struct Integers {
  static constexpr int kBits = width;
  static constexpr bool kPlain = true;  // no table
  CodesOf<width> codes;

  explicit Integers(const ql::TileSegment&) {}
  template <int chains>
  static constexpr int shift_of(int chain) {
    return CodesOf<width>::template shift_of<chains>(chain);
  }
  template <int chains>
  void unpack(const uint8_t* packed, __m512i (&chunks)[kUnitChunks]) const {
    codes.template unpack<chains>(packed, chunks);
  }
};

// Floats that have an integer form: e2m1 (4 bits) to e2m4 (7 bits).
template <int width, class Table>
struct SmallFloats {
  static constexpr int kBits = width;
  static constexpr bool kPlain = false;
  CodesOf<width> codes;
  Table table;

  explicit SmallFloats(const ql::TileSegment& s) : table(s.integer_values) {}
  template <int>
  static constexpr int shift_of(int) {
    return 0;
  }
  template <int>
  void unpack(const uint8_t* packed, __m512i (&chunks)[kUnitChunks]) const {
    codes.template unpack<1>(packed, chunks);
    for (__m512i& chunk : chunks) chunk = table(chunk);
  }
};

// What `codes` is, without const and reference.
template <class T>
struct Bare {
  using Type = T;
};
template <class T>
struct Bare<const T&> {
  using Type = T;
};

// Calls body(decoder) with what unpacks the codes of `s`.
template <class Body>
inline void with_codes(const ql::TileSegment& s, const Body& body) {
  if (s.integer_values) {
    switch (s.bits) {
      case 4: return body(SmallFloats<4, Nibbles>(s));
      case 5: return body(SmallFloats<5, Quintets>(s));
      case 6: return body(SmallFloats<6, Sextets>(s));
      default: return body(SmallFloats<7, Septets>(s));
    }
  }
  switch (s.bits) {
    case 2: return body(Integers<2>(s));
    case 3: return body(Integers<3>(s));
    case 4: return body(Integers<4>(s));
    case 5: return body(Integers<5>(s));
    case 6: return body(Integers<6>(s));
    case 7: return body(Integers<7>(s));
    default: return body(Integers<8>(s));
  }
}

}  // namespace
}  // namespace vnni
