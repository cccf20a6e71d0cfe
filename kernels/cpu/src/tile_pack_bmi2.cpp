// Rearranging weights with PDEP and PEXT.
#include "tile_pack.h"

namespace ql {
const TilePacker bmi2_packer = {pack_strip<move_any_codes<true>>, unpack_strip};
}
