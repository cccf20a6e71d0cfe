// What the int8 kernels of AVX2 share: a segment's format and activations, and the way from dot
// products to totals. The arithmetic is in tiles.h.
#pragma once

#include "tile_avx2_codes.h"
#include "tile_avx2_dot.h"
#include "tile_meta.h"

namespace {

// Calls f(bytes, dot) for the format of a segment.
template <class Function>
inline void with_bytes(const ql::TileSegment& s, const Function& f) {
  if (s.integer_values) {
    switch (s.bits) {
      case 4:
        return f(CodeBytes<4, true>(s), Dots<dots_width(24)>());
      case 5:
        return f(CodeBytes<5, true>(s), Dots<dots_width(56)>());
      case 6:
        return f(CodeBytes<6, true>(s), Dots<dots_width(120)>());
      default:
        return f(CodeBytes<7, true>(s), Dots<dots_width(248)>());
    }
  }
  switch (s.bits) {
    case 2:
      return f(CodeBytes<2, false>(s), Dots<dots_width(3)>());
    case 3:
      return f(CodeBytes<3, false>(s), Dots<dots_width(7)>());
    case 4:
      return f(CodeBytes<4, false>(s), Dots<dots_width(15)>());
    case 5:
      return f(CodeBytes<5, false>(s), Dots<dots_width(31)>());
    case 6:
      return f(CodeBytes<6, false>(s), Dots<dots_width(63)>());
    case 7:
      return f(CodeBytes<7, false>(s), Dots<dots_width(127)>());
    default:
      return f(CodeBytes<8, false>(s), Dots<dots_width(255)>());
  }
}

// The activations of one segment, from the first of some tokens on.
struct SegmentInput {
  const int8_t* values;
  const float* sums;    // of the segment's runs
  const float* scales;  // of its activation groups
  const ql::TileInput* all;
  int64_t index;        // of the segment
  int64_t run;          // columns of a run; tiles.h says what these are
  int64_t runs;         // of a piece
  bool whole;           // has_whole_sums

  float sum(int64_t token, int64_t at) const { return sums[token * all->sum_stride + at]; }
  float scale(int64_t token, int64_t k) const {
    return scales[token * all->scale_stride + k / all->act_group];
  }
};

// Calls f(segment, its activations from `token` on) for each segment.
template <class Function>
inline void for_segments(const ql::TiledWeight& w, const ql::TileInput& in, int64_t token,
                         const Function& f) {
  const int8_t* values = in.values + token * in.value_stride;
  const float* sums = in.sums + token * in.sum_stride;
  const float* scales = in.scales + token * in.scale_stride;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const ql::TileSegment& s = w.segments[i];
    const int64_t run = run_columns(s, in.act_group);
    f(s, SegmentInput{values, sums + sum_offset(s.padded, run), scales, &in, i, run, s.piece / run,
                      has_whole_sums(s, in.act_group)});
    values += s.padded;
    sums += sum_count(s.padded);
    if (in.act_group > 0) scales += act_group_count(s.padded, in.act_group);
  }
}

// What dot products and sums of activations of a piece are multiplied by: floats, or with whole sums
// the bits of integers.
struct RunMeta {
  alignas(32) float scale[kLanes];
  alignas(32) float zero[kLanes];
};

// Writes them for a piece, vector by vector: GCC moves a RunMeta that is returned or copied in
// pieces, and whoever reads whole vectors then waits for the stores.
inline void read_meta(const ql::TileSegment& s, const SegmentInput& in, const uint8_t* meta,
                      const float* factors, RunMeta* to) {
  if (!in.whole) {
    store(to->scale, stored_scales(s, meta) * load(factors) * broadcast(s.integer_unit));
    store(to->zero, zero_lanes_of(s, meta));
    return;
  }
  const IntLanes stored = load_u8(meta);
  const IntLanes scale = stored & broadcast_int((1 << s.scale_bits) - 1);
  IntLanes zero = broadcast_int(static_cast<int32_t>(s.zero_constant));
  if (s.zero_kind == ql::ZERO_NIBBLE) {
    zero = (stored >> s.scale_bits) * broadcast_int(s.zero_units);
  } else if (s.zero_kind == ql::ZERO_BYTE) {
    zero = load_u8(meta + ql::kBlockRows) * broadcast_int(s.zero_units);
  }
  store(to->scale, bits_as_floats(scale * broadcast_int(s.code_units)));
  store(to->zero, bits_as_floats(scale * zero));
}

// The same for each of its runs.
inline void read_metas(const ql::TileSegment& s, const SegmentInput& in, const uint8_t* meta,
                       const float* factors, RunMeta* to) {
  read_meta(s, in, meta, factors, to);
  for (int64_t i = 1; i < in.runs; ++i) {
    store(to[i].scale, load(to->scale));
    store(to[i].zero, load(to->zero));
  }
}

// c - a * b, rounded once.
inline Lanes minus_product(Lanes c, Lanes a, Lanes b) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}

// Adds the dot products of `runs` runs from number `at`, column k, on, less zero * sum, times their
// scales, to the totals of `tokens` tokens from `token` on: metas[r] and dots[r * tokens + t] are
// those of run r, totals of tokens are kStripRows apart.
template <int tokens>
__attribute__((noinline)) void add_runs(const SegmentInput& in, int64_t token, int64_t at,
                                        int64_t k, int64_t runs, const RunMeta* metas,
                                        const IntLanes* dots, float* rows) {
  Lanes totals[tokens];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) totals[t] = load(rows + t * ql::kStripRows);
  const int64_t stride = in.all->sum_stride;
  const float* sums = in.sums + token * stride + at;
  for (int64_t r = 0; r < runs; ++r, dots += tokens) {
    const Lanes scale = load(metas[r].scale), zero = load(metas[r].zero);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const Lanes sum = broadcast(sums[t * stride + r]);
      Lanes dot = minus_product(floats_of(dots[t]), zero, sum);
      if (in.all->act_group > 0) dot = dot * broadcast(in.scale(token + t, k + r * in.run));
      totals[t] = fma(dot, scale, totals[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) store(rows + t * ql::kStripRows, totals[t]);
}

// The same for whole sums.
template <int tokens>
__attribute__((noinline)) void add_whole_runs(const SegmentInput& in, int64_t token, int64_t at,
                                              int64_t runs, const RunMeta* metas,
                                              const IntLanes* dots, int32_t* rows) {
  IntLanes whole[tokens];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) whole[t] = load_int(rows + t * ql::kStripRows);
  const int64_t stride = in.all->sum_stride;
  const float* sums = in.sums + token * stride + at;
  for (int64_t r = 0; r < runs; ++r, dots += tokens) {
    const IntLanes scale = float_bits(load(metas[r].scale));
    const IntLanes zero = float_bits(load(metas[r].zero));
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const IntLanes sum = rounded_ints(broadcast(sums[t * stride + r]));
      whole[t] = whole[t] + (dots[t] * scale - zero * sum);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) store_int(rows + t * ql::kStripRows, whole[t]);
}

// Both.
template <int tokens>
inline void add_dots(const SegmentInput& in, int64_t token, int64_t k, int64_t columns,
                     const RunMeta* metas, const IntLanes* dots, int32_t* whole, float* totals) {
  const int64_t runs = (columns + in.run - 1) / in.run, at = k / in.run;
  if (in.whole) return add_whole_runs<tokens>(in, token, at, runs, metas, dots, whole);
  add_runs<tokens>(in, token, at, k, runs, metas, dots, totals);
}

// Whether a run of whole sums ends before column `end`, where a piece does.
inline bool ends_run(const ql::TileSegment& s, const SegmentInput& in, int64_t end) {
  return in.whole && (end % ql::kWholeRun == 0 || end == s.padded);
}

// The total with a run's whole sum.
inline Lanes end_run(const ql::TileSegment& s, const float* factors, IntLanes whole, Lanes total) {
  const Lanes factor = load(factors) * broadcast(1.0f / static_cast<float>(s.code_units));
  return fma(floats_of(whole), factor, total);
}

// The same of `tokens` tokens whose rows are kStripRows apart; whole sums begin anew.
inline void end_runs(const ql::TileSegment& s, const float* factors, int64_t tokens, int32_t* whole,
                     float* totals) {
  for (int64_t t = 0; t < tokens; ++t, whole += ql::kStripRows, totals += ql::kStripRows) {
    store(totals, end_run(s, factors, load_int(whole), load(totals)));
    store_int(whole, broadcast_int(0));
  }
}

}  // namespace
