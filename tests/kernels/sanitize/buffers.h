// Memory whose end a sanitizer sees, random numbers, and a count of what went wrong.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

inline std::atomic<int64_t> calls{0}, failures{0};

// Counts a call; says what failed when `right` is false.
inline void expect(bool right, const char* what, const char* where, int64_t a = 0, int64_t b = 0) {
  calls.fetch_add(1);
  if (right) return;
  failures.fetch_add(1);
  fprintf(stderr, "wrong: %s (%s, %lld, %lld)\n", what, where, static_cast<long long>(a),
          static_cast<long long>(b));
}

// Numbers of a type on the heap, the last of them at the end of its allocation. `ahead` bytes
// before the first one spoil the alignment of malloc; `alignment` asks for more than that instead.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t count, int64_t ahead = 0, int64_t alignment = 0)
      : bytes_(count * static_cast<int64_t>(sizeof(T))) {
    const size_t whole = static_cast<size_t>(bytes_ + ahead);
    if (alignment == 0) {
      base_ = malloc(whole);
    } else if (posix_memalign(&base_, static_cast<size_t>(alignment), whole) != 0) {
      base_ = nullptr;
    }
    if (!base_) abort();
    data_ = reinterpret_cast<T*>(static_cast<uint8_t*>(base_) + ahead);
    memset(static_cast<void*>(data_), 0, static_cast<size_t>(bytes_));
  }
  Exact(const Exact& other) = delete;
  Exact(Exact&& other) noexcept : base_(other.base_), data_(other.data_), bytes_(other.bytes_) {
    other.base_ = nullptr;
  }
  ~Exact() { free(base_); }

  T* get() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }
  int64_t count() const { return bytes_ / static_cast<int64_t>(sizeof(T)); }
  int64_t bytes() const { return bytes_; }

 private:
  void* base_;
  T* data_;
  int64_t bytes_;
};

// Floats alone: aligned as floats are, and no better.
inline Exact<float> exact_floats(int64_t count) { return Exact<float>(count, sizeof(float)); }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit));
  }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }
  void fill(const Exact<float>& values, float low, float high) {
    for (int64_t i = 0; i < values.count(); ++i) values[i] = uniform(low, high);
  }

 private:
  std::mt19937_64 engine_;
};

// Equal as numbers, or both none.
inline bool same(const Exact<float>& a, const Exact<float>& b) {
  for (int64_t i = 0; i < a.count(); ++i) {
    if (a[i] != b[i] && (a[i] == a[i] || b[i] == b[i])) return false;
  }
  return a.count() == b.count();
}

inline bool same_bytes(const Exact<uint8_t>& a, const Exact<uint8_t>& b) {
  return a.count() == b.count() && memcmp(a.get(), b.get(), static_cast<size_t>(a.bytes())) == 0;
}
