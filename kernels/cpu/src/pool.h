// A few threads that wait for work: the kernels' own, because torch's wheels carry a private OpenMP
// and a second one would keep as many threads again spinning.
#pragma once

#include <cstdint>

namespace ql {

// Calls body(context, index) for every index in [0, count), on up to `threads` threads including
// the caller, and returns when all are done. Which thread takes which index is not fixed. Safe to
// call from several threads at once and after a fork: while the pool is busy with another call, or
// gone, the caller does the work alone.
void parallel_for(int64_t count, int32_t threads, void (*body)(void* context, int64_t index),
                  void* context);

}  // namespace ql
