#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <new>
#include <system_error>
#include <thread>

#include "places.h"

namespace ql {
namespace {

// How long the caller of a region waits for helpers before it starts without the missing ones.
constexpr std::chrono::microseconds kPatience{1000};

// How many threads are of use. Where other processes need the processors too, threads that wait
// for one another take longer than one alone: each waits for the other's turn at every barrier.
class Crowding {
 public:
  int32_t limit(int32_t wanted) const { return std::min(wanted, limit_); }

  // After a region of so many threads: how long it took and how long they slept at barriers, all
  // together.
  void learn(int32_t threads, int64_t nanoseconds, int64_t slept) {
    const bool crowded = slept > nanoseconds / 2 * (threads - 1);
    crowded_ = crowded ? crowded_ + 1 : 0;
    if (crowded_ == kInARow) {  // one slow region may be anything
      crowded_ = 0;
      limit_ = std::max(1, threads / 2);
      left_ = pause_ = std::min(2 * pause_, kLongestPause);
    } else if (limit_ == kNoLimit) {
      pause_ = std::max(pause_ / 2, kShortestPause);
    } else if (--left_ == 0) {
      limit_ = limit_ > threads ? kNoLimit : 2 * limit_;  // more than were asked for: enough
      left_ = pause_;
    }
  }

 private:
  static constexpr int32_t kNoLimit = INT32_MAX;
  static constexpr int32_t kInARow = 8, kShortestPause = 4, kLongestPause = 64;  // in regions
  int32_t crowded_ = 0;  // regions in a row
  int32_t limit_ = kNoLimit;
  int32_t pause_ = kShortestPause;
  int32_t left_ = 0;
};

class Team {
 public:
  // One caller at a time works with the team.
  bool acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }

  void run_loop(int64_t count, int32_t threads, void (*body)(void*, int64_t), void* context) {
    loop_body_ = body;
    region_body_ = nullptr;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    const int32_t helpers = call(threads - 1);
    work();
    wait_for_helpers(helpers - slots_.exchange(0));
  }

  void run_region(int32_t threads, void (*body)(void*, const Member&), void* context) {
    const auto begin = std::chrono::steady_clock::now();
    loop_body_ = nullptr;
    region_body_ = body;
    context_ = context;
    members_.store(0, std::memory_order_relaxed);
    const int32_t helpers = call(crowding_.limit(threads) - 1);
    int64_t slept = wait_for_slots();
    const int32_t joined = helpers - slots_.exchange(0);
    region_.open(joined + 1);
    members_.store(joined + 1);
    started_.wake();
    body(context, Member{&region_, 0, joined + 1});
    slept += wait_for_helpers(joined);
    slept += region_.slept();
    crowding_.learn(helpers + 1, WaitingRoom::nanoseconds_since(begin), slept);
  }

 private:
  // Offer the job to `wanted` threads; returns how many there are to take it.
  int32_t call(int32_t wanted) {
    while (workers_ < wanted) {
      try {
        std::thread(&Team::serve, this, generation_.load()).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: fewer do the same work
      }
      ++workers_;
    }
    const int32_t helpers = offered_ = wanted < workers_ ? wanted : workers_;
    finished_.store(0, std::memory_order_relaxed);
    if (helpers == 0) return 0;
    std::fegetenv(&float_environment_);
    places_.begin();
    slots_.store(helpers);  // after everything above: whoever takes a slot sees the job
    generation_.fetch_add(1);
    called_.wake();
    return helpers;
  }

  // Both return the nanoseconds they took, 0 when they had only to look.
  int64_t wait_for_slots() const {
    const auto taken = [&] { return slots_.load() == 0; };
    if (WaitingRoom::look(taken)) return 0;
    const auto begin = std::chrono::steady_clock::now();
    while (!taken() && std::chrono::steady_clock::now() - begin < kPatience) {
      std::this_thread::yield();
    }
    return WaitingRoom::nanoseconds_since(begin);
  }

  int64_t wait_for_helpers(int32_t count) {
    return ended_.wait([&] { return finished_.load() == count; });
  }

  void work() {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      loop_body_(context_, index);
    }
  }

  void serve(uint64_t seen) {
    for (;;) {
      called_.wait([&] { return generation_.load() != seen; });
      seen = generation_.load();
      int32_t left = slots_.load();
      while (left > 0 && !slots_.compare_exchange_weak(left, left - 1)) {
      }
      if (left > 0) join(left);
    }
  }

  // The job stays as it is until `finished_` counts this thread. Slots are taken from the highest
  // down, so that the numbers of the members of a region have no gap when some slots stay empty.
  void join(int32_t slot) {
    std::fesetenv(&float_environment_);  // rounding and flush-to-zero as the caller has them
    places_.settle();
    if (region_body_) {
      started_.wait([&] { return members_.load() > 0; });
      region_body_(context_, Member{&region_, offered_ - slot + 1, members_.load()});
    } else {
      work();
    }
    finished_.fetch_add(1);
    ended_.wake();
  }

  std::atomic<bool> busy_{false};
  int32_t workers_ = 0;
  WaitingRoom called_, started_, ended_;
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int32_t> slots_{0};  // helpers that may still join the job
  alignas(64) std::atomic<int32_t> finished_{0};
  alignas(64) std::atomic<int32_t> members_{0};  // of the region; 0 until it starts
  alignas(64) std::atomic<int64_t> next_{0};
  // The job; written only while nobody can join and all who had joined have finished.
  alignas(64) int32_t offered_ = 0;
  int64_t count_ = 0;
  void (*loop_body_)(void*, int64_t) = nullptr;
  void (*region_body_)(void*, const Member&) = nullptr;
  void* context_ = nullptr;
  std::fenv_t float_environment_{};
  Places places_;
  Crowding crowding_;
  Region region_;
};

// Never destroyed: its threads still wait on it when the process exits.
std::atomic<Team*> shared_team{nullptr};

Team* team() {
  Team* current = shared_team.load(std::memory_order_acquire);
  if (current) return current;
  // A forked child has the parent's team but none of its threads: it starts another.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { shared_team.store(nullptr); });
  (void)registered;
  Team* fresh = new (std::nothrow) Team;
  if (fresh && !shared_team.compare_exchange_strong(current, fresh)) {
    delete fresh;
    return current;
  }
  return fresh;
}

// The team when it is there and free, else null.
Team* acquire_team() {
  Team* shared = team();
  return shared && shared->acquire() ? shared : nullptr;
}

}  // namespace

void Region::open(int32_t threads) {
  threads_ = threads;
  next_.store(0, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  slept_.store(0, std::memory_order_relaxed);
}

void Region::barrier() {
  if (threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1);
    waiting_.wake();
  } else {
    const int64_t slept = waiting_.wait([&] { return phase_.load() != phase; });
    if (slept > 0) slept_.fetch_add(slept, std::memory_order_relaxed);
  }
}

bool Region::next(int64_t count, int64_t most, int64_t* first, int64_t* last) {
  int64_t at = next_.load(std::memory_order_relaxed), take;
  do {
    const int64_t left = count - at;
    if (left <= 0) return false;
    take = std::min(threads_ == 1 ? left : std::max<int64_t>(left * 3 / (4 * threads_), 1), most);
  } while (!next_.compare_exchange_weak(at, at + take, std::memory_order_relaxed));
  *first = at;
  *last = at + take;
  return true;
}

void Member::barrier() const { region->barrier(); }

bool Member::next(int64_t count, int64_t most, int64_t* first, int64_t* last) const {
  return region->next(count, most, first, last);
}

void parallel_for(int64_t count, int32_t threads, void (*body)(void*, int64_t), void* context) {
  if (threads > 1 && count > 1) {
    if (Team* shared = acquire_team()) {
      shared->run_loop(count, threads, body, context);
      shared->release();
      return;
    }
  }
  for (int64_t index = 0; index < count; ++index) body(context, index);
}

void run_team(int32_t threads, void (*body)(void*, const Member&), void* context) {
  if (threads > 1) {
    if (Team* shared = acquire_team()) {
      shared->run_region(threads, body, context);
      shared->release();
      return;
    }
  }
  Region alone;
  alone.open(1);
  body(context, Member{&alone, 0, 1});
}

}  // namespace ql
