#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace ql {
namespace {

// How often a thread looks again before it goes to sleep or yields: some microseconds, the gap
// between two layers.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  // The caller holds `busy`.
  void run(int64_t count, int32_t threads, void (*body)(void*, int64_t), void* context) {
    grow(threads - 1);
    body_ = body;
    context_ = context;
    count_ = count;
    helpers_ = threads - 1;
    std::fegetenv(&float_environment_);
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    work();
    // A thread that wakes up from now on finds the job closed and leaves it alone: nobody waits for
    // a late one. The order of these two steps here, and of the opposite ones in serve(), is what
    // makes that safe (both sequentially consistent): either the thread sees the job closed, or we
    // see the thread inside.
    open_.store(false);
    for (int spin = 0; inside_.load() != 0; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  std::mutex busy;

 private:
  void grow(int32_t wanted) {
    while (workers_ < wanted) {
      try {
        std::thread(&Pool::serve, this, workers_, generation_.load()).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer do the same work
      }
      ++workers_;
    }
  }

  void work() {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      body_(context_, index);
    }
  }

  void serve(int32_t worker, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load() == seen; ++spin) pause();
      if (generation_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      seen = generation_.load();
      inside_.fetch_add(1);
      if (open_.load() && worker < helpers_) {
        std::fesetenv(&float_environment_);  // rounding and flush-to-zero as the caller has them
        work();
      }
      inside_.fetch_sub(1);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> open_{false};
  std::atomic<int32_t> inside_{0};
  std::atomic<int64_t> next_{0};
  int32_t workers_ = 0;
  // The job; written only while it is closed and nobody is inside.
  int32_t helpers_ = 0;
  int64_t count_ = 0;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::fenv_t float_environment_{};
};

// Never destroyed: its threads are still parked on it when the process exits.
std::atomic<Pool*> shared_pool{nullptr};

Pool* pool() {
  Pool* current = shared_pool.load(std::memory_order_acquire);
  if (current) return current;
  // A forked child has the parent's pool but none of its threads: it starts another.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });
  (void)registered;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh && !shared_pool.compare_exchange_strong(current, fresh)) {
    delete fresh;
    return current;
  }
  return fresh;
}

}  // namespace

void parallel_for(int64_t count, int32_t threads, void (*body)(void*, int64_t), void* context) {
  if (threads > 1 && count > 1) {
    Pool* shared = pool();
    if (shared && shared->busy.try_lock()) {
      std::lock_guard<std::mutex> lock(shared->busy, std::adopt_lock);
      shared->run(count, threads, body, context);
      return;
    }
  }
  for (int64_t index = 0; index < count; ++index) body(context, index);
}

}  // namespace ql
