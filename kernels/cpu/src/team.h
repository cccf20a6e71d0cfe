// The kernels' own threads: torch's wheels carry a private OpenMP, and a second one would keep as
// many threads again spinning.
//
// They are started once and then wait for work: spinning for some tens of microseconds, the gap
// between two layers, then asleep. Safe to use from several threads at once and after a fork: while
// the team works for one caller, or is gone, another caller does its work alone.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace ql {

// Calls body(context, index) for every index in [0, count), on up to `threads` threads including
// the caller, and returns when all are done. Which thread takes which index is not fixed. A thread
// that wakes up late finds nothing left to do, and nobody waits for it.
void parallel_for(int64_t count, int32_t threads, void (*body)(void* context, int64_t index),
                  void* context);

class Region;

// What a thread knows inside a region of run_team.
struct Member {
  Region* region;
  int32_t index;    // 0 is the caller
  int32_t threads;  // of the region

  // Returns when all threads of the region have called it: what they wrote before is seen after.
  void barrier() const;

  // One loop that the threads of the region share, between two barriers: hands out ranges
  // [*first, *last) of [0, count), large ones first but none above `most`, until it returns false.
  // All threads give the same count.
  bool next(int64_t count, int64_t most, int64_t* first, int64_t* last) const;
};

// Calls body(context, member) once on each of up to `threads` threads at the same time, the caller
// among them, and returns when all have returned. There may be fewer: threads that another process
// keeps from running are not waited for long, and after a region in which threads mostly waited for
// one another the next ones take fewer, for a while.
void run_team(int32_t threads, void (*body)(void* context, const Member& member), void* context);

// Where threads wait for something that others bring about. They look for it for some tens of
// microseconds, then sleep: where threads outnumber processors, the one waited for may need theirs.
class WaitingRoom {
 public:
  // Returns when done() is true, and how many nanoseconds it slept. done() reads atomics, in
  // sequentially consistent order.
  template <typename Done>
  int64_t wait(Done done) {
    if (look(done)) return 0;
    const auto begin = std::chrono::steady_clock::now();
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, done);
    asleep_.fetch_sub(1);
    return nanoseconds_since(begin);
  }

  static int64_t nanoseconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
  }

  // To be called after a change, likewise sequentially consistent, that may have made done() true:
  // either we see the sleeper, or it sees the change.
  void wake() {
    if (asleep_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }

  // Whether done() came true while looking.
  template <typename Done>
  static bool look(Done done) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (done()) return true;
      pause();
    }
    return done();
  }

 private:
  static constexpr int kSpins = 4000;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<int32_t> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The state that the members of a region share. Each part has a cache line of its own: one is
// written while others are read in a loop.
class Region {
 public:
  // Before anybody is inside.
  void open(int32_t threads);
  void barrier();
  bool next(int64_t count, int64_t most, int64_t* first, int64_t* last);
  // Nanoseconds that its threads slept at barriers, all together.
  int64_t slept() const { return slept_.load(std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  int32_t threads_ = 1;
  alignas(64) WaitingRoom waiting_;
  std::atomic<int64_t> slept_{0};
};

}  // namespace ql
