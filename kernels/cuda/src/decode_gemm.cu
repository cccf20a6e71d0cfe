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
// Of a sparse weight (QL_SPARSE) two of every four columns are kept: K counts all of them, codes
// and groups only the kept ones, so a step of 64 columns of codes has 128 of inputs. Its words come
// with the places of the kept columns, which mma.sp takes beside them.
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
//   QL_ZEROS   0, 1 (with a period, of dense weights)
//   QL_SPARSE  0, 1
//   QL_BLOCKS_PER_SM  what registers are limited for
//
// Layouts are in kernels/cuda/layout.py, sizes and arguments in kernels/cuda/decode.py.
#include "decode_tile.h"
#include "element.h"
#include "finish.h"
#include "work.h"

namespace {

using namespace tile;

// A finished tile, for finish.h.
struct Tile {
  static constexpr int kThreads = tile::kThreads, kPasses = kTokenTiles;
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
    if (token >= p.M || n >= p.out.N) return;
    const float4 factors = ptx::load_global<float4>(p.row_factors + n);
    p.out.store<Element>(token, n, {four.x * factors.x, four.y * factors.y, four.z * factors.z,
                                    four.w * factors.w});
  }
};

// Copies of steps into the ring. Addresses run on from step to step: what depends on the thread
// alone is computed once, what depends on the tile where a block's part of it begins.
struct Ring {
  static constexpr int kStripChunks = kStripBytes / 16, kSlabChunks = kWarpsN * kStripChunks;
  static constexpr int kWeightChunks = kWeightBytes / 16, kInputChunks = kInputBytes / 16;
  static constexpr int kWeightCopies = (kWeightChunks + kThreads - 1) / kThreads;
  static constexpr int kInputCopies = (kInputChunks + kThreads - 1) / kThreads;
  static constexpr int kInputSlabChunks = kInputSlabBytes / 16;
  static constexpr int kStepColumns = kInputSlabs * kSlab;  // of the inputs
  // A thread's later copies are of later slabs, and of later tokens where a slab has more than one.
  static constexpr bool kManyTokens = kInputSlabChunks > kThreads;

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
    const int k = step * kStepColumns + thread / kInputSlabChunks * kSlab + thread % 8 * 8;
    const int token = thread / 8 % kTokens;
    inputs = p.inputs + (static_cast<int64_t>(token) * p.input_stride + k) * 2;
    input_bytes = token < p.M || kManyTokens ? (p.K - k) * 2 : 0;
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
      const int base = i * kThreads, slab = base / kInputSlabChunks;
      const int later = base % kInputSlabChunks / 8;  // tokens
      if (kInputChunks % kThreads != 0 && base + thread >= kInputChunks) break;
      int bytes = work::least(input_bytes - slab * kSlab * 2, 16);
      if (kManyTokens && later + thread / 8 >= p.M) bytes = 0;
      const unsigned char* from = inputs + static_cast<int64_t>(later) * p.input_stride * 2;
      ptx::copy_async(to + base * 16, from + slab * kSlab * 2, bytes > 0 ? bytes : 0);
    }
    inputs += kStepColumns * 2;
    input_bytes -= kStepColumns * 2;
  }

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
  const int slabs = (K + kDepth * kSlab - 1) / (kDepth * kSlab);
  const int strips = (N + kStripRows - 1) / kStripRows;
  const Problem problem{inputs, weights, meta, row_factors, {bias, output, N, output_stride},
                        M, K, input_stride, group_shift, zero_step, slabs, strips};
  const work::Plan plan((strips + kWarpsN - 1) / kWarpsN, (slabs + kWarpsK - 1) / kWarpsK,
                        static_cast<int>(gridDim.x));
  Walker(problem, plan).run(partials, flags);
}

QL_KERNEL(decode_gemm)
