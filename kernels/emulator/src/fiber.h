// Fibers: stacks of their own that hand over to each other by name, on one thread of the machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr std::size_t kStackBytes = std::size_t{1} << 16;

// Where a fiber that does not run goes on: a stack pointer, below which its registers lie.
using Suspended = void*;

// A fiber that will call `entry` when it is first switched to; `entry` must not return. The stack
// is kStackBytes from `stack`.
Suspended make_fiber(unsigned char* stack, void (*entry)());
// Suspends the caller into `from` and goes on with `to`.
extern "C" void ql_switch_fiber(Suspended* from, Suspended to);
// Whether the fiber has kept to its stack: a pattern at the stack's end is untouched.
bool stack_is_whole(const unsigned char* stack);

}  // namespace emulator
