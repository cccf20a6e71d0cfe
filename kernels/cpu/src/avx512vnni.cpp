// AVX-512 with VNNI and without VBMI: Cascade Lake, Cooper Lake.
#include "kernels.h"
#include "tile_avx512_unit.h"
#include "tile_exact.h"

namespace ql {
const TileKernels avx512vnni_tiles = {
    vnni::TokenTerms::stride,  vnni::TokenTerms::fill,
    vnni::int8_scratch_bytes, vnni::int8_strips, exact_scratch_bytes, exact_strips,
    round_token,              round_token_as,    arrange_token,       dequantize_rows,
};
}
