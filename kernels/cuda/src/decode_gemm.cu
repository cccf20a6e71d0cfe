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
#include "finish.h"
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
  int M, N, K, input_stride, output_stride, group_shift;
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
  Shared inputs, meta;  // the lane's row of ldmatrix for the first 16 columns; the lane's scales

  __device__ Place() {
    thread = ptx::thread_index();
    lane = thread % 32;
    const int warp = thread / 32;
    warp_n = warp % kWarpsN;
    warp_k = warp / kWarpsN;
    row = lane / 4;
    pair = lane % 4;
    strip = warp * kStripBytes;
    const int token = (kTokenTiles == 1 ? 0 : lane / 16 * 8) + lane % 8;
    inputs = kInputsAt + warp_k * kInputSlabBytes + token * 128 +
             swizzled(token, lane / 8 % 2) * 16;
    meta = kMetaAt + warp_k * kMetaSlabBytes + (warp_n * kStripRows + row * 2) * kMetaRowBytes;
  }

  // Where chunk `column` (of 8 columns) of a token's slab lies: the chunks that ldmatrix reads
  // together, one of each of 8 tokens, are in different banks.
  static __device__ __forceinline__ int swizzled(int token, int column) {
    return column ^ (token & 7);
  }
};

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

// The right operands of 16 columns and the tokens of tile `tokens` and, if there is one, the next.
// `inputs` is the lane's row for the first 16 columns, in a stage: chunks of 16 bytes are swizzled
// within 128, to which stages are aligned, so other columns are an exclusive or away.
__device__ __forceinline__ void load_inputs(uint32_t (&b)[2][2], Shared inputs, int sixteen,
                                            int tokens) {
  uint32_t r[4];
  ptx::load_matrices(r, (inputs ^ (sixteen * 32)) + tokens * 8 * 128);
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
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

// 32 rows by 16 columns, number `sixteen` of the slab.
template <int sixteen>
__device__ __forceinline__ void multiply_sixteen(Sums& sums, const Words& words, Shared inputs) {
  constexpr int kFirst = sixteen % 2 * 8;
  uint32_t a[kRows16][4];
  load_weights<kFirst>(a[0], words);
  load_weights<kFirst + 4>(a[1], words);
#pragma unroll
  for (int tokens = 0; tokens < kTokenTiles; tokens += 2) {
    uint32_t b[2][2];
    load_inputs(b, inputs, sixteen, tokens);
#pragma unroll
    for (int i = 0; i < (kTokenTiles == 1 ? 1 : 2); ++i) sums.add(tokens + i, a, b[i]);
  }
}

// A unit: 32 rows by 32 columns, `half` 0 or 1 of the slab.
template <int half>
__device__ __forceinline__ void multiply_unit(Sums& sums, const Words& words, Shared stage,
                                              const Place& place, float zero_step) {
  const Shared inputs = stage + place.inputs;
  const Shared group = stage + place.meta + half * (kGroups / 2) * kMetaGroupBytes;
  multiply_sixteen<2 * half>(sums, words, inputs);
  if constexpr (kPeriod == 1) sums.scale(group, zero_step);
  multiply_sixteen<2 * half + 1>(sums, words, inputs);
  if constexpr (kPeriod == 1) sums.scale(group + kMetaGroupBytes, zero_step);
  if constexpr (kPeriod == 2) sums.scale(group, zero_step);
}

// A finished tile, for finish.h.
struct Tile {
  static constexpr int kThreads = ::kThreads, kPasses = kTokenTiles;
  static constexpr int kVectors = kPassVectors;

  const Problem& p;
  const Sums& sums;
  Shared memory;
  int number;

  // Puts the sums of 8 tokens through shared memory, where warps that share rows add up: afterwards
  // a thread has four rows of one token in each of its vectors.
  __device__ __forceinline__ void gather(float4 (&own)[kVectors], int tokens) const {
    const Place place;
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
    for (int v = 0; v < kVectors; ++v) {
      const int at = (v * kThreads + place.thread) * 4;
      const int token = at / kTileRows, row = at % kTileRows;
      own[v] = ptx::load_shared<float4>(memory + (token * kSumStride + row) * 4);
    }
    __syncthreads();
  }

  // The finished sums of rows n .. n+3 of one token, to the output.
  __device__ __forceinline__ void store(int pass, int vector, float4 four) const {
    const int at = (vector * kThreads + ptx::thread_index()) * 4;
    const int token = pass * 8 + at / kTileRows, n = number * kTileRows + at % kTileRows;
    if (token >= p.M || n >= p.N) return;
    const float4 factors = ptx::load_global<float4>(p.row_factors + n);
    float value[4] = {four.x * factors.x, four.y * factors.y, four.z * factors.z,
                      four.w * factors.w};
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i >= p.N) continue;
        value[i] += ptx::to_float<Element>(ptx::load_global<uint16_t>(p.bias + (n + i) * 2));
      }
    }
    unsigned char* to = p.output + (static_cast<int64_t>(token) * p.output_stride + n) * 2;
    finish::store_rows<Element>(to, n, p.N, p.output_stride % 4 == 0, value);
  }
};

// Copies of steps into the ring. Addresses run on from step to step: what depends on the thread
// alone is computed once, what depends on the tile where a block's part of it begins.
struct Ring {
  static constexpr int kStripChunks = kStripBytes / 16, kSlabChunks = kWarpsN * kStripChunks;
  static constexpr int kWeightChunks = kWeightBytes / 16, kInputChunks = kInputBytes / 16;
  static constexpr int kWeightCopies = (kWeightChunks + kThreads - 1) / kThreads;
  static constexpr int kInputCopies = (kInputChunks + kThreads - 1) / kThreads;
  static constexpr int kStepBytes = kWarpsK * kSlab * 2;  // of a token

  const Problem& p;
  const work::Plan& plan;
  Shared memory;
  uint64_t policy;
  work::Walk ahead;       // where the next step's part begins
  int step = 0, end = 0;  // the next step, and the end of its part
  int slot = 0;
  // Of the next step: its first slab, and what the thread's first copy brings of a token.
  const unsigned char *weights = nullptr, *inputs = nullptr;
  int input_bytes = 0;       // from there to the end of the token; none for tokens that are not
  int along[kWeightCopies];  // of the thread's copies, in their slabs

  __device__ Ring(const Problem& p, const work::Plan& plan)
      : p(p), plan(plan), memory(ptx::shared_memory()), policy(ptx::evict_first()),
        ahead(plan, static_cast<int>(blockIdx.x)) {
    enter_part();
  }

  __device__ __forceinline__ int slab_bytes() const { return p.strips * kStripBytes; }

  __device__ __forceinline__ void enter_part() {
    const int thread = ptx::thread_index();
    step = ahead.step;
    end = step + ahead.part_steps(plan);
    weights = p.weights + static_cast<int64_t>(step * kWarpsK) * slab_bytes();
    const int k = step * kWarpsK * kSlab + thread / (kInputSlabBytes / 16) * kSlab + thread % 8 * 8;
    const int token = thread / 8 % kTokens;
    inputs = p.inputs + (static_cast<int64_t>(token) * p.input_stride + k) * 2;
    input_bytes = token < p.M || kInputCopies > 1 ? (p.K - k) * 2 : 0;
    // Strips beyond the last have nothing to say: the last is read in their place.
    const int last = p.strips - 1;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int chunk = (i * kThreads + thread) % kSlabChunks;
      const int strip = work::least(ahead.tile * kWarpsN + chunk / kStripChunks, last);
      along[i] = strip * kStripBytes + chunk % kStripChunks * 16;
    }
  }

  __device__ __forceinline__ void fetch_weights(Shared to, int thread) {
    // In place of a slab beyond the last, whose inputs are zeros, the one before it is read.
    const unsigned char* second =
        kWarpsK == 2 && step * 2 + 1 < p.slabs ? weights + slab_bytes() : weights;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int base = i * kThreads, chunk = base + thread;
      if (kWeightChunks % kThreads != 0 && chunk >= kWeightChunks) break;
      const bool is_second = kSlabChunks % kThreads == 0 ? base >= kSlabChunks
                                                         : chunk >= kSlabChunks;
      ptx::copy_async(to + base * 16, (is_second ? second : weights) + along[i], 16, policy);
    }
    weights += static_cast<int64_t>(kWarpsK) * slab_bytes();
  }

  __device__ __forceinline__ void fetch_inputs(Shared to, int thread) {
#pragma unroll
    for (int i = 0; i < kInputCopies; ++i) {
      const int base = i * kThreads;
      if (kInputChunks % kThreads != 0 && base + thread >= kInputChunks) break;
      int bytes = work::least(input_bytes, 16);
      if (kInputCopies > 1 && base / 8 + thread / 8 >= p.M) bytes = 0;
      ptx::copy_async(to + base * 16, inputs + static_cast<int64_t>(base / 8) * p.input_stride * 2,
                      bytes > 0 ? bytes : 0);
    }
    inputs += kStepBytes;
    input_bytes -= kStepBytes;
  }
  static_assert(kInputCopies == 1 || kWarpsK == 1, "later copies are of the same slab");

  __device__ __forceinline__ void fetch_meta(Shared stage, int thread) const {
    constexpr int kChunks = kMetaBytes / 16, kGroupChunks = kMetaGroupBytes / 16;
    const int row_bytes = p.strips * kStripRows * kMetaRowBytes;
#pragma unroll
    for (int base = 0; base < kChunks; base += kThreads) {
      const int chunk = base + thread;
      if (kChunks % kThreads != 0 && chunk >= kChunks) break;
      const int group = chunk / kGroupChunks, column = chunk % kGroupChunks;
      const int slab = step * kWarpsK + group / kGroups;
      const int along = ahead.tile * kMetaGroupBytes + column * 16;
      const bool exists = p.has_meta(slab) && along < row_bytes;
      if (kPeriod == 4 && !p.scales_after(slab, step + 1 == end)) continue;
      const int row = kPeriod == 4 ? p.group_of(slab) : slab * kGroups + group % kGroups;
      ptx::copy_async(stage + kMetaAt + chunk * 16,
                      p.meta + (static_cast<int64_t>(row) * row_bytes + along), exists ? 16 : 0);
    }
  }

  // The next step's copies; without one, an empty group, so that counting groups goes on.
  __device__ __forceinline__ void fetch() {
    if (step < end) {
      const int thread = ptx::thread_index();
      const Shared stage = memory + slot * kStageBytes;
      fetch_weights(stage + thread * 16, thread);
      // Copies of the inputs lie as their chunks are numbered, but for the order within a token.
      fetch_inputs(stage + kInputsAt + (thread ^ (thread / 8 & 7)) * 16, thread);
      if constexpr (kGrouped) fetch_meta(stage, thread);
      ++step;
      if (step == end) {
        ahead.skip(end - ahead.step - 1);
        ahead.advance(plan, static_cast<int>(blockIdx.x));
        if (ahead.left > 0) enter_part();
      }
    }
    ptx::commit_copies();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
};

// A block's way through its steps, part of a tile by part.
struct Walker {
  const Problem& p;
  const work::Plan& plan;
  Ring ring;
  Place first_place;
  work::Walk at;          // where the part begins
  int step = 0, end = 0;  // in it, and its end
  int slot = 0;           // of the step
  Sums sums;
  Words words[2];

  __device__ Walker(const Problem& p, const work::Plan& plan)
      : p(p), plan(plan), ring(p, plan), at(plan, static_cast<int>(blockIdx.x)) {}

  // Computed anew where there are no registers to keep it in.
  __device__ __forceinline__ Place place() const { return kAhead ? first_place : Place(); }

  __device__ __forceinline__ Shared stage() const { return ring.memory + slot * kStageBytes; }

  __device__ __forceinline__ void do_step() {
    const Place place = this->place();
    const Shared stage = this->stage();
    const Shared strip = stage + place.strip;
    if (kAhead) words[1].load(strip + kUnitBytes, place.lane);
    multiply_unit<0>(sums, words[0], stage, place, p.zero_step);
    if (!kAhead) words[1].load(strip + kUnitBytes, place.lane);
    // In the middle of a step: the next stage has arrived, and nobody reads the former any more.
    ptx::wait_copies<kStages - 3>();
    __syncthreads();
    ring.fetch();
    slot = slot + 1 == kStages ? 0 : slot + 1;
    const bool ends_part = step + 1 == end;
    const bool more = !ends_part || at.left > end - at.step;
    if (kAhead && more) words[0].load(this->stage() + place.strip, place.lane);
    multiply_unit<1>(sums, words[1], stage, place, p.zero_step);
    if constexpr (kPeriod == 4) {
      if (p.scales_after(step * kWarpsK + place.warp_k, ends_part)) {
        sums.scale(stage + place.meta, p.zero_step);
      }
    }
    if (!kAhead && more) words[0].load(this->stage() + place.strip, place.lane);
    ++step;
  }

  __device__ void run(float4* partials, int* flags) {
    if (at.left == 0) return;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) ring.fetch();
    ptx::wait_copies<kStages - 2>();
    __syncthreads();
    words[0].load(stage() + first_place.strip, first_place.lane);
#pragma unroll 1
    while (at.left > 0) {
      sums.clear();
      step = at.step;
      end = step + at.part_steps(plan);
#pragma unroll 1
      do {
        do_step();
      } while (step < end);
      const int first = at.step;
      at.skip(end - first - 1);
      finish::part(Tile{p, sums, ring.memory + kSumsAt, at.tile}, plan, at, first, partials, flags);
      at.advance(plan, static_cast<int>(blockIdx.x));
    }
    ptx::wait_copies<0>();
  }
};

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
  const Problem problem{inputs, weights, meta, row_factors, bias, output, M, N, K,
                        input_stride, output_stride, group_shift, zero_step, slabs, strips};
  const work::Plan plan((strips + kWarpsN - 1) / kWarpsN, (slabs + kWarpsK - 1) / kWarpsK,
                        static_cast<int>(gridDim.x));
  Walker(problem, plan).run(partials, flags);
}

QL_KERNEL(decode_gemm)
