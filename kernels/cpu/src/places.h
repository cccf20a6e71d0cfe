// Spreads the threads of a job over the processors.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <sched.h>
#endif

namespace ql {

// Where the threads of a job run. A thread that is woken is often put on the processor of the one
// that woke it, and a job is over before the system spreads them: two threads then take turns on
// one processor while the next one idles. So each claims the processor it is on, and moves where
// that one is taken.
class Places {
 public:
#ifdef __linux__
  // By the caller, before the others are called.
  void begin() {
    for (std::atomic<uint64_t>& word : taken_) word.store(0, std::memory_order_relaxed);
    claim(sched_getcpu());
  }

  // By every other thread of the job.
  void settle() {
    cpu_set_t allowed, free;
    if (claim(sched_getcpu()) || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    CPU_ZERO(&free);
    for (int cpu = 0; cpu < kProcessors; ++cpu) {
      if (CPU_ISSET(cpu, &allowed) && !(taken_[cpu / 64].load() >> cpu % 64 & 1)) {
        CPU_SET(cpu, &free);
      }
    }
    // Narrowing what is allowed moves the thread at once; it stays there when all is allowed again.
    if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof free, &free) != 0) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
    claim(sched_getcpu());
  }

 private:
  static constexpr int kProcessors = CPU_SETSIZE;

  // Whether nobody had it.
  bool claim(int cpu) {
    if (cpu < 0 || cpu >= kProcessors) return true;
    const uint64_t bit = uint64_t{1} << cpu % 64;
    return !(taken_[cpu / 64].fetch_or(bit) & bit);
  }

  std::atomic<uint64_t> taken_[kProcessors / 64]{};
#else
  void begin() {}
  void settle() {}
#endif
};

}  // namespace ql
