// Input vectors in the forms in which linears read them.
#pragma once

#include "engine_plan.h"

namespace ql {

// One thread's memory to work in: what the widest preparation of the plan needs of each.
struct PrepareWork {
  int8_t* rounded;
  float* arranged;
};

// Floats of PrepareWork::arranged that a preparation of `columns` inputs needs.
int64_t arranged_floats(const Preparation& p, int64_t columns);

// Writes row `row` of `in`, which Preparation::input has given, from the vector x [columns].
void prepare_row(const TileKernels& tiles, const Preparation& p, const float* x, int64_t columns,
                 const TileInput& in, int64_t row, const PrepareWork& work);

}  // namespace ql
