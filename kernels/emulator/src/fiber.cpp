#include "fiber.h"

#include <cstring>

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly: port ql_switch_fiber to this processor"
#endif

// Saves what the System V calling convention lets a caller keep, and swaps the stacks.
asm(R"(
.text
.globl ql_switch_fiber
.type ql_switch_fiber, @function
ql_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ql_switch_fiber, .-ql_switch_fiber
)");

namespace emulator {
namespace {

constexpr uint64_t kPattern = 0x5ca1ab1e0ddba11u;
constexpr std::size_t kPatternWords = 16;

}  // namespace

Suspended make_fiber(unsigned char* stack, void (*entry)()) {
  for (std::size_t i = 0; i < kPatternWords; ++i) {
    std::memcpy(stack + i * sizeof kPattern, &kPattern, sizeof kPattern);
  }
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{63};
  auto words = reinterpret_cast<uintptr_t*>(top);
  *--words = 0;  // the return address of `entry`, which also aligns its frame
  *--words = reinterpret_cast<uintptr_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--words = 0;
  return words;
}

bool stack_is_whole(const unsigned char* stack) {
  for (std::size_t i = 0; i < kPatternWords; ++i) {
    if (std::memcmp(stack + i * sizeof kPattern, &kPattern, sizeof kPattern) != 0) return false;
  }
  return true;
}

}  // namespace emulator
