// Memory for tiles: a few large mappings that the system may fill with huge pages.
//
// A token reads every weight once, in order; with pages of 4 KB the processor would spend a part of
// that on finding them. Small weights share a slab, since a huge page of their own would be mostly
// empty.
#pragma once

#include <cstdint>

namespace ql {

// 64-byte aligned memory, zero when it is fresh from the system; null when there is none.
uint8_t* allocate(int64_t bytes);

// Gives back what `allocate` returned for as many bytes. The pages of a slab are returned at once,
// its addresses when nothing in it is left.
void release(uint8_t* memory, int64_t bytes);

}  // namespace ql
