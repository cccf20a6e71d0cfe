// One step of the decoder, as every thread of the team runs it (engine.h says what is computed).
//
// A region of the team spans the whole step. Between two barriers its threads share one loop: over
// the strips of all linears that read one input, or over units of attention. What is small is not
// shared: for a single token every thread makes its own copy of the input (sum, norm, rounding),
// which costs less than waiting for it. With more tokens the rows are shared out, and a barrier
// follows.
#pragma once

#include <vector>

#include "engine_work.h"
#include "team.h"

namespace ql {

// Consecutive rows of a step that belong to one sequence.
struct StepRun {
  int64_t sequence;
  int64_t first_row;
  int64_t rows;
  int64_t position;  // of the first row
  int64_t splits_before;  // kSplitPositions begun by the runs before, for the place of partials
};

// Splits of all positions up to `position`: at least what any window needs.
inline int64_t full_splits(int64_t position) { return position / kSplitPositions + 1; }

struct StepContext {
  const Plan* plan;
  const EngineIsa* isa;
  const KvLayer* caches;  // one per layer
  const QlStep* step;
  const StepRun* runs;
  int64_t run_count;
  bool decode;  // every run has one row
  float* logits;
  StepWork* work;
};

// Body of run_team; the context is a StepContext.
void run_step(void* context, const Member& member);

// The attention of one layer by one thread of the region: from the rows of `qkv` to those of
// `heads`. Begins and ends between barriers of its own.
void run_attention(const StepContext& context, const Member& member, int64_t layer);

// What a layer asks of attention.
AttentionShape attention_shape(const Plan& plan, int64_t layer);

}  // namespace ql
