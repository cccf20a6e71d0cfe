// What the file of a kernel begins with: instructions, and the 16-bit type that it is compiled for
// (QL_BFLOAT 0, 1: of inputs, outputs or both).
#pragma once

#include "device.h"

#if QL_BFLOAT
using Element = ptx::BFloat;
#else
using Element = ptx::Half;
#endif
using ptx::Shared;
