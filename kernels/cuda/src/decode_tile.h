// What a block of kernel (a) has of a tile: sizes, words in registers, sums, and how they are
// multiplied and scaled. decode_gemm.cu says what it is for.
#pragma once

#include "dequantize.h"
#include "element.h"
#include "finish.h"

namespace tile {

constexpr int kBits = QL_BITS, kTokenTiles = QL_TOKEN_TILES, kStages = QL_STAGES;
constexpr int kPeriod = QL_PERIOD;
constexpr bool kGrouped = kPeriod > 0, kZeros = QL_ZEROS, kSparse = QL_SPARSE;
static_assert(kBits >= 2 && kBits <= 8 && kStages >= 3 && (kGrouped || !kZeros), "see the kernel");
static_assert(!kSparse || !kZeros, "what is left out is 0");

constexpr int kThreads = 256, kWarps = 8;
constexpr int kStripRows = 32, kSlab = 64;  // rows of a warp, columns of codes in a step of it
constexpr int kDepth = kSparse ? 2 : 1;     // columns of the inputs for each of the codes
constexpr int kWarpsK = kTokenTiles <= 2 ? 2 : 1, kWarpsN = kWarps / kWarpsK;
constexpr int kTileRows = kWarpsN * kStripRows;
constexpr int kTokens = 8 * kTokenTiles;
constexpr int kRows16 = kStripRows / 16;
// Whether there are registers for more than sums: to load a unit's words before the one before it
// is multiplied, and to keep what follows from the thread's number. With 64 tokens there are none,
// but products take longer than all that.
constexpr bool kAhead = kTokenTiles < 8;
// Whether one ldmatrix brings 32 columns of 8 tokens, four registers side by side as mma.sp wants
// them, or 16 columns of 16 tokens.
constexpr bool kLong = kTokenTiles == 1 || kSparse;

// A lane's words of a unit: codes and, of a sparse weight, the places of its columns.
constexpr int kPlaceWords = kSparse ? 2 : 0, kWords = kBits + kPlaceWords;
constexpr int kUnitBytes = 32 * 4 * kWords, kStripBytes = 2 * kUnitBytes;
constexpr int kWeightBytes = kWarps * kStripBytes;
// Inputs lie in slabs of 64 columns, a sparse weight's step has two for each warp along K.
constexpr int kInputSlabs = kWarpsK * kDepth;
constexpr int kInputSlabBytes = kTokens * kSlab * 2, kInputBytes = kInputSlabs * kInputSlabBytes;
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
  finish::Output out;
  int M, K, input_stride, group_shift;
  float zero_step;
  int slabs, strips;  // of the packed weight

  __device__ int group_of(int slab) const { return slab >> group_shift; }
  // A warp's last slab may not exist; what it has summed up before still needs its group's scales.
  __device__ bool has_meta(int slab) const {
    return kPeriod == 4 ? group_of(slab) <= group_of(slabs - 1) : slab < slabs;
  }
  // Whether sums are scaled after `slab`: the warp's next slab is of another group, or not its own.
  __device__ bool scales_after(int slab, bool ends_part) const {
    return ends_part || group_of(slab) != group_of(slab + kWarpsK);
  }
};

// Where the running thread stands, and its places in every stage.
struct Place {
  int thread, lane, warp_n, warp_k;
  int row, pair;        // of a fragment: lane / 4 and lane % 4
  Shared strip;         // the warp's words
  Shared inputs, meta;  // the lane's row of ldmatrix for the first columns; the lane's scales

  __device__ Place() {
    thread = ptx::thread_index();
    lane = thread % 32;
    const int warp = thread / 32;
    warp_n = warp % kWarpsN;
    warp_k = warp / kWarpsN;
    row = lane / 4;
    pair = lane % 4;
    strip = warp * kStripBytes;
    const int token = (kLong ? 0 : lane / 16 * 8) + lane % 8;
    const int column = kLong ? lane / 8 : lane / 8 % 2;
    inputs = kInputsAt + warp_k * (kDepth * kInputSlabBytes) + token * 128 +
             swizzled(token, column) * 16;
    meta = kMetaAt + warp_k * kMetaSlabBytes + (warp_n * kStripRows + row * 2) * kMetaRowBytes;
  }

  // Where chunk `column` (of 8 columns) of a token's slab lies: the chunks that ldmatrix reads
  // together, one of each of 8 tokens, are in different banks.
  static __device__ __forceinline__ int swizzled(int token, int column) {
    return column ^ (token & 7);
  }
};

// A lane's words of one unit. They lie in planes of 4, 2 and 1 words, as many as there are, so that
// every load is as wide as it can be and no two lanes meet in a bank.
struct Words {
  uint32_t word[kBits];              // codes
  uint32_t places[kSparse ? 2 : 1];  // of 16 columns of codes each; of dense weights unused

  __device__ __forceinline__ void set(int index, uint32_t value) {
    if (index < kBits) {
      word[index] = value;
    } else {
      places[index - kBits] = value;
    }
  }

  __device__ __forceinline__ void load(Shared unit, int lane) {
    int at = 0;
    Shared plane = unit;
#pragma unroll
    for (int quad = 0; quad < kWords / 4; ++quad) {
      const uint4 four = ptx::load_shared<uint4>(plane + lane * 16);
      set(at, four.x);
      set(at + 1, four.y);
      set(at + 2, four.z);
      set(at + 3, four.w);
      at += 4;
      plane += 32 * 16;
    }
    if constexpr (kWords % 4 >= 2) {
      const uint2 two = ptx::load_shared<uint2>(plane + lane * 8);
      set(at, two.x);
      set(at + 1, two.y);
      at += 2;
      plane += 32 * 8;
    }
    if constexpr (kWords % 2 == 1) set(at, ptx::load_shared<uint32_t>(plane + lane * 4));
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

  // Of 16 rows and 8 tokens, since the last scaling.
  __device__ __forceinline__ float (&of(int rows, int tokens))[4] {
    if constexpr (kGrouped) return group[rows][tokens];
    return total[rows][tokens];
  }

  // 32 rows by 8 tokens by 16 columns.
  __device__ __forceinline__ void add(int tokens, const uint32_t (&a)[kRows16][4],
                                      const uint32_t (&b)[2]) {
#pragma unroll
    for (int rows = 0; rows < kRows16; ++rows) {
      ptx::multiply<Element>(of(rows, tokens), a[rows], b);
    }
    if constexpr (kZeros) {
      constexpr uint32_t one = dequantize::twice(dequantize::float_bits<Element>(1, 0));
      const uint32_t ones[4] = {one, one, one, one};
      ptx::multiply<Element>(inputs[tokens], ones, b);
    }
  }

  // The same by 32 columns, of which 16 are kept. Lanes 0 and 1 of every four have the places of
  // the first 16 rows, the others those of the second.
  __device__ __forceinline__ void add_kept(int tokens, const uint32_t (&a)[kRows16][4],
                                           uint32_t places, const uint32_t (&b)[4]) {
    static_assert(kRows16 == 2, "two pairs of lanes");
    ptx::multiply_sparse<Element, 0>(of(0, tokens), a[0], b, places);
    ptx::multiply_sparse<Element, 1>(of(1, tokens), a[1], b, places);
  }

  // total += scale * (group - zero * inputs), and a new group begins. `meta` is of the lane's rows:
  // for each 16, scales of the row and the one 8 below, then their zero points, as they are stored:
  // units of `zero_step` codes. Codes have lost 2^(bits-1) (dequantize.h).
  __device__ __forceinline__ void scale(Shared meta, float zero_step) {
#pragma unroll
    for (int rows = 0; rows < kRows16; ++rows) {
      const Shared at = meta + rows * 16 * kMetaRowBytes;
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

// The right operands of columns `first` on, of a slab of inputs, as many as an ldmatrix brings
// (kLong), and of the tokens of tile `tokens` and, of 16 columns, the next. `inputs` is the lane's
// row for the first columns, in a stage: chunks of 16 bytes are swizzled within 128, to which
// stages are aligned, so other columns are an exclusive or away.
__device__ __forceinline__ void load_inputs(uint32_t (&r)[4], Shared inputs, int first,
                                            int tokens) {
  ptx::load_matrices(r, (inputs ^ (first * 2)) + tokens * 8 * 128);
}
static_assert(kStageBytes % 128 == 0 && kInputsAt % 128 == 0, "see above");

// The left operand of 16 rows and 16 columns: pairs `first` .. `first` + 3 of a unit.
template <int first>
__device__ __forceinline__ void load_weights(uint32_t (&a)[4], const Words& words) {
  using Codes = dequantize::Codes<Element, kBits>;
  a[0] = Codes::template pair<first>(words.word);
  a[1] = Codes::template pair<first + 1>(words.word);
  a[2] = Codes::template pair<first + 2>(words.word);
  a[3] = Codes::template pair<first + 3>(words.word);
}

// 32 rows by 16 columns, number `sixteen` of the slab. `all` is their half of it, of 8 tokens.
template <int sixteen>
__device__ __forceinline__ void multiply_sixteen(Sums& sums, const Words& words, Shared inputs,
                                                 const uint32_t (&all)[4]) {
  constexpr int kSide = sixteen % 2;
  uint32_t a[kRows16][4];
  load_weights<kSide * 8>(a[0], words);
  load_weights<kSide * 8 + 4>(a[1], words);
  if constexpr (kTokenTiles == 1) {
    const uint32_t b[2] = {all[2 * kSide], all[2 * kSide + 1]};
    sums.add(0, a, b);
  } else {
#pragma unroll
    for (int tokens = 0; tokens < kTokenTiles; tokens += 2) {
      uint32_t r[4];
      load_inputs(r, inputs, sixteen * 16, tokens);
      const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
      sums.add(tokens, a, b[0]);
      sums.add(tokens + 1, a, b[1]);
    }
  }
}

// 32 rows by 16 columns of codes, number `side` of a unit, which are 32 of a slab of inputs.
template <int side>
__device__ __forceinline__ void multiply_kept(Sums& sums, const Words& words, Shared inputs) {
  uint32_t a[kRows16][4];
  load_weights<side * 8>(a[0], words);
  load_weights<side * 8 + 4>(a[1], words);
#pragma unroll
  for (int tokens = 0; tokens < kTokenTiles; ++tokens) {
    uint32_t b[4];
    load_inputs(b, inputs, side * 32, tokens);
    sums.add_kept(tokens, a, words.places[kSparse ? side : 0], b);
  }
}

// A unit: 32 rows by 32 columns of codes, `half` 0 or 1 of the slab.
template <int half>
__device__ __forceinline__ void multiply_unit(Sums& sums, const Words& words, Shared stage,
                                              const Place& place, float zero_step) {
  const Shared inputs = stage + place.inputs + (kSparse ? half * kInputSlabBytes : 0);
  const Shared group = stage + place.meta + half * (kGroups / 2) * kMetaGroupBytes;
  uint32_t all[4] = {};
  if constexpr (kTokenTiles == 1 && !kSparse) load_inputs(all, inputs, half * 32, 0);
  if constexpr (kSparse) {
    multiply_kept<0>(sums, words, inputs);
  } else {
    multiply_sixteen<2 * half>(sums, words, inputs, all);
  }
  if constexpr (kPeriod == 1) sums.scale(group, zero_step);
  if constexpr (kSparse) {
    multiply_kept<1>(sums, words, inputs);
  } else {
    multiply_sixteen<2 * half + 1>(sums, words, inputs, all);
  }
  if constexpr (kPeriod == 1) sums.scale(group + kMetaGroupBytes, zero_step);
  if constexpr (kPeriod == 2) sums.scale(group, zero_step);
}

}  // namespace tile
