// One kernel for each rule of the machine: run with `what`, it breaks that rule or, where the name
// says so, does what is allowed. 64 threads a block, 1024 bytes of shared memory.
#include "device.h"

enum What {
  kInOrder,
  kReadUnwritten,
  kMissingBarrier,
  kWriteWhileRead,
  kReadBeforeWait,
  kReadBeforeBarrierAfterWait,
  kWriteUnderCopy,
  kUnalignedCopy,
  kUnalignedShared,
  kOutsideShared,
  kOutsideGlobal,
  kCopyOutsideGlobal,
  kWriteToInput,
  kDivergence,
  kMissingLanes,
  kSomeThreadsAtBarrier,
  kWaitForEver,
  kUnreleased,
  kReleasedBeforeBarrier,
  kUnacquired,
  kReleased,
  kCopyLeftBehind,
  kOneBank,
};

__global__ void rules(const uint32_t* input, uint32_t* output, int* flags, int what) {
  const ptx::Shared memory = ptx::shared_memory();
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int other = (thread + 32) % 64;  // of the other warp
  const auto own = static_cast<uint32_t>(thread);
  uint32_t* out = output + block * 64 + thread;
  const auto store = [&](int at) { ptx::store_shared<uint32_t>(memory + 4 * at, own); };
  const auto load = [&](int at) { return ptx::load_shared<uint32_t>(memory + 4 * at); };
  const auto copy = [&](int at) { ptx::copy_async(memory + 16 * at, input + 4 * thread, 16); };
  const auto publish = [&] {
    if (thread == 0) ptx::store_release(flags, 1);
  };
  switch (what) {
    case kInOrder:
      store(thread);
      __syncthreads();
      ptx::store_global(out, load(other) + ptx::load_global<uint32_t>(input + thread));
      break;
    case kReadUnwritten:
      ptx::store_global(out, load(thread));
      break;
    case kMissingBarrier:
      store(thread);
      ptx::store_global(out, load(other));
      break;
    case kWriteWhileRead:
      store(thread);
      __syncthreads();
      ptx::store_global(out, load(other));
      store(thread);
      break;
    case kReadBeforeWait:
      copy(thread);
      ptx::commit_copies();
      ptx::wait_copies<1>();
      ptx::store_global(out, load(4 * thread));
      ptx::wait_copies<0>();
      break;
    case kReadBeforeBarrierAfterWait:
      copy(thread);
      ptx::commit_copies();
      ptx::wait_copies<0>();
      ptx::store_global(out, load(4 * other));
      break;
    case kWriteUnderCopy:
      copy(thread);
      ptx::commit_copies();
      store(4 * thread);
      ptx::wait_copies<0>();
      break;
    case kUnalignedCopy:
      ptx::copy_async(memory + 16 * own, input + 4 * thread + 1, 16);
      break;
    case kUnalignedShared:
      ptx::store_shared<uint32_t>(memory + 4 * own + 2, own);
      break;
    case kOutsideShared:
      store(thread + 256);
      break;
    case kOutsideGlobal:
      ptx::store_global(out + 64, own);
      break;
    case kCopyOutsideGlobal:
      ptx::copy_async(memory + 16 * own, input + 4 * thread + 4, 15);
      ptx::commit_copies();
      ptx::wait_copies<0>();
      break;
    case kWriteToInput:
      ptx::store_global(const_cast<uint32_t*>(input) + thread, own);
      break;
    case kDivergence: {
      uint32_t registers[4];
      if (thread % 2 == 0) {
        store(thread);
      } else {
        ptx::load_matrices(registers, memory);
      }
      break;
    }
    case kMissingLanes:
      if (thread != 5) store(thread);
      break;
    case kSomeThreadsAtBarrier:
      if (thread < 32) __syncthreads();
      if (thread >= 32) {
        while (ptx::load_acquire(flags) == 0) {
        }
      }
      publish();
      break;
    case kWaitForEver:
      while (ptx::load_acquire(flags) == 0) {
      }
      break;
    case kUnreleased:
    case kReleasedBeforeBarrier:
    case kUnacquired:
    case kReleased:
      // Block 0 writes, block 1 reads all of it.
      if (block == 0) {
        if (what == kReleasedBeforeBarrier) publish();
        ptx::store_global(out, own);
        if (what == kUnreleased || what == kReleasedBeforeBarrier) break;
        __syncthreads();
        publish();
      } else {
        if (thread == 0 && what != kUnacquired && what != kUnreleased) {
          while (ptx::load_acquire(flags) == 0) {
          }
        }
        __syncthreads();
        ptx::store_global(out, ptx::load_global<uint32_t>(output + other));
      }
      break;
    case kCopyLeftBehind:
      copy(thread);
      ptx::commit_copies();
      break;
    case kOneBank:  // the first warp: 8 words of one bank, each read by four lanes
      for (int i = 0; i < 4; ++i) store(thread + 64 * i);
      __syncthreads();
      if (thread < 32) ptx::store_global(out, load(thread / 4 * 32));
      break;
  }
}

QL_KERNEL(rules)
