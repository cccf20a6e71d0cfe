// What an instruction set's translation unit offers: one table of functions each (tiles.h), no
// symbols shared by name.
//
// One rule keeps the dispatch safe. A translation unit built with -mavx512* must not emit code that
// the linker could merge with that of another unit: an inline function or template with external
// linkage, instantiated here, could replace the portable copy and crash an older CPU. So the ISA
// units and the headers they share use anonymous namespaces only, and nothing from the C++ standard
// library.
#pragma once

#include "abi.h"

namespace ql {

// The x86 tables exist where build.py compiles them, which it tells driver.cpp by QL_X86.
extern const TileKernels portable_tiles;
extern const TileKernels avx2_tiles;
extern const TileKernels avx2vnni_tiles;
extern const TileKernels avx512vnni_tiles;
extern const TileKernels avx512_tiles;

// The kernels of a QlIsa; null when this processor does not have it.
const TileKernels* kernels_of(int32_t isa);

// Between canonical tensors and tiles, one strip of one segment at a time: any thread, any order.
// `tiles` are those that ql_tile_describe gives; rows is that of the whole weight.
struct TilePacker {
  void (*pack)(const QlSegment& segment, const TileSegment& tiles, int64_t rows, int64_t strip);
  void (*unpack)(const QlSegment& segment, const TileSegment& tiles, int64_t rows, int64_t strip);
};

extern const TilePacker portable_packer;
extern const TilePacker bmi2_packer;
extern const TilePacker avx512_packer;  // with VBMI

}  // namespace ql
