// Kernel (b): integer tokens times an integer weight whose columns are in segments of different
// widths (ResQ: few columns of 8 bits, most of 4), in one launch, for prompts and for few tokens.
//
//   total[m, n] = sum over segments, in them over spans of columns that share their scales:
//       t     = float(sum of code_w[n, k] code_a[m, k]) scale_w[n]   exact; one rounding
//       total = fma(t, scale_a[m], total)
//       total = fma(-scale_w[n] zero_w[n], token_sum[m], total)      where weights have zeros
//   output[m, n] = unit[n] total[m, n]  (+ bias[n])
//
// Sums of products are integers and exact. Codes of tokens are what formats/activation.py says: an
// asymmetric one has lost its zero point, in bytes before it was stored, in nibbles here, by the
// sum of the weight's codes. So results have the same bits, whatever an architecture multiplies.
// token_sum is scale_a times the sum of a span's codes. Scales of weights are float16, or codes of
// two-level scales; `unit` is what those are worth, for each segment; from segment to segment sums
// are converted (`ratio`).
//
// The weight is the left operand, in the order of its fragments, so a lane reads its own 16 bytes;
// tokens are the right one, in rows, swizzled in shared memory. A block has 8 warps and a tile of
// 128 rows: 64 x 32 (rows x tokens) to a warp for prompts, 16 rows and all tokens for decoding. A
// ring of kStages steps in shared memory is filled by cp.async and does not drain between tiles.
// While a chunk is multiplied, the next one is on its way to registers.
//
// Compiled for one case each, by macros: QL_SEGMENTS and, of each segment, QL_KIND_i, QL_STEPS_i,
// QL_SPAN_STEPS_i, QL_ZEROS_i (segments.h); QL_TOKEN_TILES 1, 2, 4, 8 (decoding) or 16 (prompts);
// QL_STAGES >= 3; QL_BFLOAT 0, 1: the output. Layouts: kernels/cuda/integer_layout.py.
#include "element.h"
#include "finish.h"
#include "segmented_tile.h"
#include "segments.h"
#include "work.h"

namespace {

using namespace tile;

// Copies of steps into the ring. Addresses run on from step to step; they are computed where a
// segment or a block's part of a tile begins.
struct Ring {
  const Problem& p;
  const work::Plan& plan;
  Shared memory;
  uint64_t policy;
  work::Walk ahead;  // where the next step's part begins
  int step = 0, end = 0;  // the next step, and the end of its part
  int slot = 0;
  int first_row_tile = 0, first_token = 0;
  const unsigned char *weights = nullptr, *tokens = nullptr;  // of the thread, of the next step

  static constexpr int kTokenChunks = kTokens * kStepBytes / 16;

  __device__ Ring(const Problem& p, const work::Plan& plan)
      : p(p), plan(plan), memory(ptx::shared_memory()), policy(ptx::evict_first()),
        ahead(plan, static_cast<int>(blockIdx.x)) {
    enter_part(ptx::thread_index());
  }

  __device__ __forceinline__ void enter_part(int thread) {
    step = ahead.step;
    end = step + ahead.part_steps(plan);
    first_row_tile = ahead.tile % p.tiles_along_rows * kBlockRowTiles;
    first_token = ahead.tile / p.tiles_along_rows * kTokens;
    const int64_t row = first_token + thread / 4;
    tokens = p.tokens + row * (segments::kSteps * kStepBytes) + step * kStepBytes + thread % 4 * 16;
    enter_segment<0>(thread);
  }

  // Of the segment that the next step is in.
  template <int s>
  __device__ __forceinline__ void enter_segment(int thread) {
    if constexpr (s + 1 < segments::kCount) {
      if (step >= segments::steps_before(s + 1)) return enter_segment<s + 1>(thread);
    }
    constexpr segments::Segment own = segments::segment(s);
    constexpr int kStrip = own.strip_bytes(), kStripChunks = kStrip / 16;
    const int64_t strip = first_row_tile + thread / kStripChunks;
    weights = p.weights + p.row_tiles * segments::bytes_before(s) +
              (strip * own.steps + (step - segments::steps_before(s))) * kStrip +
              thread % kStripChunks * 16;
  }

  template <int s>
  __device__ __forceinline__ void fetch_segment(Shared stage, int thread) {
    if constexpr (s + 1 < segments::kCount) {
      if (step >= segments::steps_before(s + 1)) return fetch_segment<s + 1>(stage, thread);
    }
    constexpr segments::Segment own = segments::segment(s);
    constexpr int kStrip = own.strip_bytes(), kStripChunks = kStrip / 16;
    constexpr int kStripsAtOnce = kThreads / kStripChunks;
    const int strip = thread / kStripChunks;
    const Shared to = stage + strip * kWholeStrip + thread % kStripChunks * 16;
#pragma unroll
    for (int i = 0; i < kBlockRowTiles / kStripsAtOnce; ++i) {
      const int bytes = first_row_tile + strip + i * kStripsAtOnce < p.row_tiles ? 16 : 0;
      const unsigned char* from = weights + i * (kStripsAtOnce * own.steps * kStrip);
      if constexpr (kPrompt) {
        ptx::copy_async(to + i * kStripsAtOnce * kWholeStrip, from, bytes);
      } else {
        ptx::copy_async(to + i * kStripsAtOnce * kWholeStrip, from, bytes, policy);
      }
    }
    weights += kStrip;
    fetch_meta<s>(stage + kMetaAt, thread);
  }

  __device__ __forceinline__ void fetch_tokens(Shared stage, int thread) {
    const Shared to = stage + kTokensAt + thread / 4 * kStepBytes +
                      Place::swizzled(thread / 4, thread % 4) * 16;
#pragma unroll
    for (int base = 0; base < kTokenChunks; base += kThreads) {
      if (kTokenChunks % kThreads != 0 && base + thread >= kTokenChunks) break;
      const int bytes = first_token + (base + thread) / 4 < p.M ? 16 : 0;
      ptx::copy_async(to + base * 16, tokens + base / 4 * (segments::kSteps * kStepBytes), bytes);
    }
    tokens += kStepBytes;
  }

  // Scales and their companions, with the last step of a span and that of a block's part.
  template <int s>
  __device__ __forceinline__ void fetch_meta(Shared meta, int thread) {
    constexpr segments::Segment own = segments::segment(s);
    const int at = step - segments::steps_before(s);
    if constexpr (own.span_steps == 0) {
      fetch_span(meta, segments::spans_before(s) + 2 * at, thread);
      fetch_span(meta + kSpanBytes, segments::spans_before(s) + 2 * at + 1, thread);
    } else {
      const bool ends = (at + 1) % own.span_steps == 0 || at + 1 == own.steps;
      if (ends || step + 1 == end) {
        fetch_span(meta, segments::spans_before(s) + at / own.span_steps, thread);
      }
    }
  }

  __device__ __forceinline__ void fetch_span(Shared to, int span, int thread) {
    constexpr int kRowChunks = kMetaRowBytes / 16, kAll = kSpanBytes / 16;
    constexpr int kPlaneRowChunks = kRows / 4, kPlaneTokenChunks = kTokens / 4;
#pragma unroll
    for (int base = 0; base < kAll; base += kThreads) {
      const int chunk = base + thread;
      if (kAll % kThreads != 0 && chunk >= kAll) break;
      const uint32_t* from;
      int bytes = 16;
      if (chunk < kRowChunks) {
        const int plane = span * kRowPlanes + chunk / kPlaneRowChunks;
        const int row = first_row_tile * 16 + chunk % kPlaneRowChunks * 4;
        from = p.row_meta + (static_cast<int64_t>(plane) * p.padded_rows + row);
      } else {
        const int own = chunk - kRowChunks;
        const int plane = span * kTokenPlanes + own / kPlaneTokenChunks;
        const int token = first_token + own % kPlaneTokenChunks * 4;
        from = p.token_meta + (static_cast<int64_t>(plane) * p.padded_tokens + token);
        if (token >= p.padded_tokens) bytes = 0;
      }
      ptx::copy_async(to + chunk * 16, from, bytes);
    }
  }

  // The next step's copies; without one, an empty group, so that counting groups goes on.
  __device__ __forceinline__ void fetch() {
    if (step < end) {
      const int thread = ptx::thread_index();
      const Shared stage = memory + slot * kStageBytes;
      fetch_tokens(stage, thread);
      fetch_segment<0>(stage, thread);
      ++step;
      if (step == end) {
        ahead.skip(end - ahead.step - 1);
        ahead.advance(plan, static_cast<int>(blockIdx.x));
        if (ahead.left > 0) enter_part(thread);
      } else if (begins_segment()) {
        enter_segment<0>(thread);
      }
    }
    ptx::commit_copies();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }

  __device__ __forceinline__ bool begins_segment() const {
    return (segments::kCount > 1 && step == segments::steps_before(1)) ||
           (segments::kCount > 2 && step == segments::steps_before(2));
  }
};

// A finished tile, for finish.h.
struct Tile {
  static constexpr int kThreads = tile::kThreads, kPasses = kTokenTiles;
  static constexpr int kVectors = 8 * kWarpsTokens * kRows / 4 / kThreads;

  const Problem& p;
  const Sums& sums;
  Shared memory;
  int first_row, first_token;

  // Tokens 8 pass .. 8 pass + 7 of every warp. The thread's place is computed anew: over the loop
  // there are no registers to keep all of it in.
  __device__ __forceinline__ void gather(float4 (&own)[kVectors], int pass) const {
    const Place place;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = place.warp_tokens * 8 + place.pair * 2 + e % 2;
        const int row = (place.warp_rows * kRowTiles + i) * 16 + place.row + e / 2 * 8;
        ptx::store_shared(memory + (token * kSumStride + row) * 4, sums.total[i][pass][e]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = (v * kThreads + place.thread) * 4;
      own[v] = ptx::load_shared<float4>(memory + (at / kRows * kSumStride + at % kRows) * 4);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void store(int pass, int vector, float4 four) const {
    const int at = (vector * kThreads + ptx::thread_index()) * 4, slot = at / kRows;
    const int token = first_token + (slot / 8 * kTokenTiles + pass) * 8 + slot % 8;
    const int n = first_row + at % kRows;
    if (token < p.M && n < p.out.N) p.out.store<Element>(token, n, four);
  }
};

// A block's way through its steps: part of a tile by part, in it segment by segment.
struct Walker {
  const Problem& p;
  const work::Plan& plan;
  Ring ring;
  Place place;
  work::Walk at;     // where the part begins
  int step = 0, end = 0;  // in it, and its end
  int slot = 0;      // of the step
  Fragments now, later;
  Sums sums;

  __device__ Walker(const Problem& p, const work::Plan& plan)
      : p(p), plan(plan), ring(p, plan),
        at(plan, static_cast<int>(blockIdx.x)) {}

  __device__ __forceinline__ int first_row() const { return at.tile % p.tiles_along_rows * kRows; }

  __device__ __forceinline__ void load_first_chunk() {
    const Shared stage = ring.memory + slot * kStageBytes;
    now.load_weights(stage, place, 0);
    now.load_tokens(stage, place, 0);
  }

  // One step, whose first chunk's operands are on their way to registers; then the next one's are.
  template <int s>
  __device__ __forceinline__ void do_step() {
    constexpr segments::Segment own = segments::segment(s);
    const Shared stage = ring.memory + slot * kStageBytes;
    if constexpr (own.kind == segments::kMixed) {
      later = now;
    } else {
      later.load_weights(stage, place, 1);
    }
    later.load_tokens(stage, place, 1);
    // Spans of one step are summed up at once, others as their operands come.
    constexpr bool kAtOnce = own.span_steps == 1;
    const Fragments first = now;
    if constexpr (!kAtOnce) sums.add_chunk<s, 0>(p, first, stage + kMetaAt, place);
    // In the middle of a step: the next stage has arrived, and nobody reads the former any more.
    ptx::wait_copies<kStages - 3>();
    __syncthreads();
    ring.fetch();
    slot = slot + 1 == kStages ? 0 : slot + 1;
    const bool ends_part = step + 1 == end;
    if (!ends_part || at.left > end - at.step) load_first_chunk();
    if constexpr (kAtOnce) {
      sums.add_step<s>(p, first, later, stage + kMetaAt, place);
    } else if constexpr (own.span_steps == 0) {
      sums.add_chunk<s, 1>(p, later, stage + kMetaAt + kSpanBytes, place);
    } else {
      sums.add_chunk<s, 1>(p, later, stage + kMetaAt, place);
      if constexpr (!segments::kOneSpan) {
        const int in_segment = step - segments::steps_before(s);
        const bool ends_span =
            (in_segment + 1) % own.span_steps == 0 || in_segment + 1 == own.steps;
        if (ends_span || ends_part) sums.add_span<s>(p, stage + kMetaAt, place, ends_span);
      }
    }
    ++step;
  }

  // What the part has of segment `s` and those after it; sums are in units of the last one then.
  template <int s>
  __device__ __forceinline__ void do_segments() {
    if constexpr (s < segments::kCount) {
      constexpr int kEnd = segments::steps_before(s + 1);
      if (step < kEnd && step < end) {
        if constexpr (s > 0) {
          const float* ratios = p.units + (segments::kCount + s) * p.padded_rows + first_row();
          if (step > at.step) sums.multiply_rows(ratios);
        }
        if constexpr (segments::segment(s).span_steps > 1) sums.start_span<s>();
#pragma unroll 1
        do {
          do_step<s>();
        } while (step < kEnd && step < end);
        if constexpr (segments::kOneSpan) {
          // Sums that begin here leave their registers to the loop. Nobody has overwritten the last
          // step's scales: that takes a barrier.
          const int last = (slot == 0 ? kStages : slot) - 1;
          sums.clear();
          sums.add_span<s>(p, ring.memory + last * kStageBytes + kMetaAt, place, step == kEnd);
        }
        if (step == end) sums.multiply_rows(p.units + s * p.padded_rows + first_row());
      }
      do_segments<s + 1>();
    }
  }

  __device__ void run(float4* partials, int* flags) {
    if (at.left == 0) return;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) ring.fetch();
    ptx::wait_copies<kStages - 2>();
    __syncthreads();
    load_first_chunk();
#pragma unroll 1
    while (at.left > 0) {
      if constexpr (!segments::kOneSpan) sums.clear();
      step = at.step;
      end = step + at.part_steps(plan);
      do_segments<0>();
      const int first = at.step, token = at.tile / p.tiles_along_rows * kTokens;
      at.skip(end - first - 1);
      const Tile tile{p, sums, ring.memory + kSumsAt, first_row(), token};
      finish::part(tile, plan, at, first, partials, flags);
      at.advance(plan, static_cast<int>(blockIdx.x));
    }
    ptx::wait_copies<0>();
  }
};

}  // namespace

// tokens: codes [M, 64 * steps] from a multiple of 16 bytes; token_meta [spans, planes,
// padded_tokens]; row_meta [spans, planes, padded_rows]; units [2 * segments, padded_rows]; bias
// [N] of Element or null; output [M, output_stride >= N] of Element, from a multiple of 8 bytes;
// partials and flags as finish.h has them.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    segmented_gemm(const unsigned char* __restrict__ tokens,
                   const unsigned char* __restrict__ weights,
                   const uint32_t* __restrict__ token_meta, const uint32_t* __restrict__ row_meta,
                   const float* __restrict__ units, const unsigned char* __restrict__ bias,
                   unsigned char* __restrict__ output, float4* partials, int* flags, int M, int N,
                   int output_stride, int padded_tokens, int padded_rows, float zero_step_0,
                   float middle_0, float zero_step_1, float middle_1, float zero_step_2,
                   float middle_2) {
  const int tiles_along_rows = (N + kRows - 1) / kRows;
  const Problem problem{tokens, weights, token_meta, row_meta, units,
                        {bias, output, N, output_stride}, M, padded_tokens, padded_rows,
                        (N + 15) / 16, tiles_along_rows,
                        {zero_step_0, zero_step_1, zero_step_2}, {middle_0, middle_1, middle_2}};
  const work::Plan plan(tiles_along_rows * ((M + kTokens - 1) / kTokens), segments::kSteps,
                        static_cast<int>(gridDim.x));
  Walker(problem, plan).run(partials, flags);
}

QL_KERNEL(segmented_gemm)
