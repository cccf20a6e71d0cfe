// A decoder model as the engine runs it: the caller's description (engine.h), checked and copied,
// with the linears that read one input put side by side.
#pragma once

#include <vector>

#include "engine.h"

namespace ql {

// A form in which linears read an input vector. Linears of a group share it when they agree on all
// of this.
struct Preparation {
  const TiledWeight* like;  // whose segments it follows; null: the plain vector, for dense weights
  const TileForm* form;     // null: as mode and act_group say
  int64_t act_group;        // as TileInput has it
  int32_t mode;      // QlInputMode
  int64_t elements;  // of a token: int8 or float, segment after segment, padded
  int64_t stride;    // from token to token, see TileInput
  int64_t sums;      // of a token; 0 unless int8
  int64_t scales;    // of a token; 0 when exact

  // Bytes of the prepared inputs of so many tokens, a multiple of 64.
  int64_t bytes(int64_t tokens) const;
  // Where they lie in memory that begins at `base`.
  TileInput input(uint8_t* base, int64_t tokens) const;
};

struct PlannedLinear {
  QlLinear source;
  int64_t strips;       // of 32 rows
  int64_t preparation;  // index into the group's
  int64_t first_row;    // in the group's output; 0 where its rows have places
};

constexpr int64_t kMostLinears = 12;  // of a group: q, k and v in four blocks of rows each

// Linears that read the same input; their outputs are parts of one vector.
struct LinearGroup {
  std::vector<PlannedLinear> linears;
  std::vector<Preparation> preparations;
  int64_t columns = 0;  // K
  int64_t rows = 0;     // of all
  int64_t strips = 0;   // of all
  bool placed = false;  // rows of some have places of their own

  int64_t input_bytes(int64_t tokens) const;
};

struct PlannedLayer {
  QlLayer source;
  LinearGroup qkv, o, gate_up, down;
  bool gates_at_once;  // rows of gate and up lie so that a thread makes both halves of a product
};

// Where a row of a group's output is made.
struct RowSource {
  int32_t linear;
  int32_t row;
};

struct Plan {
  QlModel model;
  std::vector<PlannedLayer> layers;
  std::vector<QlRope> ropes;
  LinearGroup embedding, head;
  LinearGroup enter, leave;  // without linears where the model has none
  std::vector<RowSource> embedding_rows;  // of every token
};

// The smallest odd multiple of 64 elements that holds a row: rows that far apart do not fall into
// the same cache sets.
int64_t odd_stride(int64_t elements);

// Fills `plan`; returns null, or what is wrong with the model: a static string.
const char* make_plan(const QlModel& model, Plan* plan);

}  // namespace ql
