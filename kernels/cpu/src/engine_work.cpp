#include "engine_work.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "parts.h"

namespace ql {
namespace {

// Calls visit(group, tokens) for every group of linears of a step.
template <typename Visit>
void for_groups(const Plan& plan, const StepSize& size, Visit visit) {
  for (const PlannedLayer& layer : plan.layers) {
    for (const LinearGroup* group : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      visit(*group, size.tokens);
    }
  }
  visit(plan.head, size.wanted);
  visit(plan.enter, size.tokens);
  visit(plan.leave, size.wanted);
}

// Numbers of a token between gate and up and the down projection.
int64_t widest_gated(const Plan& plan) {
  int64_t columns = 0;
  for (const PlannedLayer& layer : plan.layers) {
    columns = std::max(columns, layer.source.intermediate * (layer.gates_at_once ? 1 : 2));
  }
  return columns;
}

int64_t widest_row(const Plan& plan) {
  int64_t columns = plan.model.hidden;
  for (const PlannedLayer& layer : plan.layers) {
    columns = std::max(columns, layer.source.intermediate);
  }
  return columns;
}

int64_t most_linears(const Plan& plan) {
  size_t most = 0;
  for_groups(plan, StepSize{}, [&](const LinearGroup& group, int64_t) {
    most = std::max(most, group.linears.size());
  });
  return static_cast<int64_t>(most);
}

int64_t widest_preparation(const Plan& plan) {
  int64_t elements = 0;
  for_groups(plan, StepSize{}, [&](const LinearGroup& group, int64_t) {
    for (const Preparation& p : group.preparations) elements = std::max(elements, p.stride);
  });
  return elements;
}

int64_t widest_arranged(const Plan& plan) {
  int64_t floats = 0;
  for_groups(plan, StepSize{}, [&](const LinearGroup& group, int64_t) {
    for (const Preparation& p : group.preparations) {
      floats = std::max(floats, arranged_floats(p, group.columns));
    }
  });
  return floats;
}

int64_t kernel_scratch(const Plan& plan, const EngineIsa& isa, const KvLayer& cache,
                       const StepSize& size) {
  int64_t bytes = isa.attention->scratch_bytes(cache);
  for_groups(plan, size, [&](const LinearGroup& group, int64_t tokens) {
    if (tokens == 0) return;
    for (const PlannedLinear& linear : group.linears) {
      if (!linear.source.tiled) continue;
      const auto scratch_bytes = linear.source.mode == QL_INPUT_INT8
                                     ? isa.tiles->int8_scratch_bytes
                                     : isa.tiles->exact_scratch_bytes;
      bytes = std::max(bytes, scratch_bytes(*linear.source.tiled, tokens));
    }
  });
  return bytes;
}

// Terms of all tokens of a step, of the linear that has most.
int64_t most_terms(const Plan& plan, const EngineIsa& isa, const StepSize& size) {
  int64_t most = 0;
  for_groups(plan, size, [&](const LinearGroup& group, int64_t tokens) {
    for (const PlannedLinear& linear : group.linears) {
      if (linear.source.mode != QL_INPUT_INT8) continue;
      const Preparation& p = group.preparations[static_cast<size_t>(linear.preparation)];
      most = std::max(most, tokens * isa.tiles->term_count(*linear.source.tiled, p.act_group));
    }
  });
  return most;
}

}  // namespace

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Buffer::~Buffer() { free(data_); }

bool Buffer::reserve(int64_t bytes) {
  if (bytes <= size_) return true;
  free(data_);
  size_ = 0;
  const int64_t rounded = (bytes + 4095) / 4096 * 4096;
  data_ = static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>(rounded)));
  if (data_) size_ = rounded;
  return data_ != nullptr;
}

bool StepWork::reserve(const Plan& plan, const EngineIsa& isa, const KvLayer& cache,
                       const StepSize& size) {
  const bool as_before = size.tokens == size_.tokens && size.wanted == size_.wanted &&
                         size.partials <= size_.partials && size.threads == size_.threads &&
                         size.own_logits == size_.own_logits;
  if (as_before) return true;
  size_ = StepSize{};
  if (!reserve_shared(plan, size) || !reserve_threads(plan, isa, cache, size)) return false;
  size_ = size;
  return true;
}

bool StepWork::reserve_shared(const Plan& plan, const StepSize& size) {
  const QlModel& model = plan.model;
  int64_t inputs = 0, angles = 0;
  for_groups(plan, size, [&](const LinearGroup& group, int64_t tokens) {
    inputs = std::max(inputs, group.input_bytes(tokens));
  });
  for (const QlRope& rope : plan.ropes) angles += 2 * size.tokens * rope.count;
  SharedWork work{};
  work.hidden_stride = odd_stride(model.hidden);
  work.qkv_stride = odd_stride((model.heads + 2 * model.kv_heads) * model.head_dim);
  work.heads_stride = odd_stride(model.heads * model.head_dim);
  work.gated_stride = odd_stride(widest_gated(plan));
  // First to count, then, with the memory, to hand out.
  for (int pass = 0; pass < 2; ++pass) {
    Parts parts(pass == 0 ? nullptr : shared_memory_.data());
    work.hidden = parts.take<float>(size.tokens * work.hidden_stride);
    work.delta = parts.take<float>(size.tokens * work.hidden_stride);
    work.qkv = parts.take<float>(size.tokens * work.qkv_stride);
    work.heads = parts.take<float>(size.tokens * work.heads_stride);
    work.gated = parts.take<float>(size.tokens * work.gated_stride);
    work.logits = parts.take<float>(size.own_logits ? size.wanted * model.vocabulary : 0);
    work.partials = parts.take<float>(size.partials);
    work.angles = parts.take<float>(angles);
    work.inputs = parts.take<uint8_t>(inputs);
    if (pass == 0 && !shared_memory_.reserve(parts.used())) return false;
  }
  shared = work;
  return true;
}

bool StepWork::reserve_threads(const Plan& plan, const EngineIsa& isa, const KvLayer& cache,
                               const StepSize& size) {
  const QlModel& model = plan.model;
  const int64_t scratch = kernel_scratch(plan, isa, cache, size);
  term_stride = most_terms(plan, isa, size);
  int64_t inputs = 0;
  for_groups(plan, size, [&](const LinearGroup& group, int64_t) {
    inputs = std::max(inputs, group.input_bytes(1));
  });
  if (static_cast<int64_t>(thread_memory_.size()) < size.threads) {
    thread_memory_.resize(static_cast<size_t>(size.threads));
  }
  threads.assign(static_cast<size_t>(size.threads), ThreadWork{});
  for (size_t i = 0; i < threads.size(); ++i) {
    for (int pass = 0; pass < 2; ++pass) {
      Parts parts(pass == 0 ? nullptr : thread_memory_[i].data());
      threads[i].hidden = parts.take<float>(model.hidden);
      threads[i].row = parts.take<float>(widest_row(plan));
      threads[i].made = parts.take<float>(2 * size.tokens * gate_columns(size.tokens));
      threads[i].query = parts.take<float>(model.heads * model.head_dim);
      threads[i].prepare.rounded = parts.take<int8_t>(widest_preparation(plan));
      threads[i].prepare.arranged = parts.take<float>(widest_arranged(plan));
      threads[i].inputs = parts.take<uint8_t>(inputs);
      threads[i].terms = parts.take<int32_t>(most_linears(plan) * term_stride);
      threads[i].best = parts.take<int32_t>(size.wanted);
      threads[i].scratch = parts.take<uint8_t>(scratch);
      if (pass == 0 && !thread_memory_[i].reserve(parts.used())) return false;
    }
  }
  return true;
}

int64_t StepWork::bytes() const {
  int64_t total = shared_memory_.size();
  for (const Buffer& memory : thread_memory_) total += memory.size();
  return total;
}

}  // namespace ql
