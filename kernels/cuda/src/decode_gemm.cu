// Kernel (a): few tokens times a weight of 2 to 8 bits, limited by reading the weight.
//
//   output[m, n] = row_factor[n] * sum over groups of scale[g, n] *
//                      sum over k in g of (code[n, k] - zero[g, n]) * input[m, k]   (+ bias[n])
//
// The weight is the left operand of the tensor cores and the tokens are the right one, so tokens
// come in eights, not sixteens. Operands are exact: integers (dequantize.h), and inputs as they
// are. Sums are float32. Scales are applied to the sums of a group, which costs less than scaling
// weights as long as there are few tokens, and rounds nothing to 16 bits. A zero point is applied
// to sums too: the same inputs are multiplied with ones, which gives their sums.
//
// A block has 8 warps and computes kTileRows output rows in steps of kWarpsK slabs of 64 columns.
// Each step's weights, inputs and scales are one stage of a ring of kStages in shared memory,
// filled by cp.async; the ring does not drain between tiles. Each warp multiplies 32 rows by 64
// columns of a step (a strip), in two units of 32 columns; while it multiplies one, the words of
// the next are on their way to registers. Where two warps share rows, they add up at the end of a
// tile.
//
// Compiled for one case each, by macros:
//   QL_BITS 2..8, QL_BFLOAT 0, 1, QL_TOKEN_TILES 1, 2, 4, 8 (tokens / 8), QL_STAGES >= 3
//   QL_PERIOD  how often sums are scaled. 0: at the end, by the row factor alone; 1, 2, 4: after so
//              many 16 columns, 4 meaning groups of 64 << group_shift columns
//   QL_ZEROS   0, 1 (with a period)
//   QL_BLOCKS_PER_SM  what registers are limited for
//
// Layouts are in kernels/cuda/layout.py, sizes and arguments in kernels/cuda/decode.py.
#include "device.h"
#include "dequantize.h"
#include "work.h"

namespace {

#if QL_BFLOAT
using Element = ptx::BFloat;
#else
using Element = ptx::Half;
#endif
using ptx::Shared;

constexpr int kBits = QL_BITS, kTokenTiles = QL_TOKEN_TILES, kStages = QL_STAGES;
constexpr int kPeriod = QL_PERIOD;
constexpr bool kGrouped = kPeriod > 0, kZeros = QL_ZEROS;
static_assert(kBits >= 2 && kBits <= 8 && kStages >= 3 && (kGrouped || !kZeros), "see above");

constexpr int kThreads = 256, kWarps = 8;
constexpr int kStripRows = 32, kSlab = 64;  // rows of a warp, columns of a step of it
constexpr int kWarpsK = kTokenTiles <= 2 ? 2 : 1, kWarpsN = kWarps / kWarpsK;
constexpr int kTileRows = kWarpsN * kStripRows;
constexpr int kTokens = 8 * kTokenTiles;
constexpr int kRows16 = kStripRows / 16;
// Whether there are registers for more than sums: to load a unit's words before the one before it
// is multiplied, and to keep what follows from the thread's number. With 64 tokens there are none,
// but products take longer than all that.
constexpr bool kAhead = kTokenTiles < 8;

constexpr int kStripBytes = kStripRows * kSlab * kBits / 8, kUnitBytes = kStripBytes / 2;
constexpr int kWeightBytes = kWarps * kStripBytes;
constexpr int kInputSlabBytes = kTokens * kSlab * 2, kInputBytes = kWarpsK * kInputSlabBytes;
// Scales, each with its zero point where there are any: of a slab of a tile, kGroups times.
constexpr int kGroups = kGrouped ? 4 / kPeriod : 0, kMetaRowBytes = kZeros ? 4 : 2;
constexpr int kMetaGroupBytes = kTileRows * kMetaRowBytes;
constexpr int kMetaSlabBytes = kGroups * kMetaGroupBytes, kMetaBytes = kWarpsK * kMetaSlabBytes;
constexpr int kInputsAt = kWeightBytes, kMetaAt = kInputsAt + kInputBytes;
constexpr int kStageBytes = kMetaAt + kMetaBytes;
// At the end of a tile, sums change hands 8 tokens at a time. Four floats beside each token's rows
// keep the lanes of a warp in different banks.
constexpr int kSumsAt = kStages * kStageBytes, kSumStride = kTileRows + 4;
constexpr int kPassVectors = 8 * kTileRows / 4 / kThreads;  // float4 of a thread

struct Problem {
  const unsigned char *inputs, *weights, *meta;
  const float* row_factors;
  const unsigned char* bias;
  unsigned char* output;
  float4* partials;
  int* flags;
  int M, N, K, input_stride, output_stride, group_shift;
  float zero_step;
  int slabs, strips;  // of the packed weight

  __device__ int group_of(int slab) const { return slab >> group_shift; }
  // A warp's last slab may not exist; what it has summed up before still needs its group's scales.
  __device__ bool has_meta(int slab) const {
    return kPeriod == 4 ? group_of(slab) <= group_of(slabs - 1) : slab < slabs;
  }
};

// Where the running thread stands.
struct Place {
  int thread, lane, warp_n, warp_k;
  int row, pair;  // of a fragment: lane / 4 and lane % 4
  __device__ Place() {
    thread = ptx::thread_index();
    lane = thread % 32;
    const int warp = thread / 32;
    warp_n = warp % kWarpsN;
    warp_k = warp / kWarpsN;
    row = lane / 4;
    pair = lane % 4;
  }
};

// Whether sums are scaled after `slab`: the warp's next slab is of another group, or not its own.
__device__ __forceinline__ bool scales_after(const Problem& p, int slab, bool ends_part) {
  return ends_part || p.group_of(slab) != p.group_of(slab + kWarpsK);
}

__device__ void fetch_weights(const Problem& p, Shared stage, const work::Walk& at, int thread,
                              uint64_t policy) {
  constexpr int kChunks = kWeightBytes / 16, kSlabChunks = kChunks / kWarpsK;
  constexpr int kStripChunks = kStripBytes / 16;
  const int first = at.tile * kWarpsN * kStripChunks;
#pragma unroll
  for (int base = 0; base < kChunks; base += kThreads) {
    const int chunk = base + thread;
    if (kChunks % kThreads != 0 && chunk >= kChunks) break;
    const int slab = at.step * kWarpsK + chunk / kSlabChunks, along = first + chunk % kSlabChunks;
    const bool exists = slab < p.slabs && along < p.strips * kStripChunks;
    const int64_t offset = static_cast<int64_t>(slab) * p.strips * kStripChunks + along;
    ptx::copy_async(stage + chunk * 16, p.weights + (exists ? offset * 16 : 0), exists ? 16 : 0,
                    policy);
  }
}

// Chunks of 8 columns, those of a token's slab in an order of its own: the chunks that ldmatrix
// reads together, one of each of 8 tokens, are in different banks.
__device__ void fetch_inputs(const Problem& p, Shared stage, const work::Walk& at, int thread) {
  constexpr int kChunks = kInputBytes / 16, kSlabChunks = kInputSlabBytes / 16;
#pragma unroll
  for (int base = 0; base < kChunks; base += kThreads) {
    const int chunk = base + thread;
    if (kChunks % kThreads != 0 && chunk >= kChunks) break;
    const int slab = chunk / kSlabChunks, token = chunk % kSlabChunks / 8, column = chunk % 8;
    const int k = (at.step * kWarpsK + slab) * kSlab + column * 8;
    const int left = token < p.M && k < p.K ? work::least(p.K - k, 8) : 0;
    const int64_t offset = static_cast<int64_t>(token) * p.input_stride + k;
    ptx::copy_async(stage + kInputsAt + slab * kInputSlabBytes + token * 128 +
                        (column ^ (token & 7)) * 16,
                    p.inputs + (left > 0 ? offset * 2 : 0), left * 2);
  }
}

__device__ void fetch_meta(const Problem& p, Shared stage, const work::Walk& at, bool ends_part,
                           int thread) {
  constexpr int kChunks = kMetaBytes / 16, kGroupChunks = kMetaGroupBytes / 16;
  const int row_bytes = p.strips * kStripRows * kMetaRowBytes;
#pragma unroll
  for (int base = 0; base < kChunks; base += kThreads) {
    const int chunk = base + thread;
    if (kChunks % kThreads != 0 && chunk >= kChunks) break;
    const int group = chunk / kGroupChunks, column = chunk % kGroupChunks;
    const int slab = at.step * kWarpsK + group / kGroups;
    const int along = at.tile * kMetaGroupBytes + column * 16;
    const bool exists = p.has_meta(slab) && along < row_bytes && scales_after(p, slab, ends_part);
    const int64_t row = kPeriod == 4 ? p.group_of(slab) : slab * kGroups + group % kGroups;
    ptx::copy_async(stage + kMetaAt + chunk * 16, p.meta + (exists ? row * row_bytes + along : 0),
                    exists ? 16 : 0);
  }
}

// A lane's words of one unit. They lie in planes of 4, 2 and 1 words, as many as the width has, so
// that every load is as wide as it can be and no two lanes meet in a bank.
struct Words {
  uint32_t word[kBits];

  __device__ __forceinline__ void load(Shared unit, int lane) {
    int at = 0;
    Shared plane = unit;
#pragma unroll
    for (int quad = 0; quad < kBits / 4; ++quad) {
      const uint4 four = ptx::load_shared<uint4>(plane + lane * 16);
      word[at] = four.x;
      word[at + 1] = four.y;
      word[at + 2] = four.z;
      word[at + 3] = four.w;
      at += 4;
      plane += 32 * 16;
    }
    if constexpr (kBits % 4 >= 2) {
      const uint2 two = ptx::load_shared<uint2>(plane + lane * 8);
      word[at] = two.x;
      word[at + 1] = two.y;
      at += 2;
      plane += 32 * 8;
    }
    if constexpr (kBits % 2 == 1) word[at] = ptx::load_shared<uint32_t>(plane + lane * 4);
  }
};

// What a warp sums up: 16 rows by 8 tokens a time. `group` is since the last scaling.
struct Sums {
  float total[kRows16][kTokenTiles][4];
  float group[kGrouped ? kRows16 : 1][kGrouped ? kTokenTiles : 1][4];
  float inputs[kZeros ? kTokenTiles : 1][4];

  __device__ __forceinline__ void clear() {
    set_zero(total);
    set_zero(group);
    set_zero(inputs);
  }

  template <int a, int b>
  static __device__ __forceinline__ void set_zero(float (&sums)[a][b][4]) {
#pragma unroll
    for (int i = 0; i < a; ++i) set_zero(sums[i]);
  }
  template <int a>
  static __device__ __forceinline__ void set_zero(float (&sums)[a][4]) {
#pragma unroll
    for (int i = 0; i < a; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0.f;
    }
  }

  // 32 rows by 8 tokens by 16 columns.
  __device__ __forceinline__ void add(int tokens, const uint32_t (&a)[kRows16][4],
                                      const uint32_t (&b)[2]) {
#pragma unroll
    for (int rows = 0; rows < kRows16; ++rows) {
      if constexpr (kGrouped) {
        ptx::multiply<Element>(group[rows][tokens], a[rows], b);
      } else {
        ptx::multiply<Element>(total[rows][tokens], a[rows], b);
      }
    }
    if constexpr (kZeros) {
      constexpr uint32_t one = dequantize::twice(dequantize::float_bits<Element>(1, 0));
      const uint32_t ones[4] = {one, one, one, one};
      ptx::multiply<Element>(inputs[tokens], ones, b);
    }
  }

  // total += scale * (group - zero * inputs), and a new group begins. `meta` is of the warp's rows:
  // for each 16 and each of 8, scales of the row and the one 8 below, then their zero points, as
  // they are stored: units of `zero_step` codes. Codes have lost 2^(bits-1) (dequantize.h).
  __device__ __forceinline__ void scale(Shared meta, int row, float zero_step) {
#pragma unroll
    for (int rows = 0; rows < kRows16; ++rows) {
      const Shared at = meta + (rows * 16 + row * 2) * kMetaRowBytes;
      uint32_t scales;
      float zero[2] = {0.f, 0.f};
      if constexpr (kZeros) {
        constexpr float kMiddle = 1 << (kBits - 1);
        const uint2 both = ptx::load_shared<uint2>(at);
        scales = both.x;
        zero[0] = ptx::to_float<ptx::Half>(both.y) * zero_step - kMiddle;
        zero[1] = ptx::to_float<ptx::Half>(both.y >> 16) * zero_step - kMiddle;
      } else {
        scales = ptx::load_shared<uint32_t>(at);
      }
      const float scale[2] = {ptx::to_float<ptx::Half>(scales),
                              ptx::to_float<ptx::Half>(scales >> 16)};
#pragma unroll
      for (int tokens = 0; tokens < kTokenTiles; ++tokens) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float sum = group[rows][tokens][j];
          if constexpr (kZeros) sum -= zero[j / 2] * inputs[tokens][j];
          total[rows][tokens][j] += scale[j / 2] * sum;
        }
      }
    }
    set_zero(group);
    set_zero(inputs);
  }
};

// The right operands of 16 columns and the tokens of tile `tokens` and, if there is one, the next.
// `inputs` is a slab of a stage.
__device__ __forceinline__ void load_inputs(uint32_t (&b)[2][2], Shared inputs, int lane,
                                            int sixteen, int tokens) {
  const int token = tokens * 8 + (kTokenTiles == 1 ? 0 : lane / 16 * 8) + lane % 8;
  const int column = sixteen * 2 + lane / 8 % 2;
  uint32_t r[4];
  ptx::load_matrices(r, inputs + token * 128 + (column ^ (token & 7)) * 16);
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}

// The left operand of 16 rows and 16 columns: pairs `first` .. `first` + 3 of a unit.
template <int first>
__device__ __forceinline__ void load_weights(uint32_t (&a)[4], const Words& words) {
  using Codes = dequantize::Codes<Element, kBits>;
  a[0] = Codes::template pair<first>(words.word);
  a[1] = Codes::template pair<first + 1>(words.word);
  a[2] = Codes::template pair<first + 2>(words.word);
  a[3] = Codes::template pair<first + 3>(words.word);
}

// 32 rows by 16 columns, number `sixteen` of the slab.
template <int sixteen>
__device__ __forceinline__ void multiply_sixteen(Sums& sums, const Words& words, Shared inputs,
                                                 int lane) {
  constexpr int kFirst = sixteen % 2 * 8;
  uint32_t a[kRows16][4];
  load_weights<kFirst>(a[0], words);
  load_weights<kFirst + 4>(a[1], words);
#pragma unroll
  for (int tokens = 0; tokens < kTokenTiles; tokens += 2) {
    uint32_t b[2][2];
    load_inputs(b, inputs, lane, sixteen, tokens);
#pragma unroll
    for (int i = 0; i < (kTokenTiles == 1 ? 1 : 2); ++i) sums.add(tokens + i, a, b[i]);
  }
}

// A unit: 32 rows by 32 columns, `half` 0 or 1 of the slab. `meta` is the warp's rows of the slab's
// first group.
template <int half>
__device__ __forceinline__ void multiply_unit(Sums& sums, const Words& words, Shared inputs,
                                              Shared meta, const Place& place, float zero_step) {
  const Shared group = meta + half * (kGroups / 2) * kMetaGroupBytes;
  multiply_sixteen<2 * half>(sums, words, inputs, place.lane);
  if constexpr (kPeriod == 1) sums.scale(group, place.row, zero_step);
  multiply_sixteen<2 * half + 1>(sums, words, inputs, place.lane);
  if constexpr (kPeriod == 1) sums.scale(group + kMetaGroupBytes, place.row, zero_step);
  if constexpr (kPeriod == 2) sums.scale(group, place.row, zero_step);
}

// Puts the sums of 8 tokens through shared memory, where warps that share rows add up: afterwards a
// thread has four rows of one token in each of its vectors.
__device__ void exchange(float4 (&own)[kPassVectors], const Sums& sums, int tokens, Shared memory,
                         const Place& place) {
#pragma unroll
  for (int turn = 0; turn < kWarpsK; ++turn) {
    if (place.warp_k == turn) {
#pragma unroll
      for (int i = 0; i < kRows16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = place.pair * 2 + j % 2;
          const int row = place.warp_n * kStripRows + i * 16 + place.row + j / 2 * 8;
          const Shared at = memory + (token * kSumStride + row) * 4;
          float sum = sums.total[i][tokens][j];
          if (turn > 0) sum += ptx::load_shared<float>(at);
          ptx::store_shared(at, sum);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < kPassVectors; ++v) {
    const int at = (v * kThreads + place.thread) * 4;
    const int token = at / kTileRows, row = at % kTileRows;
    own[v] = ptx::load_shared<float4>(memory + (token * kSumStride + row) * 4);
  }
  __syncthreads();
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The finished sums of rows n .. n+3 of one token, to the output.
__device__ void store(const Problem& p, int token, int n, float4 sums) {
  if (token >= p.M || n >= p.N) return;
  const float4 factors = ptx::load_global<float4>(p.row_factors + n);
  float value[4] = {sums.x * factors.x, sums.y * factors.y, sums.z * factors.z, sums.w * factors.w};
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i >= p.N) continue;
      value[i] += ptx::to_float<Element>(ptx::load_global<uint16_t>(p.bias + (n + i) * 2));
    }
  }
  const uint32_t pairs[2] = {ptx::to_pair<Element>(value[0], value[1]),
                             ptx::to_pair<Element>(value[2], value[3])};
  unsigned char* to = p.output + (static_cast<int64_t>(token) * p.output_stride + n) * 2;
  if (n + 4 <= p.N && p.output_stride % 4 == 0) {
    ptx::store_global<uint2>(to, {pairs[0], pairs[1]});
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i < p.N) {
      ptx::store_global(to + 2 * i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
    }
  }
}

// The end of a block's part of a tile. `at` is its last step there, `first` its first one.
__device__ void finish(const Problem& p, const work::Plan& plan, const work::Walk& at, int first,
                       const Sums& sums, Shared memory) {
  const Place place;
  constexpr int kSlot = kTokenTiles * kPassVectors * kThreads;  // float4 of a block's partial sums
  const int run = plan.runs - 1 - static_cast<int>(blockIdx.x);
  const bool owner = first == 0;
  // Who else has steps of an owned tile: the runs after this one that begin before its end.
  int others_end = run + 1;
  if (owner && at.step + 1 < plan.steps) {
    const int tile_end = (at.tile - plan.first_shared_tile() + 1) * plan.steps;
    while (others_end < plan.runs && plan.begin(others_end) < tile_end) ++others_end;
    if (place.thread == 0) {
#pragma unroll 1
      for (int other = run + 1; other < others_end; ++other) {
        while (ptx::load_acquire(p.flags + other) == 0) {
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int tokens = 0; tokens < kTokenTiles; ++tokens) {
    float4 own[kPassVectors];
    exchange(own, sums, tokens, memory + kSumsAt, place);
#pragma unroll
    for (int v = 0; v < kPassVectors; ++v) {
      const int in_slot = (tokens * kPassVectors + v) * kThreads + place.thread;
      if (!owner) {
        ptx::store_global(p.partials + run * kSlot + in_slot, own[v]);
        continue;
      }
#pragma unroll 1
      for (int other = run + 1; other < others_end; ++other) {
        const float4* from = p.partials + other * kSlot + in_slot;
        own[v] = sum_of(own[v], ptx::load_global_from_l2<float4>(from));
      }
      const int element = (v * kThreads + place.thread) * 4;
      store(p, tokens * 8 + element / kTileRows, at.tile * kTileRows + element % kTileRows,
            own[v]);
    }
  }
  if (!owner) {
    __syncthreads();
    if (place.thread == 0) ptx::store_release(p.flags + run, 1);
  } else if (place.thread == 0) {
    // Flags are zero again for the next launch.
#pragma unroll 1
    for (int other = run + 1; other < others_end; ++other) ptx::store_release(p.flags + other, 0);
  }
}

// One block's steps, with the ring in shared memory.
struct Ring {
  const Problem& p;
  const work::Plan& plan;
  Shared memory;
  Place place;
  uint64_t policy;
  work::Walk ahead;
  int slot_ahead = 0;

  __device__ Ring(const Problem& p, const work::Plan& plan)
      : p(p), plan(plan), memory(ptx::shared_memory()), policy(ptx::evict_first()),
        ahead(plan, static_cast<int>(blockIdx.x)) {}

  // The next step's copies; without one, an empty group, so that counting groups goes on.
  __device__ void fetch() {
    if (ahead.left > 0) {
      const int thread = kAhead ? place.thread : ptx::thread_index();
      const Shared stage = memory + slot_ahead * kStageBytes;
      fetch_weights(p, stage, ahead, thread, policy);
      fetch_inputs(p, stage, ahead, thread);
      if constexpr (kGrouped) fetch_meta(p, stage, ahead, ahead.ends_part(plan), thread);
      ahead.advance(plan, static_cast<int>(blockIdx.x));
    }
    ptx::commit_copies();
    slot_ahead = slot_ahead + 1 == kStages ? 0 : slot_ahead + 1;
  }

  __device__ Shared strip(Shared stage) const {
    return stage + (place.warp_k * kWarpsN + place.warp_n) * kStripBytes;
  }
};

__device__ void run(const Problem& p, const work::Plan& plan) {
  Ring ring(p, plan);
  work::Walk at(plan, static_cast<int>(blockIdx.x));
  if (at.left == 0) return;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) ring.fetch();
  ptx::wait_copies<kStages - 2>();
  __syncthreads();
  Sums sums;
  sums.clear();
  Words words[2];
  Shared stage = ring.memory;
  words[0].load(ring.strip(stage), ring.place.lane);
  int slot = 0, first = at.step;
  while (true) {
    const Place place = kAhead ? ring.place : Place();
    const Shared inputs = stage + kInputsAt + place.warp_k * kInputSlabBytes;
    const Shared meta = stage + kMetaAt + place.warp_k * kMetaSlabBytes +
                        place.warp_n * kStripRows * kMetaRowBytes;
    if (kAhead) words[1].load(ring.strip(stage) + kUnitBytes, place.lane);
    multiply_unit<0>(sums, words[0], inputs, meta, place, p.zero_step);
    if (!kAhead) words[1].load(ring.strip(stage) + kUnitBytes, place.lane);
    // In the middle of a step: the next stage has arrived, and nobody reads the former any more.
    ptx::wait_copies<kStages - 3>();
    __syncthreads();
    ring.fetch();
    slot = slot + 1 == kStages ? 0 : slot + 1;
    const Shared next = ring.memory + slot * kStageBytes;
    if (kAhead && at.left > 1) words[0].load(ring.strip(next), place.lane);
    multiply_unit<1>(sums, words[1], inputs, meta, place, p.zero_step);
    const bool ends_part = at.ends_part(plan);
    if constexpr (kPeriod == 4) {
      const int slab = at.step * kWarpsK + place.warp_k;
      if (scales_after(p, slab, ends_part)) sums.scale(meta, place.row, p.zero_step);
    }
    if (ends_part) {
      finish(p, plan, at, first, sums, ring.memory);
      sums.clear();
    }
    if (at.left == 1) break;
    if (!kAhead) words[0].load(ring.strip(next), place.lane);
    at.advance(plan, static_cast<int>(blockIdx.x));
    if (ends_part) first = at.step;
    stage = next;
  }
  ptx::wait_copies<0>();
}

}  // namespace

// inputs [M, input_stride >= K] and output [M, output_stride >= N] of Element, each row of the
// inputs at a multiple of 16 bytes, the output at one of 8; row_factors [N padded to strips]; bias
// [N] of Element or null; partials and flags as decode.py says, flags zero before the first launch
// and after each.
extern "C" __global__ void __launch_bounds__(kThreads, QL_BLOCKS_PER_SM)
    decode_gemm(const unsigned char* __restrict__ inputs, const unsigned char* __restrict__ weights,
                const unsigned char* __restrict__ meta, const float* __restrict__ row_factors,
                const unsigned char* __restrict__ bias, unsigned char* __restrict__ output,
                float4* partials, int* flags, int M, int N, int K, int input_stride,
                int output_stride, int group_shift, float zero_step) {
  const int slabs = (K + kSlab - 1) / kSlab, strips = (N + kStripRows - 1) / kStripRows;
  const Problem problem{inputs, weights, meta, row_factors, bias, output, partials, flags, M, N, K,
                        input_stride, output_stride, group_shift, zero_step, slabs, strips};
  const work::Plan plan((strips + kWarpsN - 1) / kWarpsN, (slabs + kWarpsK - 1) / kWarpsK,
                        static_cast<int>(gridDim.x));
  run(problem, plan);
}

QL_KERNEL(decode_gemm)
