#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <new>

#include "abi.h"

namespace ql {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kSlabBytes = 32 << 20;
constexpr int64_t kLargest = kSlabBytes / 4;  // in a slab; beyond, a mapping of its own
constexpr int64_t kAlignment = 64;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Addresses of `bytes`, from a border of huge pages on. Only what is written becomes memory.
uint8_t* map_memory(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), wanted = round_up(bytes, page);
  void* mapped = mmap(nullptr, static_cast<size_t>(wanted + kHugePage), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  uint8_t* begin = static_cast<uint8_t*>(mapped);
  const int64_t ahead = -reinterpret_cast<intptr_t>(begin) & (kHugePage - 1);
  if (ahead) munmap(begin, static_cast<size_t>(ahead));
  if (ahead < kHugePage) {
    munmap(begin + ahead + wanted, static_cast<size_t>(kHugePage - ahead));
  }
#ifdef MADV_HUGEPAGE
  madvise(begin + ahead, static_cast<size_t>(wanted), MADV_HUGEPAGE);  // a wish: it may fail
#endif
  return begin + ahead;
}

void unmap_memory(uint8_t* memory, int64_t bytes) {
  munmap(memory, static_cast<size_t>(round_up(bytes, sysconf(_SC_PAGESIZE))));
}

// Handed out from the front to the back; never reused before it is empty.
struct Slab {
  uint8_t* memory;
  int64_t used;
  int64_t live;  // pieces handed out and not given back
  Slab* next;
};

std::mutex mutex;
Slab* slabs = nullptr;  // the first one is filled

uint8_t* take_from_slab(int64_t bytes) {
  if (!slabs || slabs->used + bytes > kSlabBytes) {
    Slab* slab = new (std::nothrow) Slab{map_memory(kSlabBytes), 0, 0, slabs};
    if (!slab) return nullptr;
    if (!slab->memory) {
      delete slab;
      return nullptr;
    }
    slabs = slab;
  }
  uint8_t* piece = slabs->memory + slabs->used;
  slabs->used += bytes;
  ++slabs->live;
  return piece;
}

// Whole pages inside a piece that was given back.
void drop_pages(uint8_t* piece, int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = round_up(reinterpret_cast<intptr_t>(piece), page);
  const int64_t end = (reinterpret_cast<intptr_t>(piece) + bytes) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_DONTNEED);
  }
}

void return_to_slab(uint8_t* piece, int64_t bytes) {
  for (Slab** link = &slabs; *link; link = &(*link)->next) {
    Slab* slab = *link;
    if (piece < slab->memory || piece >= slab->memory + kSlabBytes) continue;
    if (--slab->live == 0) {
      *link = slab->next;
      unmap_memory(slab->memory, kSlabBytes);
      delete slab;
    } else {
      drop_pages(piece, bytes);
    }
    return;
  }
}

}  // namespace

uint8_t* allocate(int64_t bytes) {
  bytes = round_up(bytes, kAlignment);
  if (bytes > kLargest) return map_memory(bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  return take_from_slab(bytes);
}

void release(uint8_t* memory, int64_t bytes) {
  bytes = round_up(bytes, kAlignment);
  if (bytes > kLargest) return unmap_memory(memory, bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  return_to_slab(memory, bytes);
}

}  // namespace ql

uint8_t* ql_allocate(int64_t bytes) { return ql::allocate(bytes); }

void ql_free(uint8_t* memory, int64_t bytes) {
  if (memory) ql::release(memory, bytes);
}
