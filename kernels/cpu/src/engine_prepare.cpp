#include "engine_prepare.h"

#include <algorithm>

namespace ql {
namespace {

// The weight whose segments a preparation follows; a dense one has all columns in one.
class Like {
 public:
  Like(const Preparation& p, int64_t columns) : tiled_(p.like) {
    whole_.length = whole_.padded = columns;
    plain_ = {&whole_, 1, 0, columns};
  }
  Like(const Like&) = delete;
  Like& operator=(const Like&) = delete;
  const TiledWeight& weight() const { return tiled_ ? *tiled_ : plain_; }

 private:
  const TiledWeight* tiled_;
  TileSegment whole_{};
  TiledWeight plain_{};
};

void lay_out(const TiledWeight& w, const float* x, float* to) {
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const TileSegment& segment = w.segments[i];
    std::fill(std::copy_n(x + segment.start, segment.length, to), to + segment.padded, 0.0f);
    to += segment.padded;
  }
}

// Rounded numbers as floats. Scales of segments and of groups are multiplied in, that of a whole
// token is left to the end.
void widen(const TiledWeight& w, int64_t act_group, const int8_t* values, float* scales,
           float* to) {
  if (act_group == 0) {
    std::copy_n(values, tile_padded_columns(w), to);
    return;
  }
  const float* scale = scales;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const int64_t padded = w.segments[i].padded, group = act_group > 0 ? act_group : padded;
    for (int64_t k = 0; k < padded; k += group, ++scale) {
      const int64_t count = std::min(group, padded - k);
      for (int64_t j = 0; j < count; ++j) *to++ = static_cast<float>(*values++) * *scale;
    }
  }
  *scales = 1.0f;
}

}  // namespace

int64_t arranged_floats(const Preparation& p, int64_t columns) {
  return p.form ? form_work_floats(Like(p, columns).weight(), *p.form) : 0;
}

void prepare_row(const TileKernels& tiles, const Preparation& p, const float* x, int64_t columns,
                 const TileInput& in, int64_t row, const PrepareWork& work) {
  const Like like(p, columns);
  const TiledWeight& w = like.weight();
  const int64_t at = row * in.value_stride;
  // The memory is this step's own: it is const for the kernels that read it.
  float* floats = const_cast<float*>(in.floats) + (in.floats ? at : 0);
  if (p.mode == QL_INPUT_EXACT) {
    if (p.form) return tiles.arrange_token(w, *p.form, x, work.arranged, floats);
    return lay_out(w, x, floats);
  }
  int8_t* values = p.mode == QL_INPUT_INT8 ? const_cast<int8_t*>(in.values) + at : work.rounded;
  float* sums = const_cast<float*>(in.sums) + row * in.sum_stride;
  float* scales = const_cast<float*>(in.scales) + row * in.scale_stride;
  if (p.form) {
    tiles.round_token_as(w, *p.form, x, work.arranged, values, sums, scales);
  } else {
    tiles.round_token(w, x, p.act_group, values, sums, scales);
  }
  if (p.mode == QL_INPUT_ROUNDED) widen(w, p.act_group, values, scales, floats);
}

}  // namespace ql
