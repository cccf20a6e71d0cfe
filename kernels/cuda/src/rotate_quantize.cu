// Tokens in one pass to what kernel (b) multiplies: rotated, rounded, laid out.
//
//   y    = x in the basis of H_m (x) S_s, in each of the first whole blocks of m s columns, and, if
//          the blocks do not divide the columns (m = 1), once more over the last s of the result
//   code = y[order], rounded as quantlib/formats/activation.py says, each segment in its own way
//
// S_s is Sylvester's matrix of order s, a power of two, done in additions: at distance 1, 2, 4 and
// so on, (a, b) becomes (a + b, a - b). H_m is any matrix [m, m], the dense part of a Hadamard
// matrix or, with s = 1, a basis of its own for m columns: sums of fma in the order of its rows.
// Last comes the factor. All of it is float32. A block of 256 threads has one token in shared
// memory; the levels of S_s are done five at a time in registers.
//
// Compiled by macros: those of segments.h; QL_BFLOAT, the inputs' type; QL_DENSE m <= 64 and
// QL_SYLVESTER s (both 1: no rotation); QL_ORDER 0, 1; of each segment QL_START_i and QL_LENGTH_i
// (columns of the rotated inputs), QL_BITS_i, QL_ASYMMETRIC_i and QL_GROUP_i (columns that share a
// scale, a multiple of 32 or all).
#include "element.h"
#include "segments.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDense = QL_DENSE, kSylvester = QL_SYLVESTER, kBlock = kDense * kSylvester;
constexpr bool kOrder = QL_ORDER;
constexpr bool kZeros = segments::any_zeros(), kUnsigned = segments::any_of(segments::kUnsigned);
constexpr int kPlanes = 1 + kZeros + kUnsigned, kStepBytes = segments::kStepBytes;

struct Rounding {
  int start, length, bits, group;
  bool asymmetric;

  __host__ __device__ constexpr int groups() const { return (length + group - 1) / group; }
};

__host__ __device__ constexpr Rounding rounding(int i) {
  return i == 0 ? Rounding{QL_START_0, QL_LENGTH_0, QL_BITS_0, QL_GROUP_0, QL_ASYMMETRIC_0 != 0}
         : i == 1
             ? Rounding{QL_START_1, QL_LENGTH_1, QL_BITS_1, QL_GROUP_1, QL_ASYMMETRIC_1 != 0}
             : Rounding{QL_START_2, QL_LENGTH_2, QL_BITS_2, QL_GROUP_2, QL_ASYMMETRIC_2 != 0};
}

__host__ __device__ constexpr int groups_before(int end) {
  int sum = 0;
  for (int i = 0; i < end; ++i) sum += rounding(i).groups();
  return sum;
}

// Shared memory: a token's columns, then two floats of each group (scale and zero point).
struct Problem {
  const unsigned char* inputs;
  const float* basis;
  const int* order;
  unsigned char* codes;
  int* meta;
  int M, K, input_stride, padded_tokens;
  float factor, clips[3];

  __device__ __forceinline__ Shared groups() const { return (K + 31) / 32 * 128; }
};

// Columns that lanes take together, neighbours or 32 apart, are in different banks.
__device__ __forceinline__ Shared at(int column) { return (column ^ (column / 32 & 31)) * 4; }

__device__ void read_token(const Problem& p, Shared memory, int token, int thread) {
  const unsigned char* row = p.inputs + static_cast<int64_t>(token) * p.input_stride * 2;
  const int padded = (p.K + 31) / 32 * 32;
#pragma unroll 1
  for (int base = 0; base < padded; base += kThreads) {
    const int column = base + thread;
    if (column / 32 * 32 >= padded) break;  // whole warps
    float value = 0.f;
    if (column < p.K) value = ptx::to_float<Element>(ptx::load_global<uint16_t>(row + column * 2));
    ptx::store_shared(memory + at(column), value);
  }
  __syncthreads();
}

// Levels `stride`, 2 stride, ... of S_s, `kRadix` numbers a thread.
template <int kRadix>
__device__ __forceinline__ void butterflies(Shared memory, int first, int stride, int columns,
                                            int thread) {
  const int units = columns / kRadix;
#pragma unroll 1
  for (int unit = thread; unit < units; unit += kThreads) {
    const int start = first + unit / stride * (stride * kRadix) + unit % stride;
    float value[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) {
      value[i] = ptx::load_shared_alone(memory + at(start + i * stride));
    }
#pragma unroll
    for (int distance = 1; distance < kRadix; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kRadix; ++i) {
        if (i & distance) continue;
        const float a = value[i], b = value[i + distance];
        value[i] = a + b;
        value[i + distance] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < kRadix; ++i) {
      ptx::store_shared_alone(memory + at(start + i * stride), value[i]);
    }
  }
  __syncthreads();
}

template <int stride>
__device__ __forceinline__ void sylvester(Shared memory, int first, int columns, int thread) {
  if constexpr (stride < kSylvester) {
    constexpr int kLeft = kSylvester / stride, kRadix = kLeft < 32 ? kLeft : 32;
    butterflies<kRadix>(memory, first, stride, columns, thread);
    sylvester<stride * kRadix>(memory, first, columns, thread);
  }
}

// H_m: a thread has the m numbers of a block that are s columns apart.
__device__ __forceinline__ void dense(const Problem& p, Shared memory, int columns, int thread) {
  const int units = columns / kDense;
#pragma unroll 1
  for (int unit = thread; unit < units; unit += kThreads) {
    const int start = unit / kSylvester * kBlock + unit % kSylvester;
    float value[kDense];
#pragma unroll
    for (int i = 0; i < kDense; ++i) {
      value[i] = ptx::load_shared_alone(memory + at(start + i * kSylvester));
    }
#pragma unroll 1
    for (int j = 0; j < kDense; ++j) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kDense; ++i) {
        sum = ptx::fma(value[i], ptx::load_global<float>(p.basis + i * kDense + j), sum);
      }
      ptx::store_shared_alone(memory + at(start + j * kSylvester), sum);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void scale_columns(const Problem& p, Shared memory, int first, int count,
                                              int thread) {
#pragma unroll 1
  for (int column = first + thread; column < first + count; column += kThreads) {
    const float value = ptx::load_shared_alone(memory + at(column));
    ptx::store_shared_alone(memory + at(column), ptx::product(value, p.factor));
  }
  __syncthreads();
}

__device__ void rotate(const Problem& p, Shared memory, int thread) {
  if constexpr (kBlock > 1) {
    const int whole = p.K / kBlock * kBlock;
    sylvester<1>(memory, 0, whole, thread);
    if constexpr (kDense > 1) dense(p, memory, whole, thread);
    scale_columns(p, memory, 0, whole, thread);
    if (whole < p.K) {
      sylvester<1>(memory, p.K - kBlock, kBlock, thread);
      scale_columns(p, memory, p.K - kBlock, kBlock, thread);
    }
  }
}

__device__ __forceinline__ float number(const Problem& p, Shared memory, int column) {
  const int from = kOrder ? ptx::load_global<int>(p.order + column) : column;
  return ptx::load_shared_alone(memory + at(from));
}

// The scale and zero point of a group, from its smallest and largest number.
template <int s>
__device__ __forceinline__ void store_scale(const Problem& p, Shared to, float low, float high,
                                            bool finite) {
  constexpr Rounding own = rounding(s);
  constexpr float kLargest = own.asymmetric ? (1 << own.bits) - 1 : (1 << (own.bits - 1)) - 1;
  const float bottom = ptx::product(low < 0.f ? low : 0.f, p.clips[s]);
  const float top = ptx::product(high > 0.f ? high : 0.f, p.clips[s]);
  const float down = 0.f - bottom;  // not -bottom: zeros have the scale 0, not -0
  const float reach = own.asymmetric ? top + down : (top > down ? top : down);
  const bool usable = finite && reach - reach == 0.f;
  const float scale = usable ? ptx::quotient(reach, kLargest) : ptx::as_float(0x7fc00000);
  float zero = 0.f;
  if (own.asymmetric && scale > 0.f) zero = ptx::nearest(ptx::quotient(down, scale));
  ptx::store_shared_alone(to, scale);
  ptx::store_shared_alone(to + 4, zero);
}

// Scales of all groups of a segment, a warp to each.
template <int s>
__device__ __forceinline__ void find_scales(const Problem& p, Shared memory, int thread) {
  if constexpr (s < segments::kCount) {
    constexpr Rounding own = rounding(s);
#pragma unroll 1
    for (int group = thread / 32; group < own.groups(); group += kWarps) {
      const int begin = group * own.group;
      const int end = begin + own.group < own.length ? begin + own.group : own.length;
      float low = 0.f, high = 0.f;
      int finite = 1;
#pragma unroll 1
      for (int column = begin + thread % 32; column < end; column += 32) {
        const float value = number(p, memory, own.start + column);
        if (!(value - value == 0.f)) finite = 0;
        low = value < low ? value : low;
        high = value > high ? value : high;
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) {
        const float far_low = ptx::as_float(ptx::exchange(ptx::as_bits(low), other));
        const float far_high = ptx::as_float(ptx::exchange(ptx::as_bits(high), other));
        finite &= ptx::exchange(finite, other);
        low = far_low < low ? far_low : low;
        high = far_high > high ? far_high : high;
      }
      if (thread % 32 == 0) {
        store_scale<s>(p, p.groups() + (groups_before(s) + group) * 8, low, high, finite != 0);
      }
    }
    find_scales<s + 1>(p, memory, thread);
  }
}

// One column's code, less its zero point, as stored; `sum` grows by what it stands for.
template <int s>
__device__ __forceinline__ uint32_t code_of(const Problem& p, Shared memory, int column, int& sum) {
  constexpr Rounding own = rounding(s);
  constexpr bool kIsUnsigned = segments::segment(s).kind == segments::kUnsigned;
  constexpr float kLargest = own.asymmetric ? (1 << own.bits) - 1 : (1 << (own.bits - 1)) - 1;
  if (column >= own.length) return 0;
  const Shared group = p.groups() + (groups_before(s) + column / own.group) * 8;
  const float scale = ptx::load_shared_alone(group), zero = ptx::load_shared_alone(group + 4);
  float code = 0.f;
  if (scale > 0.f) {
    code = ptx::nearest(ptx::quotient(number(p, memory, own.start + column), scale)) + zero;
    const float least = own.asymmetric ? 0.f : -kLargest;
    code = code < least ? least : code > kLargest ? kLargest : code;
  }
  sum += static_cast<int>(code - zero);
  return static_cast<uint32_t>(static_cast<int>(kIsUnsigned ? code : code - zero));
}

// Codes of a segment, 32 bits a lane, and what belongs to its spans: a warp takes spans until it
// has enough words for its lanes, or one span as long as it lasts.
template <int s>
__device__ __forceinline__ void store_codes(const Problem& p, Shared memory, int token,
                                            int thread) {
  if constexpr (s < segments::kCount) {
    constexpr segments::Segment segment = segments::segment(s);
    constexpr Rounding own = rounding(s);
    constexpr int kBits = segment.nibbles() ? 4 : 8, kEach = 32 / kBits;
    constexpr int kWords = segment.steps * kStepBytes / 4;
    constexpr int kSpanWords = segment.span_steps == 0 ? kStepBytes / 8
                                                       : segment.span_steps * kStepBytes / 4;
    constexpr int kLanes = kSpanWords < 32 ? kSpanWords : 32;  // that share a span
    constexpr int kUnitWords = kSpanWords < 32 ? 32 : kSpanWords;
    const int lane = thread % 32;
    unsigned char* row = p.codes + static_cast<int64_t>(token) * (segments::kSteps * kStepBytes) +
                         segments::steps_before(s) * kStepBytes;
#pragma unroll 1
    for (int first = thread / 32 * kUnitWords; first < kWords; first += kWarps * kUnitWords) {
      int sum = 0;
#pragma unroll 1
      for (int word = first + lane; word < first + kUnitWords; word += 32) {
        if (word >= kWords) break;
        uint32_t packed = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          packed |= (code_of<s>(p, memory, word * kEach + i, sum) & ((1u << kBits) - 1))
                    << (i * kBits);
        }
        ptx::store_global(row + word * 4, packed);
      }
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) sum += ptx::exchange(sum, other);
      const int word = first + lane;
      if (lane % kLanes == 0 && word < kWords) {
        const int column = word * kEach;
        const int last = own.groups() - 1, group = column / own.group;
        const Shared from = p.groups() + (groups_before(s) + (group < last ? group : last)) * 8;
        const float scale = ptx::load_shared_alone(from);
        int* to = p.meta + (segments::spans_before(s) + word / kSpanWords) * kPlanes *
                               static_cast<int64_t>(p.padded_tokens) + token;
        ptx::store_global(to, ptx::as_bits(scale));
        if constexpr (kZeros) {
          const float scaled = ptx::product(scale, static_cast<float>(sum));
          ptx::store_global(to + p.padded_tokens, ptx::as_bits(scaled));
        }
        if constexpr (kUnsigned) {
          const float zero = ptx::load_shared_alone(from + 4);
          const bool kept = segment.kind == segments::kUnsigned;
          ptx::store_global(to + (1 + kZeros) * p.padded_tokens,
                            kept ? static_cast<int>(zero) : 0);
        }
      }
    }
    store_codes<s + 1>(p, memory, token, thread);
  }
}

}  // namespace

// inputs [M, input_stride >= K] of Element; basis [m, m] or null; order int32 [K] or null; codes
// [M, 64 * steps] and meta [spans, planes, padded_tokens] as kernel (b) takes them; factor: what
// rotated numbers are multiplied by; clips of the segments. Tokens are dealt out to the blocks.
extern "C" __global__ void __launch_bounds__(kThreads)
    rotate_quantize(const unsigned char* __restrict__ inputs, const float* __restrict__ basis,
                    const int* __restrict__ order, unsigned char* __restrict__ codes,
                    int* __restrict__ meta, int M, int K, int input_stride, int padded_tokens,
                    float factor, float clip_0, float clip_1, float clip_2) {
  const Problem p{inputs, basis, order, codes, meta, M, K, input_stride, padded_tokens, factor,
                  {clip_0, clip_1, clip_2}};
  const Shared memory = ptx::shared_memory();
  const int thread = ptx::thread_index();
  for (int token = static_cast<int>(blockIdx.x); token < M; token += static_cast<int>(gridDim.x)) {
    read_token(p, memory, token, thread);
    rotate(p, memory, thread);
    find_scales<0>(p, memory, thread);
    __syncthreads();
    store_codes<0>(p, memory, token, thread);
    __syncthreads();
  }
}

QL_KERNEL(rotate_quantize)
