// Which block computes what: whole waves first, then the rest of the tiles shared among all blocks.
//
// The output has `tiles` tiles along N, each the sum of `steps` steps along K. As many tiles as
// fill whole waves go to blocks one by one. What remains is laid out as one line of steps, tile
// after tile, and cut into equal runs (stream-K); a run may begin and end inside a tile. The block
// whose run has a tile's first step owns the tile: it adds the sums of the others, in the order of
// their steps, so the result does not depend on who is early.
//
// Runs are dealt out backwards, the last to block 0: an owner waits only for blocks with a smaller
// number than its own, which have been started before it. And what it waits for is the first part
// of their runs, while the tile that it owns is the last of its own.
#pragma once

#include "device.h"

namespace work {

constexpr int kShortestRun = 4;  // steps: a run must be worth the exchange of sums

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }

struct Plan {
  int tiles, steps, blocks;
  int waves;              // whole tiles of every block
  int runs;               // blocks that share the tiles that are left
  int run_steps, longer;  // steps of each of them, and how many (the first) have one more

  __device__ Plan(int tiles, int steps, int blocks) : tiles(tiles), steps(steps), blocks(blocks) {
    waves = tiles / blocks;
    const int shared = tiles % blocks * steps;
    runs = least(blocks, (shared + kShortestRun - 1) / kShortestRun);
    run_steps = runs > 0 ? shared / runs : 0;
    longer = shared - runs * run_steps;
  }

  // Where run `run` begins on the line of shared steps; that of `runs` is its end.
  __device__ int begin(int run) const { return run * run_steps + least(run, longer); }

  __device__ int first_shared_tile() const { return waves * blocks; }
};

// One block's walk through its steps, in order.
struct Walk {
  int tile, step;
  int left;   // steps to do, this one included
  int whole;  // of these, in whole tiles

  __device__ Walk(const Plan& plan, int block) {
    const int run = plan.runs - 1 - block;
    whole = plan.waves * plan.steps;
    left = whole;
    if (run >= 0) left += plan.begin(run + 1) - plan.begin(run);
    tile = block;
    step = 0;
    if (whole == 0) enter_run(plan, block);
  }

  // Whether this step is the block's last of its tile.
  __device__ bool ends_part(const Plan& plan) const { return step + 1 == plan.steps || left == 1; }

  // Steps from this one to the block's last of its tile.
  __device__ int part_steps(const Plan& plan) const { return least(plan.steps - step, left); }

  // On by so many steps of the tile.
  __device__ void skip(int steps) {
    step += steps;
    left -= steps;
    if (whole > 0) whole -= steps;
  }

  __device__ void advance(const Plan& plan, int block) {
    --left;
    ++step;
    if (whole > 0 && --whole == 0) return enter_run(plan, block);
    if (step < plan.steps) return;
    step = 0;
    tile += whole > 0 ? plan.blocks : 1;
  }

 private:
  __device__ void enter_run(const Plan& plan, int block) {
    if (left == 0) return;
    const int begin = plan.begin(plan.runs - 1 - block);
    tile = plan.first_shared_tile() + begin / plan.steps;
    step = begin % plan.steps;
  }
};

}  // namespace work
