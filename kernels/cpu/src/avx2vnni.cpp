// AVX2 with AVX-VNNI (VPDPBUSD in its VEX form): Alder Lake and later, Zen 5.
#include "kernels.h"
#include "tile_avx2.h"

namespace ql {
const TileKernels avx2vnni_tiles = {
    no_terms, fill_no_terms,
    int8_scratch_bytes, int8_strips,    exact_scratch_bytes, exact_strips,
    round_token,        round_token_as, arrange_token,       dequantize_rows,
};
}
