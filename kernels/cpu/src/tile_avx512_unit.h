// The int8 entries of an AVX-512 unit's table.
#pragma once

#include "tile_avx512_panel.h"

namespace vnni {
namespace {

constexpr int64_t kManyTokens = 13;  // from here on, panels are faster

int64_t int8_scratch_bytes(const ql::TiledWeight&, int64_t tokens) {
  return tokens < kManyTokens ? 0 : panel_scratch_bytes(tokens);
}

void int8_strips(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 int64_t first, int64_t last, uint8_t* scratch) {
  for (int64_t strip = first; strip < last; ++strip) {
    if (in.tokens < kManyTokens) {
      decode_strip(w, in, out, strip);
    } else {
      panel_strip(w, in, out, strip, scratch);
    }
  }
}

}  // namespace
}  // namespace vnni
