// Shared and global memory: every access is checked, and bank conflicts are counted.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {
namespace {

constexpr int kMany = -2;  // readers
constexpr uint32_t kBanks = 32, kBankBytes = 4;

void check_range(const Block& block, uint32_t address, uint32_t bytes) {
  if (address % bytes != 0) fault("shared memory: %u bytes at %u are not aligned", bytes, address);
  if (uint64_t{address} + bytes > block.memory.size()) {
    fault("shared memory: %u bytes at %u, of %zu", bytes, address, block.memory.size());
  }
}

void note_read(const Fiber& fiber, const Block& block, SharedWord& word, uint32_t at) {
  if (word.copier >= 0) fault("shared memory: read at %u, where a copy may be writing", at);
  if (word.written == 0) fault("shared memory: read at %u, where nobody has written", at);
  if (word.writer != fiber.id && word.written == block.epoch) {
    fault("shared memory: read at %u, written by thread %u without a barrier between", at,
          state.fibers[word.writer].place.thread.x);
  }
  word.reader = word.read == block.epoch && word.reader != fiber.id ? kMany : fiber.id;
  word.read = block.epoch;
}

void check_write(const Fiber& fiber, const Block& block, const SharedWord& word, uint32_t at) {
  if (word.copier >= 0) fault("shared memory: write at %u, where a copy may be writing", at);
  if (word.writer != fiber.id && word.written == block.epoch) {
    fault("shared memory: write at %u, written by thread %u without a barrier between", at,
          state.fibers[word.writer].place.thread.x);
  }
  if (word.reader != fiber.id && word.read == block.epoch) {
    fault("shared memory: write at %u, which others read without a barrier between", at);
  }
}

unsigned char* shared_of(Fiber& fiber, uint32_t address, uint32_t bytes, Access access) {
  Block& block = block_of(fiber);
  check_range(block, address, bytes);
  for (uint32_t at = address; at < address + bytes; at += 4) {
    SharedWord& word = block.words[at / 4];
    if (access == Access::read) {
      note_read(fiber, block, word, at);
    } else {
      check_write(fiber, block, word, at);
      word.writer = fiber.id;
      word.written = block.epoch;
    }
  }
  return block.memory.data() + address;
}

TrackedBuffer& buffer_of(const void* address, uint32_t bytes) {
  const auto place = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fault("global memory: %u bytes at %p are not aligned", bytes, address);
  }
  for (TrackedBuffer& buffer : state.buffers) {
    if (place >= buffer.base && place + bytes <= buffer.base + buffer.bytes) return buffer;
  }
  for (const TrackedBuffer& buffer : state.buffers) {
    if (place + bytes > buffer.base && place < buffer.base + buffer.bytes + 4096) {
      fault("global memory: %u bytes at offset %td of a buffer of %llu", bytes,
            place - buffer.base, static_cast<unsigned long long>(buffer.bytes));
    }
  }
  fault("global memory: %u bytes at %p are in no buffer of the launch", bytes, address);
}

bool knows(const Fiber& fiber, const GlobalWord& word) {
  if (word.writer < 0 || word.writer == fiber.id) return true;
  const Block& block = block_of(fiber);
  const int writer_block = state.fibers[word.writer].block;
  if (writer_block == fiber.block) return word.epoch < block.epoch;
  return std::any_of(block.learned.begin(), block.learned.end(), [&](const Learned& fact) {
    const bool published = word.epoch < fact.bound ||
                           (word.epoch == fact.bound && word.writer == fact.releaser);
    const bool arrived = fact.thread == fiber.id || fact.epoch < block.epoch;
    return fact.block == writer_block && published && arrived;
  });
}

void check_order(TrackedBuffer& buffer, const void* address, uint32_t bytes, const char* what) {
  if (buffer.words.empty()) return;
  const auto offset = static_cast<const unsigned char*>(address) - buffer.base;
  for (auto at = offset / 4; at <= (offset + bytes - 1) / 4; ++at) {
    const GlobalWord& word = buffer.words[at];
    // Neighbours may write the halves of one word: only whole words are tracked when reading.
    if (bytes < 4 && state.running->id != word.writer) continue;
    if (!knows(*state.running, word)) {
      fault("global memory: %s at offset %td, written by thread %u of block %u and not released "
            "to this one",
            what, offset, state.fibers[word.writer].place.thread.x,
            state.fibers[word.writer].place.block.x);
    }
  }
}

TrackedBuffer& written_buffer(const void* address, uint32_t bytes) {
  TrackedBuffer& buffer = buffer_of(address, bytes);
  if (!buffer.writable) fault("global memory: write into a buffer that is only read");
  return buffer;
}

void note_write(TrackedBuffer& buffer, const void* address, uint32_t bytes) {
  const auto offset = static_cast<const unsigned char*>(address) - buffer.base;
  for (auto at = offset / 4; at <= (offset + bytes - 1) / 4; ++at) {
    buffer.words[at] = {state.running->id, block_of(*state.running).epoch};
  }
  state.idle_yields = 0;
}

void arrive(const Copy& copy) {
  const Fiber& fiber = *state.running;
  Block& block = block_of(fiber);
  unsigned char* to = block.memory.data() + copy.address;
  std::memset(to, 0, 16);
  if (copy.source_bytes > 0) std::memcpy(to, copy.source, copy.source_bytes);
  for (uint32_t at = copy.address; at < copy.address + 16; at += 4) {
    block.words[at / 4] = {block.epoch, 0, fiber.id, -1, -1};
  }
}

}  // namespace

unsigned char* shared(uint32_t address, uint32_t bytes, Access access) {
  return shared_of(*state.running, address, bytes, access);
}

unsigned char* shared_of_lane(int lane, uint32_t address, uint32_t bytes, Access access) {
  return shared_of(state.fibers[state.running->warp * kLanes + lane], address, bytes, access);
}

void count_bank_conflicts(const uint32_t addresses[32], uint32_t bytes) {
  // A wavefront serves 128 bytes: 32 lanes of 4, 16 of 8 or 8 of 16.
  const int lanes = static_cast<int>(kBanks * kBankBytes / bytes);
  for (int first = 0; first < kLanes; first += lanes) {
    std::vector<uint32_t> words;
    for (int lane = first; lane < first + lanes; ++lane) {
      for (uint32_t at = 0; at < bytes; at += kBankBytes) {
        words.push_back((addresses[lane] + at) / kBankBytes);
      }
    }
    std::sort(words.begin(), words.end());  // one word read by many lanes is read once
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::array<uint64_t, kBanks> in_bank{};
    for (uint32_t word : words) ++in_bank[word % kBanks];
    const uint64_t wavefronts = *std::max_element(in_bank.begin(), in_bank.end());
    counters.bank_conflicts += wavefronts - std::min<uint64_t>(wavefronts, 1);
  }
}

void copy_async(uint32_t address, const void* source, uint32_t source_bytes) {
  Fiber& fiber = *state.running;
  Block& block = block_of(fiber);
  check_range(block, address, 16);
  if (source_bytes > 16) fault("an asynchronous copy of %u bytes, of at most 16", source_bytes);
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fault("an asynchronous copy from %p, which is not aligned to 16 bytes", source);
  }
  if (source_bytes > 0) {
    // The last of the bytes as well as the first; only those that are copied must exist.
    buffer_of(source, 1);
    const auto last = static_cast<const unsigned char*>(source) + source_bytes - 1;
    check_order(buffer_of(last, 1), last, 1, "copy");
  }
  for (uint32_t at = address; at < address + 16; at += 4) {
    SharedWord& word = block.words[at / 4];
    check_write(fiber, block, word, at);
    word.copier = fiber.id;
  }
  fiber.open.push_back({address, static_cast<const unsigned char*>(source), source_bytes});
  ++counters.copies;
  counters.copied_bytes += source_bytes;
}

void commit_copies() {
  Fiber& fiber = *state.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_copies(int pending) {
  auto& groups = state.running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

const void* global_read(const void* address, uint32_t bytes) {
  check_order(buffer_of(address, bytes), address, bytes, "read");
  ++counters.global_reads;
  return address;
}

void* global_write(void* address, uint32_t bytes) {
  TrackedBuffer& buffer = written_buffer(address, bytes);
  check_order(buffer, address, bytes, "write");
  note_write(buffer, address, bytes);
  ++counters.global_writes;
  return address;
}

int load_acquire(const int* address) {
  yield();
  buffer_of(address, sizeof(int));
  const Fiber& fiber = *state.running;
  Block& block = block_of(fiber);
  for (Learned fact : state.releases[address]) {
    fact.thread = fiber.id;
    fact.epoch = block.epoch;
    block.learned.push_back(fact);
  }
  return *static_cast<const volatile int*>(address);
}

void store_release(int* address, int value) {
  note_write(written_buffer(address, sizeof(int)), address, sizeof(int));
  const Fiber& fiber = *state.running;
  const Block& block = block_of(fiber);
  std::vector<Learned> facts{{fiber.block, block.epoch, fiber.id, -1, 0}};
  for (const Learned& fact : block.learned) {
    if (fact.thread == fiber.id || fact.epoch < block.epoch) facts.push_back(fact);
  }
  state.releases[address] = facts;
  *address = value;
}

}  // namespace emulator
