#include "elementwise.h"

namespace ql {
const EngineKernels avx512_engine = kEngineKernels;
}
