// What a block of kernel (b) has of a tile: sizes, operands in registers, sums, and how scales meet
// them. segmented_gemm.cu says what it is for.
#pragma once

#include "element.h"
#include "finish.h"
#include "segments.h"

namespace tile {

using segments::kStepBytes;
using segments::kWholeStrip;

constexpr int kThreads = 256, kStages = QL_STAGES;
constexpr bool kPrompt = QL_TOKEN_TILES == 16;
constexpr int kWarpsTokens = kPrompt ? 4 : 1, kWarpsRows = 8 / kWarpsTokens;
constexpr int kRowTiles = kPrompt ? 4 : 1;                  // of 16 rows, of a warp
constexpr int kTokenTiles = QL_TOKEN_TILES / kWarpsTokens;  // of 8 tokens, of a warp
constexpr int kBlockRowTiles = kRowTiles * kWarpsRows;
constexpr int kRows = kBlockRowTiles * 16, kTokens = QL_TOKEN_TILES * 8;  // of a block
static_assert(kStages >= 3 && kRows == 128, "see segmented_gemm.cu");

// Planes of 4 bytes for each row or token of a tile, of a span: rows' scales (and zero points) and,
// for unsigned nibbles, sums of codes; tokens' scales, sums, and zero points.
constexpr bool kZeros = segments::any_zeros(), kUnsigned = segments::any_of(segments::kUnsigned);
constexpr int kRowPlanes = 1 + kUnsigned, kTokenPlanes = 1 + kZeros + kUnsigned;
constexpr int kMetaRowBytes = kRowPlanes * kRows * 4, kMetaTokenBytes = kTokenPlanes * kTokens * 4;
constexpr int kSpanBytes = kMetaRowBytes + kMetaTokenBytes;
constexpr int kSpansOfStep = segments::any_chunk_spans() ? 2 : 1;
constexpr int kTokensAt = kBlockRowTiles * kWholeStrip;
constexpr int kMetaAt = kTokensAt + kTokens * kStepBytes;
constexpr int kStageBytes = kMetaAt + kSpansOfStep * kSpanBytes;
// At the end of a tile, sums change hands 8 tokens of each warp at a time. Four floats beside each
// token's rows keep the lanes of a warp in different banks.
constexpr int kSumsAt = kStages * kStageBytes, kSumStride = kRows + 4;

struct Problem {
  const unsigned char *tokens, *weights;
  const uint32_t *token_meta, *row_meta;
  const float* units;  // [2 * segments][padded_rows]: units, then ratios
  finish::Output out;
  int M;
  int padded_tokens, padded_rows;  // multiples of 4 and of 128
  int row_tiles, tiles_along_rows;
  // Of each segment: what a stored zero point is worth, in codes, and the code that is stored as 0.
  float zero_steps[3], middles[3];
};

// What differs between the threads of a block, computed once.
struct Place {
  int thread, lane, warp_rows, warp_tokens;
  int row, pair;        // of a fragment: lane / 4 and lane % 4
  Shared token_offset;  // of the lane's row of ldmatrix in a stage, chunk 0; chunk 1: ^ 32

  __device__ Place() {
    thread = ptx::thread_index();
    lane = thread % 32;
    const int warp = thread / 32;
    warp_rows = warp / kWarpsTokens;
    warp_tokens = warp % kWarpsTokens;
    row = lane / 4;
    pair = lane % 4;
    const int token =
        warp_tokens * kTokenTiles * 8 + (kTokenTiles == 1 ? 0 : lane / 16 * 8) + lane % 8;
    token_offset = kTokensAt + token * kStepBytes + swizzled(token, lane / 8 % 2) * 16;
  }

  // Where chunk `sixteen` (of 16 bytes) of a token's 64 lies: tokens that ldmatrix reads together
  // are in different banks.
  static __device__ __forceinline__ int swizzled(int token, int sixteen) {
    return sixteen ^ (token / 2 % 4);
  }
};

// One chunk's operands of a warp. Mixed weights are both chunks', as they are stored.
struct Fragments {
  uint32_t weights[kRowTiles][4], tokens[kTokenTiles][2];

  __device__ __forceinline__ void load_weights(Shared stage, const Place& place, int chunk) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const uint4 four = ptx::load_shared<uint4>(
          stage + place.warp_rows * (kRowTiles * kWholeStrip) + place.lane * 16 +
          (i * kWholeStrip + chunk * (kWholeStrip / 2)));
      weights[i][0] = four.x;
      weights[i][1] = four.y;
      weights[i][2] = four.z;
      weights[i][3] = four.w;
    }
  }

  __device__ __forceinline__ void load_tokens(Shared stage, const Place& place, int chunk) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; j += 2) {
      uint32_t r[4];
      ptx::load_matrices(r, stage + (place.token_offset ^ (chunk * 32)) + j * 8 * kStepBytes);
      tokens[j][0] = r[0];
      tokens[j][1] = r[1];
      if (j + 1 < kTokenTiles) {
        tokens[j + 1][0] = r[2];
        tokens[j + 1][1] = r[3];
      }
    }
  }

  // The left operand of 16 rows. Mixed: bytes of 16 times the value of every low (chunk 0) or high
  // nibble.
  template <int kind, int chunk>
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int i) const {
    constexpr uint32_t kHigh = 0xf0f0f0f0u;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = weights[i][r];
      a[r] = kind != segments::kMixed ? word : (chunk == 0 ? word << 4 : word) & kHigh;
    }
  }
};

// What a span's scales and (negative, times the scale) zero points are for the rows of one
// fragment, r and r + 8.
template <int s>
struct RowScales {
  float scale[2], magic[2], zero[2];
  int sum[2];

  __device__ __forceinline__ RowScales(const Problem& p, Shared rows, int row_tile, int row) {
    constexpr segments::Segment own = segments::segment(s);
    const Shared at = rows + (row_tile * 16 + row * 2) * 4;
    const uint2 words = ptx::load_shared<uint2>(at);
    const uint32_t word[2] = {words.x, words.y};
    if constexpr (own.kind == segments::kUnsigned) {
      const uint2 sums = ptx::load_shared<uint2>(at + kRows * 4);
      sum[0] = static_cast<int>(sums.x);
      sum[1] = static_cast<int>(sums.y);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float whole = ptx::to_float<ptx::Half>(word[h]);
      scale[h] = own.kind == segments::kMixed ? whole * 0.0625f : whole;
      magic[h] = scale[h] * -segments::kMagic;
      if constexpr (own.zeros) {
        const float stored = ptx::to_float<ptx::Half>(word[h] >> 16);
        zero[h] = ptx::product(whole, ptx::fma(stored, -p.zero_steps[s], p.middles[s]));
      }
    }
  }
};

// The same for the tokens of one fragment, 2 pair and 2 pair + 1. What belongs to a whole span is
// added by the part of it that ends it.
template <int s>
struct TokenScales {
  float scale[2], sum[2];
  int zero[2];

  __device__ __forceinline__ TokenScales(Shared tokens, int token_tile, int pair, bool ends_span) {
    constexpr segments::Segment own = segments::segment(s);
    const Shared at = tokens + (token_tile * 8 + pair * 2) * 4;
    const uint2 words = ptx::load_shared<uint2>(at);
    scale[0] = ptx::as_float(static_cast<int>(words.x));
    scale[1] = ptx::as_float(static_cast<int>(words.y));
    if constexpr (own.zeros) {
      const uint2 sums = ptx::load_shared<uint2>(at + kTokens * 4);
      sum[0] = ends_span ? ptx::as_float(static_cast<int>(sums.x)) : 0.f;
      sum[1] = ends_span ? ptx::as_float(static_cast<int>(sums.y)) : 0.f;
    }
    if constexpr (own.kind == segments::kUnsigned) {
      const uint2 zeros = ptx::load_shared<uint2>(at + (1 + kZeros) * kTokens * 4);
      zero[0] = ends_span ? static_cast<int>(zeros.x) : 0;
      zero[1] = ends_span ? static_cast<int>(zeros.y) : 0;
    }
  }
};

template <int s>
__device__ __forceinline__ void add_scaled(float (&total)[4], const int (&sums)[4],
                                           const RowScales<s>& rows,
                                           const TokenScales<s>& tokens) {
  constexpr segments::Segment own = segments::segment(s);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int h = j / 2, side = j % 2;
    int sum = sums[j];
    if constexpr (own.kind == segments::kUnsigned) sum -= tokens.zero[side] * rows.sum[h];
    float t;
    if constexpr (segments::Conversion<s>::kIsMagic) {
      t = ptx::fma(ptx::as_float(sum), rows.scale[h], rows.magic[h]);
    } else {
      t = ptx::product(static_cast<float>(sum), rows.scale[h]);
    }
    total[j] = ptx::fma(t, tokens.scale[side], total[j]);
    if constexpr (own.zeros) total[j] = ptx::fma(rows.zero[h], tokens.sum[side], total[j]);
  }
}

template <int s>
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], const int (&c)[4]) {
  constexpr int kind = segments::segment(s).kind;
  if constexpr (kind == segments::kNibbles) {
    ptx::multiply_integers<ptx::Int4, ptx::Int4>(d, a, b, c);
  } else if constexpr (kind == segments::kUnsigned) {
    ptx::multiply_integers<ptx::Int4, ptx::Uint4>(d, a, b, c);
  } else {
    ptx::multiply_integers<ptx::Int8, ptx::Int8>(d, a, b, c);
  }
}

// What a warp sums up: integers of a span, where it is longer than a step, and floats.
struct Sums {
  int span[kRowTiles][kTokenTiles][4];
  float total[kRowTiles][kTokenTiles][4];

  template <int s>
  __device__ __forceinline__ void start_span() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) span[i][j][e] = segments::Conversion<s>::kStart;
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[i][j][e] = 0.f;
      }
    }
  }

  // total *= factors of the rows, from global memory. Seldom, so that the thread's place is computed
  // anew: addresses that are kept for this take registers from the loop.
  __device__ __forceinline__ void multiply_rows(const float* factors) {
    const Place place;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const float* own = factors + (place.warp_rows * kRowTiles + i) * 16 + place.row;
      const float factor[2] = {ptx::load_global<float>(own), ptx::load_global<float>(own + 8)};
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[i][j][e] = ptx::product(total[i][j][e], factor[e / 2]);
        }
      }
    }
  }

  // A chunk of a segment. `meta` is its span's, where that is no longer than the chunk.
  template <int s, int chunk>
  __device__ __forceinline__ void add_chunk(const Problem& p, const Fragments& own, Shared meta,
                                            const Place& place) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t a[4];
      own.operand<segments::segment(s).kind, chunk>(a, i);
      if constexpr (segments::segment(s).span_steps == 0) {
        constexpr int kStart = segments::Conversion<s>::kStart;
        const int start[4] = {kStart, kStart, kStart, kStart};
        const RowScales<s> rows(p, meta, place.warp_rows * kRowTiles + i, place.row);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          int sums[4];
          multiply<s>(sums, a, own.tokens[j], start);
          const TokenScales<s> tokens(meta + kMetaRowBytes, place.warp_tokens * kTokenTiles + j,
                                      place.pair, true);
          add_scaled<s>(total[i][j], sums, rows, tokens);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          multiply<s>(span[i][j], a, own.tokens[j], span[i][j]);
        }
      }
    }
  }

  // Both chunks of a step that is a span.
  template <int s>
  __device__ __forceinline__ void add_step(const Problem& p, const Fragments& first,
                                           const Fragments& second, Shared meta,
                                           const Place& place) {
    constexpr int kStart = segments::Conversion<s>::kStart, kind = segments::segment(s).kind;
    const int start[4] = {kStart, kStart, kStart, kStart};
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t a[2][4];
      first.operand<kind, 0>(a[0], i);
      second.operand<kind, 1>(a[1], i);
      const RowScales<s> rows(p, meta, place.warp_rows * kRowTiles + i, place.row);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        int sums[4];
        multiply<s>(sums, a[0], first.tokens[j], start);
        multiply<s>(sums, a[1], second.tokens[j], sums);
        const TokenScales<s> tokens(meta + kMetaRowBytes, place.warp_tokens * kTokenTiles + j,
                                    place.pair, true);
        add_scaled<s>(total[i][j], sums, rows, tokens);
      }
    }
  }

  // The span that has been summed up, or a part of it.
  template <int s>
  __device__ __forceinline__ void add_span(const Problem& p, Shared meta, const Place& place,
                                           bool ends_span) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const RowScales<s> rows(p, meta, place.warp_rows * kRowTiles + i, place.row);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const TokenScales<s> tokens(meta + kMetaRowBytes, place.warp_tokens * kTokenTiles + j,
                                    place.pair, ends_span);
        add_scaled<s>(total[i][j], span[i][j], rows, tokens);
      }
    }
    start_span<s>();
  }
};

}  // namespace tile
