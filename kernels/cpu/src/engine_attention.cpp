#include <algorithm>

#include "engine_step.h"

namespace ql {
namespace {

constexpr int64_t kRowsAtOnce = 12;  // two tiles of a product; their heads fit the L1 cache

// One thread's view of a layer's attention.
class Attention {
 public:
  Attention(const StepContext& context, const Member& member, int64_t layer)
      : context_(context),
        member_(member),
        model_(context.plan->model),
        layer_(context.plan->layers[static_cast<size_t>(layer)].source),
        cache_(context.caches[layer]),
        shape_(attention_shape(*context.plan, layer)),
        kernels_(*context.isa->attention),
        shared_(context.work->shared),
        own_(context.work->threads[static_cast<size_t>(member.index)]) {}

  // One token of each sequence: units are splits of the positions, and the one that holds the new
  // position also appends it, so that nobody waits for it.
  void decode() const {
    const int64_t most = most_of([&](const StepRun& run) { return splits_of(run); });
    for_units(most, [&](const StepRun& run, int64_t head, int64_t split) {
      if (split < splits_of(run)) attend_split(run, head, split);
    });
    member_.barrier();
    if (most == 1) return;
    for_units(1, [&](const StepRun& run, int64_t head, int64_t) { merge(run, head); });
    member_.barrier();
  }

  // Prompts: all keys and values are appended, in blocks of the cache, before any query looks.
  void prefill() const {
    for_units(most_of(append_blocks), [&](const StepRun& run, int64_t head, int64_t block) {
      if (block < append_blocks(run)) append(run, head, block);
    });
    member_.barrier();
    const int64_t most = most_of([&](const StepRun& run) { return attend_blocks(run); });
    for_units(most, [&](const StepRun& run, int64_t head, int64_t block) {
      // From the end: late positions see more, and what takes longest should begin first.
      if (most - 1 - block < attend_blocks(run)) attend(run, head, most - 1 - block);
    });
    member_.barrier();
  }

 private:
  template <typename Blocks>
  int64_t most_of(Blocks blocks) const {
    int64_t most = 0;
    for (int64_t r = 0; r < context_.run_count; ++r) {
      most = std::max(most, blocks(context_.runs[r]));
    }
    return most;
  }

  // Shares body(run, head, block) out among the threads, block after block.
  template <typename Body>
  void for_units(int64_t blocks, Body body) const {
    const int64_t in_block = context_.run_count * cache_.kv_heads;
    int64_t unit, end;
    while (member_.next(blocks * in_block, 1, &unit, &end)) {
      const int64_t index = unit % in_block;
      body(context_.runs[index / cache_.kv_heads], index % cache_.kv_heads, unit / in_block);
    }
  }

  int64_t splits_of(const StepRun& run) const { return attention_splits(shape_, run.position); }

  static int64_t append_blocks(const StepRun& run) {
    return (run.position + run.rows - 1) / kKvBlock - run.position / kKvBlock + 1;
  }

  int64_t attend_blocks(const StepRun& run) const {
    const int64_t tokens = attention_tokens(cache_, shape_);
    return (run.rows + tokens - 1) / tokens;
  }

  float* q(int64_t row) const { return shared_.qkv + row * shared_.qkv_stride; }
  float* k(int64_t row) const { return q(row) + model_.heads * model_.head_dim; }
  float* v(int64_t row) const { return k(row) + model_.kv_heads * model_.head_dim; }
  float* out(int64_t row) const { return shared_.heads + row * shared_.heads_stride; }

  // Norm and rope of `count` heads of a row.
  void place(float* heads, int64_t count, const float* norm, int64_t row) const {
    const EngineKernels& engine = *context_.isa->engine;
    for (int64_t i = 0; i < count; ++i, heads += model_.head_dim) {
      if (norm) engine.rms_norm(heads, norm, model_.head_dim, model_.norm_epsilon, heads);
      if (layer_.rope < 0) continue;
      const int64_t pairs = context_.plan->ropes[static_cast<size_t>(layer_.rope)].count;
      const float* cosine = angles() + row * pairs;
      engine.rotate(heads, cosine, cosine + context_.step->count * pairs, pairs);
    }
  }

  // Cosines of all rows for this layer's rope; sines follow.
  const float* angles() const {
    const float* at = shared_.angles;
    for (int32_t i = 0; i < layer_.rope; ++i) {
      at += 2 * context_.step->count * context_.plan->ropes[static_cast<size_t>(i)].count;
    }
    return at;
  }

  int64_t group() const { return model_.heads / model_.kv_heads; }

  // Times the basis of a KV head: `heads` heads of `rows` rows.
  void change_basis(int64_t kv_head, float* x, int64_t rows, int64_t heads) const {
    if (!layer_.key_basis) return;
    const int64_t size = model_.head_dim, floats = size * kv_padded(size);
    context_.isa->engine->turn({layer_.key_basis + kv_head * floats, x, shared_.qkv_stride, rows,
                                heads, size});
  }

  // Queries of a KV head in some rows, from x on, as they meet keys. They belong to rows `row` and
  // on of the step. A few at a time, so that each pass finds them in the cache.
  void make_queries(float* x, int64_t kv_head, int64_t row, int64_t rows) const {
    for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
      some_queries(x + i * shared_.qkv_stride, kv_head, row + i, std::min(kRowsAtOnce, rows - i));
    }
  }

  void some_queries(float* x, int64_t kv_head, int64_t row, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      place(x + i * shared_.qkv_stride, group(), layer_.q_norm, row + i);
    }
    change_basis(kv_head, x, rows, group());
    if (layer_.query_bits == 0) return;
    const float levels = static_cast<float>((1 << (layer_.query_bits - 1)) - 1);
    for (int64_t i = 0; i < rows * group(); ++i) {
      float* head = x + i / group() * shared_.qkv_stride + i % group() * model_.head_dim;
      context_.isa->engine->round_to_levels(head, model_.head_dim, levels);
    }
  }

  void append_rows(const StepRun& run, int64_t head, int64_t position, int64_t count) const {
    const int64_t row = run.first_row + position - run.position, at = head * model_.head_dim;
    for (int64_t i = row; i < row + count; ++i) place(k(i) + at, 1, layer_.k_norm, i);
    change_basis(head, k(row) + at, count, 1);
    kernels_.append(cache_, run.sequence, head, position, count, k(row) + at, shared_.qkv_stride,
                    v(row) + at, shared_.qkv_stride);
  }

  void attend_split(const StepRun& run, int64_t head, int64_t split) const {
    const int64_t splits = splits_of(run), row = run.first_row;
    if (split == splits - 1) append_rows(run, head, run.position, 1);
    // Units of one head each make queries of their own: the row is everybody's.
    const int64_t first = head * group() * model_.head_dim;
    std::copy_n(q(row) + first, group() * model_.head_dim, own_.query + first);
    make_queries(own_.query + first, head, row, 1);
    if (splits == 1) {
      kernels_.attend_tokens(cache_, shape_, run.sequence, head, run.position, 1, own_.query, 0,
                             out(row), 0, own_.scratch);
    } else {
      kernels_.attend_split(cache_, shape_, run.sequence, head, run.position, split, own_.query,
                            partial(run, head, split), own_.scratch);
    }
  }

  // A head's splits lie side by side.
  float* partial(const StepRun& run, int64_t head, int64_t split) const {
    const int64_t before = run.splits_before * cache_.kv_heads;
    const int64_t index = before + head * full_splits(run.position) + split;
    return shared_.partials + index * partial_floats(cache_, shape_);
  }

  void merge(const StepRun& run, int64_t head) const {
    const int64_t splits = splits_of(run);
    if (splits == 1) return;
    kernels_.merge_splits(cache_, shape_, head, splits, partial(run, head, 0), out(run.first_row),
                          own_.scratch);
  }

  void append(const StepRun& run, int64_t head, int64_t block) const {
    const int64_t begin = (run.position / kKvBlock + block) * kKvBlock;
    const int64_t end = run.position + run.rows;
    const int64_t first = begin > run.position ? begin : run.position;
    const int64_t last = begin + kKvBlock < end ? begin + kKvBlock : end;
    append_rows(run, head, first, last - first);
    const int64_t row = run.first_row + first - run.position;
    make_queries(q(row) + head * group() * model_.head_dim, head, row, last - first);
  }

  void attend(const StepRun& run, int64_t head, int64_t block) const {
    const int64_t step = attention_tokens(cache_, shape_), begin = block * step;
    const int64_t count = begin + step < run.rows ? step : run.rows - begin;
    const int64_t row = run.first_row + begin;
    kernels_.attend_tokens(cache_, shape_, run.sequence, head, run.position + begin, count, q(row),
                           shared_.qkv_stride, out(row), shared_.heads_stride, own_.scratch);
  }

  const StepContext& context_;
  const Member& member_;
  const QlModel& model_;
  const QlLayer& layer_;
  const KvLayer& cache_;
  const AttentionShape shape_;
  const AttentionKernels& kernels_;
  const SharedWork& shared_;
  const ThreadWork& own_;
};

}  // namespace

AttentionShape attention_shape(const Plan& plan, int64_t layer) {
  const QlLayer& source = plan.layers[static_cast<size_t>(layer)].source;
  return {plan.model.heads,
          source.window,
          source.attention_scale,
          source.attention_softcap,
          plan.model.integer_attention,
          0};
}

void run_attention(const StepContext& context, const Member& member, int64_t layer) {
  const Attention attention(context, member, layer);
  if (context.decode) {
    attention.decode();
  } else {
    attention.prefill();
  }
}

}  // namespace ql
