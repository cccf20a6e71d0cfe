// What the parts of the machine share: fibers, warps, blocks, and the running one.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace emulator {

constexpr int kLanes = 32;

struct Copy {
  uint32_t address;
  const unsigned char* source;
  uint32_t source_bytes;
};

struct Fiber {
  Suspended suspended = nullptr;
  unsigned char* stack = nullptr;
  Place place{};
  int id = 0, block = 0, warp = 0, lane = 0;
  bool ended = false;
  std::vector<Copy> open;                 // issued since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  std::vector<int> ready;  // lanes that can run
  int64_t priority = 0;  // who waits for memory has a negative one, the last to come the lowest
  const char* meeting = nullptr;  // what the lanes that have come wait at
  int arrived = 0;
  std::array<void*, kLanes> arguments{};
};

// Four bytes of shared memory. Epochs count the block's barriers from 1; 0: never.
struct SharedWord {
  uint32_t written = 0, read = 0;
  int writer = -1, reader = -1, copier = -1;
};

// Writes of `block` before its epoch `bound` (and those of its thread `releaser` in it) are known
// to `thread` and, after epoch `epoch`, to the whole block that keeps this.
struct Learned {
  int block;
  uint32_t bound;
  int releaser, thread;
  uint32_t epoch;
};

struct Block {
  uint32_t epoch = 1;
  int alive = 0, arrived = 0;
  std::vector<unsigned char> memory;
  std::vector<SharedWord> words;
  std::vector<Learned> learned;
};

struct GlobalWord {
  int writer = -1;
  uint32_t epoch = 0;
};

struct Buffer {  // as the caller gives it, kernels/emulator/machine.py
  unsigned char* base;
  uint64_t bytes;
  int32_t writable;
};

struct TrackedBuffer : Buffer {
  std::vector<GlobalWord> words;  // of writable ones
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<TrackedBuffer> buffers;
  std::map<const int*, std::vector<Learned>> releases;
  Fiber* running = nullptr;
  uint64_t idle_yields = 0;  // since something changed
};
extern State state;

inline Block& block_of(const Fiber& fiber) { return state.blocks[fiber.block]; }

}  // namespace emulator
