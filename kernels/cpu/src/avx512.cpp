// AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#include "kernels.h"
#include "tile_avx512_unit.h"
#include "tile_exact.h"

namespace ql {
const TileKernels avx512_tiles = {
    vnni::TokenTerms::stride,  vnni::TokenTerms::fill,
    vnni::int8_scratch_bytes, vnni::int8_strips, exact_scratch_bytes, exact_strips,
    round_token,              round_token_as,    arrange_token,       dequantize_rows,
};
}
