// Plain C++ for any processor.
#include "tile_portable.h"

namespace ql {
const TileKernels portable_tiles = {
    no_terms, fill_no_terms,
    scratch_bytes, strips<true>,   scratch_bytes, strips<false>,
    round_token,   round_token_as, arrange_token, dequantize_rows,
};
}
