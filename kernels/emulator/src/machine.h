// What an emulated kernel stands on: threads, barriers, warps that meet, shared and global memory.
//
// The functions behind `ptx::` (kernels/cuda/src/device.h) call these where a GPU has instructions.
// Every CUDA thread is a fiber; all blocks of a launch are alive at once; a launch has one seed,
// and the seed decides who runs next. A kernel that does what the machine forbids ends the launch
// with a sentence (`fault`): it never goes on with a wrong number.
//
// What is checked:
//   collectives       all 32 lanes of a warp come to the same one
//   shared memory     inside the block's allocation, aligned, written before it is read; two
//                     threads that touch the same four bytes, one of them writing, have a barrier
//                     between them; bytes under an asynchronous copy are touched by nobody until
//                     its own thread has waited and, for the others, a barrier has passed
//   global memory     inside a buffer of the launch, writable where it is written, aligned; what
//                     another block wrote is read only after a release and an acquire that order it
//   bank conflicts    counted, not forbidden
// What is not: the hardware's rounding inside one matrix product, timing, registers.
#pragma once

#include <cstdint>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// Where the running thread is: what CUDA calls threadIdx, blockIdx, gridDim, blockDim.
struct Place {
  Index thread, block, grid, block_size;
};
extern const Place* here;

// What a launch counted. kernels/emulator/machine.py has the same fields in the same order.
struct Counters {
  uint64_t switches, barriers, matrix_products, matrix_loads, bank_conflicts;
  uint64_t copies, copied_bytes, global_reads, global_writes;
};
extern Counters counters;

// Ends the launch. The text is what the caller of the launch gets, with the thread's place.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads: waits for all threads of the block that have not ended.
void barrier();

// Deposits `argument`; the last of the warp's 32 lanes to come runs `work` on all of them, in lane
// order, and all go on. `name` is what they must agree on.
using Collective = void (*)(void* const* lanes);
void collective(const char* name, void* argument, Collective work);

// Lets others run: a thread that waits for memory to change calls it in its loop.
void yield();

enum class Access { read, write };
// The bytes at an address of the running thread's block, after the checks above.
unsigned char* shared(uint32_t address, uint32_t bytes, Access access);
// The same for the thread in lane `lane` of the running warp, inside a collective.
unsigned char* shared_of_lane(int lane, uint32_t address, uint32_t bytes, Access access);
// Counts the conflicts of one warp-wide access of `bytes` (4, 8 or 16) per lane: the wavefronts it
// needs beyond those that its bytes need.
void count_bank_conflicts(const uint32_t addresses[32], uint32_t bytes);

// Copies 16 bytes to shared memory when a `wait_copies` of this thread says so, not before: the
// first `source_bytes` from global memory, zeros after them.
void copy_async(uint32_t address, const void* source, uint32_t source_bytes);
void commit_copies();
// Returns when at most `pending` of this thread's committed groups have not arrived.
void wait_copies(int pending);

const void* global_read(const void* address, uint32_t bytes);
void* global_write(void* address, uint32_t bytes);
// Flags: read with acquire, written with release, at the scope of the GPU. A release publishes what
// this thread wrote, and what its block wrote before its last barrier; an acquire that reads it
// makes that known to this thread, and to its block after the next barrier.
int load_acquire(const int* address);
void store_release(int* address, int value);

// Defined by each kernel's library (entry.h): runs the kernel in the current thread.
using Kernel = void (*)(void* const* arguments);

}  // namespace emulator

#define threadIdx (emulator::here->thread)
#define blockIdx (emulator::here->block)
#define gridDim (emulator::here->grid)
#define blockDim (emulator::here->block_size)
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __syncthreads() emulator::barrier()

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
