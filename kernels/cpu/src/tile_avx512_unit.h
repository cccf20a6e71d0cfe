// The int8 entries of an AVX-512 unit's table.
#pragma once

#include "tile_avx512_panel.h"

namespace vnni {
namespace {

// Tokens from which on panels are faster, as they unpack codes once, where tiles of kTileTokens do so
// anew. Masks and shifts hardly disturb VPDPBUSD: where nothing else is needed, it takes more tokens.
// Measured on Zen 4.
constexpr int64_t kManyTokens = 17, kManyWithMasks = 49;

int64_t many_tokens(const ql::TiledWeight& w, int64_t act_group) {
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const bool masks = (s.bits == 2 || s.bits == 4) && !s.integer_values;
    if (!masks || has_whole_sums(s, act_group)) return kManyTokens;
  }
  return kManyWithMasks;
}

// TokenTerms of all tokens come first, where the caller has not made them.
int64_t term_bytes(const ql::TiledWeight& w, int64_t tokens, int64_t act_group) {
  return tokens * TokenTerms::stride(w, act_group) * static_cast<int64_t>(sizeof(int32_t));
}

int64_t int8_scratch_bytes(const ql::TiledWeight& w, int64_t tokens) {
  constexpr int64_t shortest = 16;  // activation group: no other has more runs
  return term_bytes(w, tokens, shortest) + (tokens <= kFewest ? 0 : panel_scratch_bytes(tokens));
}

void int8_strips(const ql::TiledWeight& w, const ql::TileInput& in, const ql::TileOutput& out,
                 int64_t first, int64_t last, uint8_t* scratch) {
  const int32_t* terms = in.terms;
  if (!terms) {
    int32_t* const own = reinterpret_cast<int32_t*>(scratch);
    TokenTerms::fill(w, in, own);
    scratch += term_bytes(w, in.tokens, in.act_group);
    terms = own;
  }
  const int64_t many = many_tokens(w, in.act_group);
  for (int64_t strip = first; strip < last; ++strip) {
    // A last strip with a single block is rare, and not worth kernels of its own.
    const bool whole = in.tokens <= kFewest || tile_blocks(w, strip) == 2;
    if (in.tokens < many && whole) {
      decode_strip(w, in, out, terms, strip);
    } else {
      panel_strip(w, in, out, terms, strip, scratch);
    }
  }
}

}  // namespace
}  // namespace vnni
