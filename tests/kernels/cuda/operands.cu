// What dequantize.h makes of a lane's words, for every width and both types: 32 lanes, `words` words
// each, give 32 numbers each.
#include "dequantize.h"

template <class Element, int bits, int code>
__device__ void store_pairs(float* output, const uint32_t (&words)[bits]) {
  if constexpr (code < 16) {
    const uint32_t pair = dequantize::Codes<Element, bits>::template pair<code>(words);
    ptx::store_global(output + 2 * code, ptx::to_float<Element>(pair & 0xffff));
    ptx::store_global(output + 2 * code + 1, ptx::to_float<Element>(pair >> 16));
    store_pairs<Element, bits, code + 1>(output, words);
  }
}

template <class Element, int bits>
__device__ void operands_of(const uint32_t* input, float* output) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t words[bits];
  for (int i = 0; i < bits; ++i) words[i] = ptx::load_global<uint32_t>(input + lane * bits + i);
  store_pairs<Element, bits, 0>(output + 32 * lane, words);
}

template <class Element, int bits>
__device__ void choose(const uint32_t* input, float* output, int width) {
  if constexpr (bits <= 8) {
    if (width == bits) return operands_of<Element, bits>(input, output);
    choose<Element, bits + 1>(input, output, width);
  }
}

__global__ void operands(const uint32_t* input, float* output, int width, int bfloat) {
  if (bfloat != 0) {
    choose<ptx::BFloat, 2>(input, output, width);
  } else {
    choose<ptx::Half, 2>(input, output, width);
  }
}

QL_KERNEL(operands)
