// What this machine gives at most, for benchmarks to print beside a kernel: plain reads of memory,
// and 8-bit multiply-adds in registers. Neither does any work; both start at the same moment on all
// threads and are timed until the last is done.
#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#include "abi.h"
#include "places.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

// Calls part(0..threads-1), each on a thread of its own and all at once; seconds from the common
// start to the last end, or 0 when the system gives no more threads. Threads that start after a
// pause are all put on the caller's processor at first: each takes a place of its own.
template <typename Part>
double timed(int32_t threads, Part part) {
  std::atomic<int32_t> ready{0};
  std::atomic<bool> start{false}, cancelled{false};
  ql::Places places;
  std::vector<std::thread> helpers;
  places.begin();
  try {
    for (int32_t index = 1; index < threads; ++index) {
      helpers.emplace_back([&, index] {
        places.settle();
        ready.fetch_add(1);
        while (!start.load(std::memory_order_acquire)) std::this_thread::yield();
        if (!cancelled.load()) part(index);
      });
    }
  } catch (const std::system_error&) {
    cancelled.store(true);
  }
  while (!cancelled.load() && ready.load() + 1 < threads) std::this_thread::yield();
  const auto begin = Clock::now();
  start.store(true, std::memory_order_release);
  if (!cancelled.load()) part(0);
  for (auto& helper : helpers) helper.join();
  return cancelled.load() ? 0.0 : std::chrono::duration<double>(Clock::now() - begin).count();
}

// Keeps the compiler from dropping sums nobody reads, but lets them live in registers until here.
template <int count, typename Vector>
inline __attribute__((always_inline)) void keep(const Vector (&sums)[count]) {
  Vector total = sums[0];
#pragma GCC unroll 16
  for (int index = 1; index < count; ++index) total += sums[index];
  asm volatile("" : : "m"(total) : "memory");
}

// Reads `bytes` (a multiple of 64 * streams) as `streams` sequences side by side, and asks for
// `ahead` bytes in advance (0: leaves that to the processor).
template <int streams>
void read_all(const uint8_t* data, int64_t bytes, int64_t ahead) {
  typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));
  const int64_t part = bytes / streams;
  Line sums[streams] = {};
  for (int64_t at = 0; at < part; at += 64) {
    for (int stream = 0; stream < streams; ++stream) {
      const uint8_t* line = data + stream * part + at;
      if (ahead) __builtin_prefetch(line + ahead, 0, 3);
      sums[stream] += *reinterpret_cast<const Line*>(line);
    }
  }
  keep(sums);
}

#ifdef __x86_64__

constexpr int64_t kRepeats = 1 << 18;  // about a millisecond
constexpr int kChains = 12;  // independent sums: more than latency times throughput of any processor

// Operations (two for each multiply-add) that one call of the functions below does.
constexpr int64_t operations(int64_t lanes) { return 2 * 4 * lanes * kChains * kRepeats; }

__attribute__((target("avx512f,avx512vnni"))) void multiply_avx512vnni() {
  __m512i sums[kChains] = {};
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  for (int64_t repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = _mm512_dpbusd_epi32(sums[chain], a, b);
      asm volatile("" : "+v"(sums[chain]));  // else equal chains become one
    }
  }
  keep(sums);
}

// What 4-bit codes need at least: eight VPMADDUBSW, whose sums 16 bits hold, to one VPMADDWD.
__attribute__((target("avx2"))) void multiply_avx2() {
  constexpr int products = 8, chains = 4;
  __m256i sums[chains] = {};
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-5), ones = _mm256_set1_epi16(1);
  for (int64_t repeat = 0; repeat < kRepeats * kChains / (products * chains); ++repeat) {
    __m256i pairs[chains] = {};
#pragma GCC unroll 8
    for (int product = 0; product < products; ++product) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
        asm volatile("" : "+x"(a));  // else one product would do for all
        pairs[chain] = _mm256_add_epi16(pairs[chain], _mm256_maddubs_epi16(a, b));
        asm volatile("" : "+x"(pairs[chain]));  // sums stay in this order
      }
    }
    for (int chain = 0; chain < chains; ++chain) {
      sums[chain] = _mm256_add_epi32(sums[chain], _mm256_madd_epi16(pairs[chain], ones));
    }
  }
  keep(sums);
}

#endif

}  // namespace

// Seconds that `threads` threads take to read `data`, each its own contiguous share in `streams`
// (1, 2 or 4) sequences. `bytes` is a multiple of 256 * threads, `data` of 64. 0 when the system
// gives no threads.
QL_API double ql_read_seconds(const uint8_t* data, int64_t bytes, int32_t threads, int32_t streams,
                              int64_t ahead) {
  const int64_t share = bytes / threads;
  return timed(threads, [=](int32_t index) {
    const uint8_t* mine = data + index * share;
    if (streams == 4) {
      read_all<4>(mine, share, ahead);
    } else if (streams == 2) {
      read_all<2>(mine, share, ahead);
    } else {
      read_all<1>(mine, share, ahead);
    }
  });
}

// 8-bit operations (two for each multiply-add) per second of `threads` threads that only multiply
// registers: with VPDPBUSD, or as AVX2 can multiply exactly with 4-bit codes (a wider code takes
// more). 0 where neither is known.
QL_API double ql_multiply_peak(int32_t threads) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512vnni")) {
    const double seconds = timed(threads, [](int32_t) { multiply_avx512vnni(); });
    return seconds > 0 ? threads * operations(16) / seconds : 0.0;
  }
  if (__builtin_cpu_supports("avx2")) {
    const double seconds = timed(threads, [](int32_t) { multiply_avx2(); });
    return seconds > 0 ? threads * operations(8) / seconds : 0.0;
  }
#endif
  return 0.0;
}
