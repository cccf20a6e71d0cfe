#include "elementwise.h"

namespace ql {
const EngineKernels portable_engine = kEngineKernels;
}
