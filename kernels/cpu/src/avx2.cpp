// AVX2, FMA, BMI2, F16C: x86-64 processors from about 2013 on.
#include "kernels.h"
#include "tile_avx2.h"

namespace ql {
const TileKernels avx2_tiles = {
    no_terms, fill_no_terms,
    int8_scratch_bytes, int8_strips,    exact_scratch_bytes, exact_strips,
    round_token,        round_token_as, arrange_token,       dequantize_rows,
};
}
