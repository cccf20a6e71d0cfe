// Dot products of 3-, 5- and 6-bit codes on AVX2 without bringing each code to a byte of its own,
// for the one or two tokens where that would be most of the work.
//
// A row's four codes of a chunk lie side by side. A byte shuffle gives both 16-bit words of the row's
// lane two bytes that hold two of its codes; a mask leaves one, a shift and the mask the other:
//
//   word 0:  codes 0 and 1, from bit 0 on        word 1:  codes 2 and 3, from bit `lift` on
//
// VPMADDWD then sums code 0 (or 1) times a << lift and code 2 (or 3), which is as much higher, times
// a: everything is 2^lift too large, in odd rows of odd widths, which begin within a byte, 16 times
// more, and is shifted back at the end. No code reaches bit 15, and sums of a run fit 32 bits.
//
//   fill_words(values, columns, bits, words)   a token's activations as these words
//   WordDots<bits>::of_block(codes, columns, words, stride, dots)
//       dots[t] = products of a block with token t, whose words are `stride` from the next one's
#pragma once

#include <cstring>

#include "tile_avx2_codes.h"

namespace {

constexpr int kWordTokens = 2;  // at most; with more, bytes are quicker

inline bool has_words(const ql::TileSegment& s) {
  return !s.integer_values && (s.bits == 3 || s.bits == 5 || s.bits == 6);
}

// Bytes between what the two words of a lane hold, and how many bits code 2 is higher than code 0.
constexpr int word_bytes(int bits) { return bits == 3 ? 0 : 1; }
constexpr int word_lift(int bits) { return 2 * bits - 8 * word_bytes(bits); }

// Of every four values 0 and 2 in one word pair, 1 and 3 in the next: `columns` words.
inline void fill_words(const int8_t* values, int64_t columns, int bits, int16_t* words) {
  const int lift = 1 << word_lift(bits);
  for (int64_t k = 0; k < columns; k += 4, values += 4, words += 4) {
    words[0] = static_cast<int16_t>(values[0] * lift);
    words[1] = values[2];
    words[2] = static_cast<int16_t>(values[1] * lift);
    words[3] = values[3];
  }
}

inline __m256i two_words(const int16_t* words) {
  int32_t pair;
  memcpy(&pair, words, sizeof(pair));
  return _mm256_set1_epi32(pair);
}

inline __m256i two_halves(const uint8_t* low, const uint8_t* high) {
  return _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)),
                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
}

// What a chunk's sixteen rows are read as: two vectors whose halves hold four rows each, so that most
// loads need no shuffle between halves. `rows` puts them in order again.
template <int bits>
struct WordRows;

// Rows 0-3 4-7 and 8-11 12-15: eight rows take 12 bytes, both halves get them.
template <>
struct WordRows<3> {
  static constexpr int kFirst[4] = {0, 6, 0, 6};  // byte where each half's rows begin
  static void load(const uint8_t* codes, __m256i (&v)[2]) {
    for (int i = 0; i < 2; ++i) {
      const __m128i* from = reinterpret_cast<const __m128i*>(codes + 12 * i);
      v[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
    }
  }
  static IntLanes rows(__m256i first, __m256i last) { return {first, last}; }
};

// Rows 0-3 8-11 and 4-7 12-15.
template <>
struct WordRows<5> {
  static constexpr int kFirst[4] = {0, 4, 0, 4};
  static void load(const uint8_t* codes, __m256i (&v)[2]) {
    v[0] = load_bytes(codes);
    v[1] = load_bytes(codes + 10);
  }
  static IntLanes rows(__m256i even, __m256i odd) {
    return {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
  }
};

// Rows 4-7 8-11 and 0-3 12-15.
template <>
struct WordRows<6> {
  static constexpr int kFirst[4] = {4, 0, 0, 0};
  static void load(const uint8_t* codes, __m256i (&v)[2]) {
    v[0] = load_bytes(codes + 8);
    v[1] = two_halves(codes, codes + 36);
  }
  static IntLanes rows(__m256i inner, __m256i outer) {
    return {_mm256_permute2x128_si256(outer, inner, 0x20),
            _mm256_permute2x128_si256(inner, outer, 0x31)};
  }
};

// The constants of a width.
template <int bits>
struct WordTables {
  alignas(32) uint8_t bytes[2][32] = {};
  alignas(32) uint32_t mask[8] = {}, shift[8] = {};

  constexpr WordTables() {
    for (int i = 0; i < 64; ++i) {
      const int row = i / 4 % 4, of_word = i % 2 + i % 4 / 2 * word_bytes(bits);
      bytes[i / 32][i % 32] =
          static_cast<uint8_t>(WordRows<bits>::kFirst[i / 16] + row * bits / 2 + of_word);
    }
    for (int row = 0; row < 8; ++row) {
      const uint32_t code = (1 << bits) - 1, within = row * bits % 2 * 4;
      mask[row] = (code | code << (16 + word_lift(bits))) << within;
      shift[row] = word_lift(bits) + within;
    }
  }
};

template <int bits>
struct WordDots {
  template <int tokens>
  static void of_block(const uint8_t* codes, int64_t columns, const int16_t* words, int64_t stride,
                       IntLanes (&dots)[tokens]) {
    const __m256i bytes[2] = {table(kTables.bytes[0]), table(kTables.bytes[1])};
    const __m256i mask = table(kTables.mask), shift = table(kTables.shift);
    __m256i sums[tokens][2];
    for (int t = 0; t < tokens; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns; k += 4, codes += 8 * bits) {
      __m256i v[2];
      Rows::load(codes, v);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256i both = _mm256_shuffle_epi8(v[i], bytes[i]);
        const __m256i first = _mm256_and_si256(both, mask);
        const __m256i last = _mm256_and_si256(_mm256_srli_epi16(both, bits), mask);
#pragma GCC unroll 2
        for (int t = 0; t < tokens; ++t) {
          const int16_t* a = words + t * stride + k;
          sums[t][i] = _mm256_add_epi32(sums[t][i], _mm256_madd_epi16(first, two_words(a)));
          sums[t][i] = _mm256_add_epi32(sums[t][i], _mm256_madd_epi16(last, two_words(a + 2)));
        }
      }
    }
    for (int t = 0; t < tokens; ++t) {
      dots[t] = Rows::rows(_mm256_srav_epi32(sums[t][0], shift),
                           _mm256_srav_epi32(sums[t][1], shift));
    }
  }

 private:
  using Rows = WordRows<bits>;
  static constexpr WordTables<bits> kTables{};

  static __m256i table(const void* of) {
    return _mm256_load_si256(static_cast<const __m256i*>(of));
  }
};

}  // namespace
