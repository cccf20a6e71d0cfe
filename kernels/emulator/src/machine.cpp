// Who runs next, what a barrier and a meeting of lanes are, and the launch itself.
#include "machine.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulator {

const Place* here = nullptr;
Counters counters;
State state;

namespace {

// Without a change of memory, this many turns of waiting threads are a wait for ever.
constexpr uint64_t kIdleYields = 100000;
// One turn in so many of a random schedule is taken from its warp before it has to stop.
constexpr uint64_t kPreempt = 256, kReprioritize = 8;

Suspended scheduler = nullptr;
Kernel kernel = nullptr;
void* const* kernel_arguments = nullptr;
char failure[512];
bool failed = false;
uint64_t seed = 0, random_state = 0;
int64_t lowest = 0;  // priority of who yielded last

uint64_t random_number() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1du;
}

int64_t random_priority() { return static_cast<int64_t>(random_number() >> 1); }

void suspend() {
  ++counters.switches;
  ql_switch_fiber(&state.running->suspended, scheduler);
}

void make_ready(int id) {
  const Fiber& fiber = state.fibers[id];
  state.warps[fiber.warp].ready.push_back(fiber.lane);
}

void pass_barrier(Block& block) {
  block.arrived = 0;
  ++block.epoch;
  ++counters.barriers;
  state.idle_yields = 0;
  for (const Fiber& fiber : state.fibers) {
    if (&block_of(fiber) == &block && !fiber.ended && &fiber != state.running) make_ready(fiber.id);
  }
}

void run_kernel() {
  kernel(kernel_arguments);
  Fiber& fiber = *state.running;
  for (const auto& group : fiber.groups) {
    if (!group.empty()) fault("the thread ends before its copies have arrived");
  }
  if (!fiber.open.empty()) fault("the thread ends with copies that it did not commit");
  fiber.ended = true;
  Block& block = block_of(fiber);
  --block.alive;
  if (block.alive > 0 && block.arrived == block.alive) pass_barrier(block);
  suspend();
}

// The number of the warp with ready lanes that has the highest priority, or -1. Running one warp as
// far as it gets, with priorities that change now and then, finds more missing barriers than
// fairness does.
int next_warp() {
  int best = -1;
  for (int w = 0; w < static_cast<int>(state.warps.size()); ++w) {
    const Warp& warp = state.warps[w];
    if (warp.ready.empty()) continue;
    if (best < 0 || warp.priority > state.warps[best].priority) best = w;
  }
  return best;
}

int take_lane(Warp& warp) {
  const std::size_t at = seed == 0 ? 0 : random_number() % warp.ready.size();
  const int lane = warp.ready[at];
  warp.ready.erase(warp.ready.begin() + static_cast<std::ptrdiff_t>(at));
  return lane;
}

void report_deadlock() {
  for (const Fiber& fiber : state.fibers) {
    if (fiber.ended) continue;
    const Warp& warp = state.warps[fiber.warp];
    std::snprintf(failure, sizeof failure,
                  "deadlock: thread %u of block %u waits for ever at %s", fiber.place.thread.x,
                  fiber.place.block.x, warp.meeting != nullptr ? warp.meeting : "a barrier");
    failed = true;
    return;
  }
}

void run_all() {
  while (!failed) {
    const int w = next_warp();
    if (w < 0) return report_deadlock();
    Warp& warp = state.warps[w];
    const int64_t priority = warp.priority;
    do {
      state.running = &state.fibers[w * kLanes + take_lane(warp)];
      here = &state.running->place;
      ql_switch_fiber(&scheduler, state.running->suspended);
      if (!failed && !stack_is_whole(state.running->stack)) {
        std::snprintf(failure, sizeof failure, "a thread needs more stack than %zu bytes",
                      kStackBytes);
        failed = true;
      }
      if (seed != 0 && random_number() % kPreempt == 0) warp.priority = random_priority();
    } while (!failed && !warp.ready.empty() && warp.priority == priority);
    if (seed != 0 && random_number() % kReprioritize == 0) warp.priority = random_priority();
  }
}

struct Launch {  // as the caller gives it, kernels/emulator/machine.py
  void* const* arguments;
  Buffer* buffers;
  int32_t buffer_count;
  uint32_t blocks, threads, shared_bytes;
  uint64_t seed;
};

void set_up(const Launch& launch, unsigned char* stacks) {
  seed = launch.seed;
  random_state = launch.seed * 0x9e3779b97f4a7c15u + 1;
  state = State{};
  counters = Counters{};
  failed = false;
  lowest = 0;
  state.fibers.resize(std::size_t{launch.blocks} * launch.threads);
  state.warps.resize(state.fibers.size() / kLanes);
  state.blocks.resize(launch.blocks);
  for (Block& block : state.blocks) {
    block.alive = static_cast<int>(launch.threads);
    block.memory.assign(launch.shared_bytes, 0xff);
    block.words.resize((launch.shared_bytes + 3) / 4);
  }
  for (std::size_t i = 0; i < state.fibers.size(); ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.id = static_cast<int>(i);
    fiber.block = static_cast<int>(i / launch.threads);
    fiber.warp = static_cast<int>(i / kLanes);
    fiber.lane = static_cast<int>(i % kLanes);
    const auto thread = static_cast<unsigned>(i % launch.threads);
    fiber.place = {{thread, 0, 0},
                   {static_cast<unsigned>(fiber.block), 0, 0},
                   {launch.blocks, 1, 1},
                   {launch.threads, 1, 1}};
    fiber.stack = stacks + i * kStackBytes;
    fiber.suspended = make_fiber(fiber.stack, run_kernel);
    make_ready(fiber.id);
  }
  for (std::size_t w = 0; w < state.warps.size(); ++w) {
    const auto in_order = static_cast<int64_t>(state.warps.size() - w);
    state.warps[w].priority = seed == 0 ? in_order : random_priority();
  }
  for (int i = 0; i < launch.buffer_count; ++i) {
    TrackedBuffer buffer;
    static_cast<Buffer&>(buffer) = launch.buffers[i];
    if (buffer.writable) buffer.words.resize((buffer.bytes + 3) / 4);
    state.buffers.push_back(std::move(buffer));
  }
}

}  // namespace

void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(failure, sizeof failure, format, arguments);
  va_end(arguments);
  if (length > 0 && static_cast<std::size_t>(length) < sizeof failure) {
    std::snprintf(failure + length, sizeof failure - static_cast<std::size_t>(length),
                  " (thread %u of block %u)", here->thread.x, here->block.x);
  }
  failed = true;
  suspend();
  __builtin_unreachable();  // the scheduler runs nobody after a failure
}

void barrier() {
  Block& block = block_of(*state.running);
  if (++block.arrived == block.alive) return pass_barrier(block);
  suspend();
}

void collective(const char* name, void* argument, Collective work) {
  Fiber& fiber = *state.running;
  Warp& warp = state.warps[fiber.warp];
  if (warp.arrived == 0) warp.meeting = name;
  if (std::strcmp(warp.meeting, name) != 0) {
    fault("lanes of a warp diverge: some are at %s, some at %s", warp.meeting, name);
  }
  warp.arguments[static_cast<std::size_t>(fiber.lane)] = argument;
  if (++warp.arrived < kLanes) return suspend();
  work(warp.arguments.data());
  warp.arrived = 0;
  warp.meeting = nullptr;
  state.idle_yields = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane != fiber.lane) warp.ready.push_back(lane);
  }
}

void yield() {
  if (++state.idle_yields > kIdleYields) {
    fault("waits for memory that nobody is going to change");
  }
  const Fiber& fiber = *state.running;
  Warp& warp = state.warps[fiber.warp];
  warp.priority = --lowest;
  warp.ready.push_back(fiber.lane);
  suspend();
}

// Defined in entry.h's kernel library.
extern "C" void ql_emulated_kernel(void* const* arguments);

// Runs a launch to its end. 0, or 1 and a sentence in `message` [512]. One at a time in a process.
extern "C" __attribute__((visibility("default"))) int ql_emulator_launch(const Launch* launch,
                                                                        Counters* counted,
                                                                        char* message) {
  const std::size_t bytes = std::size_t{launch->blocks} * launch->threads * kStackBytes;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) {
    std::snprintf(message, sizeof failure, "no memory for %zu bytes of stacks", bytes);
    return 1;
  }
  kernel = ql_emulated_kernel;
  kernel_arguments = launch->arguments;
  set_up(*launch, static_cast<unsigned char*>(stacks));
  run_all();
  munmap(stacks, bytes);
  if (failed) std::memcpy(message, failure, sizeof failure);
  *counted = counters;
  return failed ? 1 : 0;
}

}  // namespace emulator
