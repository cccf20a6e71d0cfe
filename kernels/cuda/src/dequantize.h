// Codes of 2 to 8 bits, as they are packed, into pairs of 16-bit floats with integer values.
//
// What comes out is code - 2^(bits-1), in fp16 or bf16, where every such integer is exact: scales
// and zero points meet the float32 sums later, so nothing is rounded here.
//
// A lane's unit is 32 weights in `bits` words. A word is two halves of 16 bits with the same
// layout: the low half belongs to the even columns, the high one to the odd ones, so that one
// operation on the word serves a pair. Of the 16 codes of a half, the first live whole in one word
// each, 16 / bits of them from bit 0 up; the others lie in the bits that are left at the top of all
// the words, taken as one string of bits, word after word. kernels/cuda/layout.py packs so.
//
// A code becomes a float without a conversion: its bits are put into the mantissa of a power of two
// (1024 in fp16, 128 in bf16), at bit `at`, and one fma takes the power away: x 2^-at - constant.
#pragma once

#include "device.h"

namespace dequantize {

// What a 16-bit float is made of.
template <class Element>
struct Traits;
template <>
struct Traits<ptx::Half> {
  static constexpr int kMantissa = 10, kBias = 15;
};
template <>
struct Traits<ptx::BFloat> {
  static constexpr int kMantissa = 7, kBias = 127;
};

__host__ __device__ constexpr uint32_t twice(uint32_t half) { return half | half << 16; }

// Bits of the float `count` 2^power, for an integer count > 0 that the mantissa holds.
template <class Element>
__host__ __device__ constexpr uint32_t float_bits(uint32_t count, int power) {
  int top = 0;
  while (count >> (top + 1) != 0) ++top;
  const int mantissa = Traits<Element>::kMantissa;
  const uint32_t exponent = static_cast<uint32_t>(Traits<Element>::kBias + power + top);
  return exponent << mantissa | ((count << (mantissa - top)) & ((1u << mantissa) - 1));
}

template <class Element, int bits>
struct Codes {
  static constexpr int kMantissa = Traits<Element>::kMantissa;
  static constexpr int kWhole = 16 / bits;                // codes that a half word holds whole
  static constexpr int kSpare = 16 - kWhole * bits;       // bits that are left at its top
  static constexpr int kWholeCodes = kWhole * bits;       // of all words
  static constexpr uint32_t kOne = float_bits<Element>(1, kMantissa);  // 1024 or 128
  static constexpr uint32_t kSign = 0x8000;

  // Where a code that begins at bit `from` of a half word is put: as it lies, if the mantissa
  // reaches it, or moved down with its neighbours, so that they share one shift.
  static __host__ __device__ constexpr int shift_of(int from) {
    int base = 0;
    for (int at = 0; at <= from; at += bits) {
      if (at - base + bits > kMantissa) base = at;
    }
    return base;
  }

  // biased holds 2^kMantissa + code 2^at: returns code - 2^(bits-1).
  template <int at>
  static __device__ __forceinline__ uint32_t without_bias(uint32_t biased) {
    // (2^kMantissa) 2^-at + 2^(bits-1), as a number of units of 2^(bits-1) or 2^(kMantissa-at).
    constexpr int low = bits - 1 < kMantissa - at ? bits - 1 : kMantissa - at;
    constexpr uint32_t count = (1u << (kMantissa - at - low)) + (1u << (bits - 1 - low));
    constexpr uint32_t constant = float_bits<Element>(count, low) | kSign;
    return ptx::fma2<Element>(biased, twice(float_bits<Element>(1, -at)), twice(constant));
  }

  // Bits of code `code`, one of those in the spare bits, that lie in word `word`: from the code's
  // bit `first`, `count` of them, at bit `from` of a half word.
  struct Piece {
    int first, count, from;
  };
  static __host__ __device__ constexpr Piece piece(int code, int word) {
    const int begin = (code - kWholeCodes) * bits, own = word * kSpare;
    const int low = begin > own ? begin : own;
    const int end = begin + bits < own + kSpare ? begin + bits : own + kSpare;
    return {low - begin, end > low ? end - low : 0, 16 - kSpare + low - own};
  }

  template <int code, int word>
  static __device__ __forceinline__ uint32_t with_pieces(const uint32_t (&words)[bits],
                                                         uint32_t biased) {
    if constexpr (word < bits) {
      constexpr Piece own = piece(code, word);
      if constexpr (own.count > 0) {
        constexpr uint32_t mask = twice(((1u << own.count) - 1) << own.first);
        biased = ptx::and_or(words[word] >> (own.from - own.first), mask, biased);
      }
      return with_pieces<code, word + 1>(words, biased);
    } else {
      return biased;
    }
  }

  // The pair number `code`, 0..15, of a unit.
  template <int code>
  static __device__ __forceinline__ uint32_t pair(const uint32_t (&words)[bits]) {
    if constexpr (bits > kMantissa) {
      return wide_pair<code>(words);
    } else if constexpr (code < kWholeCodes) {
      constexpr int from = code % kWhole * bits, shift = shift_of(from), at = from - shift;
      constexpr uint32_t mask = twice(((1u << bits) - 1) << at);
      return without_bias<at>(ptx::and_or(words[code / kWhole] >> shift, mask, twice(kOne)));
    } else {
      return without_bias<0>(with_pieces<code, 0>(words, twice(kOne)));
    }
  }

  // Eight bits are one more than bf16's mantissa has. The low seven go there, 128 + low, and the
  // top one chooses what is added: -256 without it, -128 with it (bit 7 is all that differs), which
  // is code - 128 in either case.
  template <int code>
  static __device__ __forceinline__ uint32_t wide_pair(const uint32_t (&words)[bits]) {
    static_assert(bits == kMantissa + 1, "one bit more than the mantissa, no more");
    const uint32_t word = code % 2 == 0 ? words[code / 2] : words[code / 2] >> 8;
    constexpr uint32_t top = 1u << kMantissa;
    constexpr uint32_t without_top = float_bits<Element>(1, kMantissa + 1) | kSign;
    const uint32_t low = ptx::and_or(word, twice(top - 1), twice(kOne));
    const uint32_t high = ptx::and_xor(word, twice(top), twice(without_top));
    return ptx::fma2<Element>(low, twice(float_bits<Element>(1, 0)), high);
  }
};

}  // namespace dequantize
