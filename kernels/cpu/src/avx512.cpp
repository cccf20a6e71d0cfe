// AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#include "avx512_exact.h"
#include "avx512_int8.h"
#include "avx512_panel.h"

namespace {

int64_t int8_scratch_bytes(const QlWeight& w, int64_t tokens) {
  Arena arena{nullptr};
  if (tokens < kManyTokens) {
    RowGroups(w, arena);
  } else {
    Panel(w, arena);
  }
  return arena.used;
}

void int8_rows(const Problem& p, int64_t begin, int64_t end, uint8_t* scratch) {
  Arena arena{scratch};
  if (p.tokens < kManyTokens) {
    const RowGroups groups(*p.weight, arena);
    for (int64_t row = begin; row < end; ++row) {
      with_constant<1, kManyTokens - 1>(p.tokens,
                                        [&](auto count) { int8_row<count.value>(p, row, groups); });
    }
    return;
  }
  const Panel panel(*p.weight, arena);
  for (int64_t row = begin; row < end; row += kPanelRows) {
    const int64_t rows = smaller(kPanelRows, end - row);
    fill_panel(*p.weight, row, rows, panel);
    for (int64_t token = 0; token < p.tokens; token += kPanelTokens) {
      with_constant<1, kPanelTokens>(smaller(p.tokens - token, kPanelTokens), [&](auto count) {
        panel_tile<count.value>(p, row, rows, token, panel);
      });
    }
  }
}

}  // namespace

namespace ql {
const IsaKernels avx512_kernels = {
    {kPanelRows, 2000000, int8_token_bytes, int8_scratch_bytes, int8_prepare, int8_rows},
    {8, 1000000, exact_token_bytes, exact_scratch_bytes, exact_prepare, exact_rows},
    groups_scratch_bytes,
    dequantize_row,
};
}
