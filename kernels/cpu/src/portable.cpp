// Plain C++ for any processor; the compiler vectorizes it for the baseline instruction set.
#include "row_kernels.h"

namespace {

struct Portable {
  using Spread = ::Spread;
  typedef float Vector __attribute__((vector_size(16)));

  static void dot4(const int16_t* w, int64_t stride, const int16_t* a, int64_t count,
                   int32_t* sums) {
    for (int r = 0; r < 4; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += static_cast<int32_t>(w[r * stride + i]) * a[i];
      sums[r] = sum;
    }
  }
};

}  // namespace

namespace ql {
const IsaKernels portable_kernels = RowKernels<Portable>::table(/*serial_work=*/150000);
}
