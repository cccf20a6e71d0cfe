// Work space cut into parts, counted first and taken then, by the same lines of code.
#pragma once

#include <cstdint>

namespace ql {

// Hands out 64-byte aligned parts of a buffer; counts bytes when the buffer is null.
class Parts {
 public:
  explicit Parts(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace ql
