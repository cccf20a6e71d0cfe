// One new token's attention over a packed KV cache, read as it is packed: the blocks, groups and
// chunks of kernels/cpu/src/kv_cache.h, 8 or 4 bits, with a wider slice or without.
//
//   score[i] = sum over columns of query[c] (code[i][c] - zero) scale      times score_scale
//   output   = sum over i of softmax(score)[i] value[i]
//
// A block of 256 threads takes 256 positions (a split) of one sequence and KV head, for all query
// heads that share it, so every byte is read once: a thread has a position while it makes scores,
// and a column, of some of the positions, while it sums values. Splits leave their maximum, sum and
// output in memory; the last split of a head, which has the largest number, waits for those before
// it and merges them in their order, so the result does not depend on who is early.
//
// Numbers of codes are exact in float32; sums are float32. score_scale has a factor log2(e), so
// that powers are of two.
//
// Compiled by macros: QL_BFLOAT, the type of queries and output; QL_HEADS 1..8 query heads to a KV
// head; QL_COLUMNS head_dim, a multiple of 16; of keys (K) and values (V): QL_K_BITS 8, 4,
// QL_K_WIDE, QL_K_GROUP (columns of a group, or all that are not wide).
#include "element.h"

namespace {

constexpr int kThreads = 256, kSplit = 256, kBlock = 64;
constexpr int kHeads = QL_HEADS, kColumns = QL_COLUMNS;
constexpr float kNone = -1e30f;  // a score of a position that is not seen
static_assert(kColumns % 16 == 0 && kColumns <= 256 && kHeads <= 8, "see above");

struct Side {
  int bits, wide, group;

  __host__ __device__ constexpr int start(int index) const {
    return wide == 0 ? index * group : index == 0 ? 0 : wide + (index - 1) * group;
  }
  __host__ __device__ constexpr int columns(int index) const {
    const int whole = wide > 0 && index == 0 ? wide : group;
    return whole < kColumns - start(index) ? whole : kColumns - start(index);
  }
  __host__ __device__ constexpr int bits_of(int index) const {
    return wide > 0 && index == 0 ? 8 : bits;
  }
  __host__ __device__ constexpr int groups() const {
    int count = 0;
    while (start(count) < kColumns) ++count;
    return count;
  }
  // Of a group in a block, in bytes; that of the number of groups is a block's size.
  __host__ __device__ constexpr int offset(int index) const {
    int bytes = 0;
    for (int i = 0; i < index; ++i) bytes += kBlock * (4 + columns(i) * bits_of(i) / 8);
    return bytes;
  }
};

constexpr Side kKeys{QL_K_BITS, QL_K_WIDE, QL_K_GROUP};
constexpr Side kValues{QL_V_BITS, QL_V_WIDE, QL_V_GROUP};
constexpr int kKeyBytes = kKeys.offset(kKeys.groups());
constexpr int kValueBytes = kValues.offset(kValues.groups());
// Threads that have the same column take turns with the four blocks of a split.
constexpr int kParts = kColumns <= 64 ? 4 : kColumns <= 128 ? 2 : 1;
constexpr int kPartial = kColumns + 2;  // floats of a split and head: output, maximum, sum

// Shared memory, in floats: queries [heads][columns], scores [heads][split], maxima and sums
// [heads][2], outputs [parts][heads][columns].
constexpr int kScoresAt = kHeads * kColumns, kStatesAt = kScoresAt + kHeads * kSplit;
constexpr int kOutputsAt = kStatesAt + kHeads * 2;

struct Problem {
  const unsigned char *query, *keys, *values;
  const int* lengths;
  unsigned char* output;
  float* partials;
  int* flags;
  int kv_heads, blocks, splits, window;  // blocks: of a sequence and head
  float score_scale;
};

__device__ __forceinline__ Shared at(int index) { return ptx::shared_memory() + index * 4; }

// (code - zero) of the byte `which` of a word, exact.
__device__ __forceinline__ float less_zero(uint32_t word, int shift, uint32_t mask, float offset) {
  return ptx::as_float(static_cast<int>(0x4b000000u | (word >> shift & mask))) - offset;
}

// Of a position's meta word: its scale, and its zero plus the 2^23 of `less_zero`.
struct Meta {
  float scale, offset;

  __device__ __forceinline__ explicit Meta(uint32_t word) {
    scale = ptx::as_float(static_cast<int>(word & 0xffff0000u));
    const int zero = static_cast<int>((word & 0xffffu) ^ 0x8000u) - 0x8000;
    offset = 8388608.f + static_cast<float>(zero);
  }
};

template <int group>
__device__ __forceinline__ void add_scores(float (&score)[kHeads], const unsigned char* block,
                                           int position) {
  if constexpr (group < kKeys.groups()) {
    constexpr int kBits = kKeys.bits_of(group), kStart = kKeys.start(group);
    constexpr int kWords = kKeys.columns(group) * kBits / 32, kHalves = 8 / kBits;
    constexpr uint32_t kMask = (1u << kBits) - 1;
    const unsigned char* from = block + kKeys.offset(group) + position * 4;
    const Meta meta(ptx::load_global<uint32_t>(from));
    float sum[kHeads] = {};
#pragma unroll 4
    for (int word = 0; word < kWords; ++word) {
      const auto codes = ptx::load_global<uint32_t>(from + (word + 1) * kBlock * 4);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float number[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          number[i] = less_zero(codes, 8 * i + 4 * half, kMask, meta.offset);
        }
        const int column = kStart + (word * kHalves + half) * 4;
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          const float4 query = ptx::load_shared_alone<float4>(at(head * kColumns + column));
          sum[head] = ptx::fma(query.x, number[0], sum[head]);
          sum[head] = ptx::fma(query.y, number[1], sum[head]);
          sum[head] = ptx::fma(query.z, number[2], sum[head]);
          sum[head] = ptx::fma(query.w, number[3], sum[head]);
        }
      }
    }
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      score[head] = ptx::fma(sum[head], meta.scale, score[head]);
    }
    add_scores<group + 1>(score, block, position);
  }
}

// A column's values of the positions [begin, end) of a block.
template <int group>
__device__ __forceinline__ void add_values(float (&sum)[kHeads], const unsigned char* block,
                                           int column, int first_score, int begin, int end) {
  if constexpr (group < kValues.groups()) {
    constexpr int kBits = kValues.bits_of(group), kStart = kValues.start(group);
    constexpr int kWide = kValues.columns(group), kHalves = 8 / kBits;
    constexpr uint32_t kMask = (1u << kBits) - 1;
    if (column >= kStart + kWide) {
      return add_values<group + 1>(sum, block, column, first_score, begin, end);
    }
    const unsigned char* from = block + kValues.offset(group);
#pragma unroll 1
    for (int step = begin / (4 * kHalves); step * 4 * kHalves < end; ++step) {
      const auto codes = ptx::load_global<uint32_t>(
          from + kBlock * 4 + (step * kWide + column - kStart) * 4);
#pragma unroll
      for (int i = 0; i < 4 * kHalves; ++i) {
        const int position = step * 4 * kHalves + i;
        if (position < begin || position >= end) continue;
        const Meta meta(ptx::load_global<uint32_t>(from + position * 4));
        const float number = less_zero(codes, i % 4 * 8 + i / 4 * 4, kMask, meta.offset);
        const float value = ptx::product(number, meta.scale);
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          const int score = kScoresAt + head * kSplit + first_score + position;
          sum[head] = ptx::fma(ptx::load_shared_alone(at(score)), value, sum[head]);
        }
      }
    }
  }
}

// Scores of the warp's head become powers; its maximum and their sum go to shared memory.
__device__ __forceinline__ void weigh(int head, int lane) {
  float most = kNone;
#pragma unroll 1
  for (int i = lane; i < kSplit; i += 32) {
    const float score = ptx::load_shared_alone(at(kScoresAt + head * kSplit + i));
    most = score > most || score != score ? score : most;
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    const float far = ptx::as_float(ptx::exchange(ptx::as_bits(most), other));
    most = far > most || far != far ? far : most;
  }
  float sum = 0.f;
#pragma unroll 1
  for (int i = lane; i < kSplit; i += 32) {
    const Shared own = at(kScoresAt + head * kSplit + i);
    const float score = ptx::load_shared_alone(own);
    const float power = score == kNone ? 0.f : ptx::power_of_two(score - most);
    ptx::store_shared_alone(own, power);
    sum += power;
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    sum += ptx::as_float(ptx::exchange(ptx::as_bits(sum), other));
  }
  if (lane == 0) {
    ptx::store_shared_alone(at(kStatesAt + head * 2), most);
    ptx::store_shared_alone(at(kStatesAt + head * 2 + 1), sum);
  }
}

// A split's output of its positions [begin, end), not yet divided: [heads][columns] in shared
// memory, from kOutputsAt.
__device__ __forceinline__ void sum_values(const unsigned char* values, int begin, int end,
                                           int thread) {
  const int column = thread % (kThreads / kParts), part = thread / (kThreads / kParts);
  if (column < kColumns) {
    float sum[kHeads] = {};
#pragma unroll 1
    for (int block = part; block * kBlock < end; block += kParts) {
      const int from = begin - block * kBlock, to = end - block * kBlock;
      add_values<0>(sum, values + block * kValueBytes, column, block * kBlock,
                    from < 0 ? 0 : from, to < kBlock ? to : kBlock);
    }
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const int own = kOutputsAt + (part * kHeads + head) * kColumns + column;
      ptx::store_shared_alone(at(own), sum[head]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < kHeads * kColumns; i += kThreads) {
    float sum = ptx::load_shared_alone(at(kOutputsAt + i));
#pragma unroll
    for (int other = 1; other < kParts; ++other) {
      sum += ptx::load_shared_alone(at(kOutputsAt + other * kHeads * kColumns + i));
    }
    ptx::store_shared_alone(at(kOutputsAt + i), sum);
  }
}

// The head's splits before the last one, which has the numbers in shared memory, in their order.
__device__ __forceinline__ void merge(const Problem& p, int pair, int splits, int thread) {
  if (thread == 0) {
#pragma unroll 1
    for (int other = 0; other < splits - 1; ++other) {
      while (ptx::load_acquire(p.flags + pair * p.splits + other) == 0) {
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < kHeads * kColumns; i += kThreads) {
    const int head = i / kColumns;
    float most = ptx::load_shared_alone(at(kStatesAt + head * 2));
    float sum = 0.f, output = 0.f;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int other = 0; other < splits - 1; ++other) {
        const float* from =
            p.partials + (int64_t{1} * (pair * p.splits + other) * kHeads + head) * kPartial;
        const float own = ptx::load_global_from_l2<float>(from + kColumns);
        if (pass == 0) {
          most = own > most || own != own ? own : most;
          continue;
        }
        const float weight = ptx::power_of_two(own - most);
        sum = ptx::fma(ptx::load_global_from_l2<float>(from + kColumns + 1), weight, sum);
        output = ptx::fma(ptx::load_global_from_l2<float>(from + i % kColumns), weight, output);
      }
    }
    const float weight =
        ptx::power_of_two(ptx::load_shared_alone(at(kStatesAt + head * 2)) - most);
    sum = ptx::fma(ptx::load_shared_alone(at(kStatesAt + head * 2 + 1)), weight, sum);
    output = ptx::fma(ptx::load_shared_alone(at(kOutputsAt + i)), weight, output);
    const uint32_t bits = ptx::to_pair<Element>(ptx::quotient(output, sum), 0.f);
    unsigned char* to = p.output + (int64_t{1} * pair * kHeads * kColumns + i) * 2;
    ptx::store_global(to, static_cast<uint16_t>(bits & 0xffff));
  }
  if (thread == 0) {
#pragma unroll 1
    for (int other = 0; other < splits - 1; ++other) {
      ptx::store_release(p.flags + pair * p.splits + other, 0);
    }
  }
}

__device__ __forceinline__ void leave(const Problem& p, int pair, int split, int thread) {
  float* to = p.partials + int64_t{1} * (pair * p.splits + split) * kHeads * kPartial;
#pragma unroll 1
  for (int i = thread; i < kHeads * kPartial; i += kThreads) {
    const int head = i / kPartial, column = i % kPartial;
    const int from = column < kColumns ? kOutputsAt + head * kColumns + column
                                       : kStatesAt + head * 2 + column - kColumns;
    ptx::store_global(to + i, ptx::load_shared_alone(at(from)));
  }
  __syncthreads();
  if (thread == 0) ptx::store_release(p.flags + pair * p.splits + split, 1);
}

}  // namespace

// query and output [batch, kv_heads * heads, columns] of Element; keys and values of one layer, as
// kv_cache.h has them, [batch, kv_heads, blocks] blocks; lengths int32 [batch], 1 or more; partials
// float32 [batch * kv_heads, splits, heads, columns + 2], which need not be set; flags int32
// [batch * kv_heads, splits], zero before and after. The grid has a block for each of those, splits
// fastest. The token sees the last `window` positions (0: all).
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    kv_attention(const unsigned char* __restrict__ query, const unsigned char* __restrict__ keys,
                 const unsigned char* __restrict__ values, const int* __restrict__ lengths,
                 unsigned char* __restrict__ output, float* partials, int* flags, int kv_heads,
                 int blocks, int splits, int window, float score_scale) {
  const Problem p{query, keys, values, lengths, output, partials, flags, kv_heads, blocks, splits,
                  window, score_scale};
  const int thread = ptx::thread_index();
  const int pair = static_cast<int>(blockIdx.x) / splits;
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int length = ptx::load_global<int>(lengths + pair / kv_heads);
  const int used = (length + kSplit - 1) / kSplit;  // splits
  if (split >= used) return;
  const int first = window > 0 && length > window ? length - window : 0;
#pragma unroll 1
  for (int i = thread; i < kHeads * kColumns; i += kThreads) {
    const unsigned char* from = query + (int64_t{1} * pair * kHeads * kColumns + i) * 2;
    const float value = ptx::to_float<Element>(ptx::load_global<uint16_t>(from));
    ptx::store_shared_alone(at(i), ptx::product(value, score_scale));
  }
  __syncthreads();
  const int position = split * kSplit + thread;
  const int64_t blocks_before = int64_t{1} * pair * blocks;
  float score[kHeads] = {};
  const bool sees = position >= first && position < length;
  if (sees) {
    add_scores<0>(score, keys + (blocks_before + position / kBlock) * kKeyBytes,
                  position % kBlock);
  }
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    ptx::store_shared_alone(at(kScoresAt + head * kSplit + thread), sees ? score[head] : kNone);
  }
  __syncthreads();
  if (thread / 32 < kHeads) weigh(thread / 32, thread % 32);
  __syncthreads();
  const int before = split * kSplit, left = length - before;
  sum_values(values + (blocks_before + before / kBlock) * kValueBytes,
             first > before ? first - before : 0, left < kSplit ? left : kSplit, thread);
  __syncthreads();
  if (split + 1 == used) {
    merge(p, pair, used, thread);
  } else {
    leave(p, pair, split, thread);
  }
}

QL_KERNEL(kv_attention)
