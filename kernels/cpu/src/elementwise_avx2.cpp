#include "elementwise.h"

namespace ql {
const EngineKernels avx2_engine = kEngineKernels;
}
