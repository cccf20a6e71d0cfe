// Makes a kernel callable by the machine. A kernel's file ends with QL_KERNEL(name), which means
// nothing to a CUDA compiler.
#pragma once

#include <cstddef>
#include <utility>

namespace emulator {

template <class... Parameters, std::size_t... index>
void call(void (*kernel)(Parameters...), void* const* arguments, std::index_sequence<index...>) {
  kernel(*static_cast<Parameters*>(arguments[index])...);
}

// `arguments` point at the values, in order: what cuLaunchKernel calls kernelParams.
template <class... Parameters>
void call(void (*kernel)(Parameters...), void* const* arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace emulator

#define QL_KERNEL(name)                                                     \
  namespace emulator {                                                      \
  extern "C" void ql_emulated_kernel(void* const* arguments) {              \
    call(name, arguments);                                                  \
  }                                                                         \
  }
