// The end of a block's part of a tile: sums change hands, those of several blocks are added in the
// order of their steps (work.h), and the tile's owner stores them.
//
// A tile's sums are brought to its threads in passes, some float4 to each thread in each pass:
//
//   struct Tile {
//     static constexpr int kThreads, kPasses, kVectors;
//     void gather(float4 (&own)[kVectors], int pass) const;     // all threads together; barriers
//     void store(int pass, int vector, float4 sums) const;
//   };
//
// `partials` has kPasses * kVectors * kThreads float4 for each block; `flags` one int for each,
// zero before and after.
#pragma once

#include "device.h"
#include "work.h"

namespace finish {

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Whose sums an owned tile lacks: runs `own` + 1 and on, up to the one returned, which begin before
// its end. Thread 0 has waited for them, and the block for thread 0.
__device__ __forceinline__ int wait_for_others(const work::Plan& plan, const work::Walk& at,
                                               int own, int* flags) {
  int end = own + 1;
  if (at.step + 1 >= plan.steps) return end;
  const int tile_end = (at.tile - plan.first_shared_tile() + 1) * plan.steps;
  while (end < plan.runs && plan.begin(end) < tile_end) ++end;
  if (ptx::thread_index() == 0) {
#pragma unroll 1
    for (int other = own + 1; other < end; ++other) {
      while (ptx::load_acquire(flags + other) == 0) {
      }
    }
  }
  __syncthreads();
  return end;
}

// `at` is the block's last step of the part, `first` its first one.
template <class Tile>
__device__ __forceinline__ void part(const Tile& tile, const work::Plan& plan,
                                     const work::Walk& at, int first, float4* partials,
                                     int* flags) {
  constexpr int kSlot = Tile::kPasses * Tile::kVectors * Tile::kThreads;  // float4 of a block
  const int thread = ptx::thread_index();
  const int run = plan.runs - 1 - static_cast<int>(blockIdx.x);
  const bool owner = first == 0;
  const int others_end = owner ? wait_for_others(plan, at, run, flags) : 0;
#pragma unroll
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    float4 own[Tile::kVectors];
    tile.gather(own, pass);
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v) {
      const int in_slot = (pass * Tile::kVectors + v) * Tile::kThreads + thread;
      if (!owner) {
        ptx::store_global(partials + run * kSlot + in_slot, own[v]);
        continue;
      }
#pragma unroll 1
      for (int other = run + 1; other < others_end; ++other) {
        const float4* from = partials + other * kSlot + in_slot;
        own[v] = sum_of(own[v], ptx::load_global_from_l2<float4>(from));
      }
      tile.store(pass, v, own[v]);
    }
  }
  if (!owner) {
    __syncthreads();
    if (thread == 0) ptx::store_release(flags + run, 1);
  } else if (thread == 0) {
    // Flags are zero again for the next launch.
#pragma unroll 1
    for (int other = run + 1; other < others_end; ++other) ptx::store_release(flags + other, 0);
  }
}

// Where finished sums go: bias [N] or null and output [M, stride >= N], of a 16-bit type.
struct Output {
  const unsigned char* bias;
  unsigned char* output;
  int N, stride;

  // Rows n .. n + 3 of one token, as many as there are, with their bias.
  template <class Element>
  __device__ __forceinline__ void store(int token, int n, float4 sums) const {
    float value[4] = {sums.x, sums.y, sums.z, sums.w};
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i >= N) continue;
        value[i] += ptx::to_float<Element>(ptx::load_global<uint16_t>(bias + (n + i) * 2));
      }
    }
    unsigned char* to = output + (static_cast<int64_t>(token) * stride + n) * 2;
    const uint32_t pairs[2] = {ptx::to_pair<Element>(value[0], value[1]),
                               ptx::to_pair<Element>(value[2], value[3])};
    if (n + 4 <= N && stride % 4 == 0) {
      ptx::store_global<uint2>(to, {pairs[0], pairs[1]});
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i < N) {
        ptx::store_global(to + 2 * i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
      }
    }
  }
};

}  // namespace finish
