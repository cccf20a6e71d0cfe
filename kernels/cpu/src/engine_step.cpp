#include "engine_step.h"

#include <algorithm>
#include <cstring>

#include "ordering.h"

namespace ql {
namespace {

constexpr int64_t kAnyRange = INT64_MAX;
constexpr int64_t kMostLinears = 3;  // of a group

// One thread's view of the step.
class Worker {
 public:
  Worker(const StepContext& context, const Member& member)
      : context_(context),
        member_(member),
        model_(context.plan->model),
        step_(*context.step),
        engine_(*context.isa->engine),
        shared_(context.work->shared),
        own_(context.work->threads[static_cast<size_t>(member.index)]) {}

  void run() const {
    const int64_t rows = step_.count;
    for (int64_t i = 0; i < model_.layer_count; ++i) {
      const PlannedLayer& layer = context_.plan->layers[static_cast<size_t>(i)];
      const QlLayer& source = layer.source;
      project(layer.qkv, rows, shared_.qkv, shared_.qkv_stride, [&](int64_t row) {
        enter_layer(i, row);
        return normed(hidden(row), source.input_norm);
      });
      run_attention(context_, member_, i);
      project(layer.o, rows, shared_.delta, shared_.hidden_stride,
              [&](int64_t row) { return shared_.heads + row * shared_.heads_stride; });
      project(layer.gate_up, rows, shared_.gate_up, shared_.gate_up_stride, [&](int64_t row) {
        add_delta(row, source.attention_out_norm);
        return normed(hidden(row), source.ffn_norm);
      });
      project(layer.down, rows, shared_.delta, shared_.hidden_stride,
              [&](int64_t row) { return gated(source.intermediate, row); });
    }
    leave();
    if (step_.wanted_count > 0) head();
  }

 private:
  // With a single token every thread keeps the residual stream by itself.
  float* hidden(int64_t row) const {
    return step_.count == 1 ? own_.hidden : shared_.hidden + row * shared_.hidden_stride;
  }

  // The residual stream of a row as it enters a layer, or leaves the last one.
  void enter_layer(int64_t layer, int64_t row) const {
    if (layer == 0) {
      embed(row);
    } else {
      add_delta(row, context_.plan->layers[static_cast<size_t>(layer) - 1].source.ffn_out_norm);
    }
    if (step_.hidden_states && (step_.count > 1 || member_.index == 0)) {
      float* to = step_.hidden_states + (layer * step_.count + row) * model_.hidden;
      std::copy_n(hidden(row), model_.hidden, to);
    }
  }

  void embed(int64_t row) const {
    float* x = hidden(row);
    if (step_.embeddings) {
      std::copy_n(step_.embeddings + row * model_.hidden, model_.hidden, x);
      return;
    }
    const QlLinear& embedding = model_.embedding;
    const int64_t id = step_.tokens[row];
    if (embedding.tiled) {
      context_.isa->tiles->dequantize_rows(*embedding.tiled, &id, 0, 1, x);
    } else {
      engine_.dense_row(dense(embedding), id, x);
    }
    if (model_.embedding_scale != 1.0f) engine_.multiply(x, model_.embedding_scale, model_.hidden);
  }

  void add_delta(int64_t row, const float* norm) const {
    const float* delta = shared_.delta + row * shared_.hidden_stride;
    engine_.add(hidden(row), normed(delta, norm), model_.hidden);
  }

  const float* normed(const float* x, const float* weight) const {
    if (!weight) return x;
    engine_.rms_norm(x, weight, model_.hidden, model_.norm_epsilon, own_.row);
    return own_.row;
  }

  const float* gated(int64_t count, int64_t row) const {
    const float* gate = shared_.gate_up + row * shared_.gate_up_stride;
    engine_.gate(gate, gate + count, count, model_.activation, own_.row);
    return own_.row;
  }

  static DenseWeight dense(const QlLinear& linear) {
    return {linear.dense, linear.rows, linear.columns, linear.dense_type};
  }

  // The outputs of a group of linears for `rows` inputs, load(row) each. Ends with a barrier.
  template <typename Load>
  void project(const LinearGroup& group, int64_t rows, float* out, int64_t stride,
               Load load) const {
    const auto nothing = [](int64_t, int64_t) {};
    multiply(group, prepare_all(group, rows, load), rows, out, stride, nothing);
    member_.barrier();
  }

  // Where the prepared inputs lie.
  template <typename Load>
  uint8_t* prepare_all(const LinearGroup& group, int64_t rows, Load load) const {
    if (rows == 1) {
      prepare(group, load(0), own_.inputs, 0, 1);
      return own_.inputs;
    }
    int64_t first, last;
    while (member_.next(rows, kAnyRange, &first, &last)) {
      for (int64_t row = first; row < last; ++row) {
        prepare(group, load(row), shared_.inputs, row, rows);
      }
    }
    member_.barrier();
    return shared_.inputs;
  }

  // Row `row` of `rows` of the prepared inputs at `base`, from the vector x.
  void prepare(const LinearGroup& group, const float* x, uint8_t* base, int64_t row,
               int64_t rows) const {
    for (const Preparation& p : group.preparations) {
      const TileInput in = p.input(base, rows);
      const int64_t at = row * in.value_stride;
      if (p.mode == QL_INPUT_EXACT) {
        lay_out(p, x, const_cast<float*>(in.floats) + at);
      } else {
        int8_t* values =
            p.mode == QL_INPUT_INT8 ? const_cast<int8_t*>(in.values) + at : own_.rounded;
        context_.isa->tiles->round_token(*p.like, x, p.act_group, values,
                                         const_cast<float*>(in.sums) + row * in.sum_stride,
                                         const_cast<float*>(in.scales) + row * in.scale_stride);
        if (p.mode == QL_INPUT_ROUNDED) {
          std::copy_n(own_.rounded, p.elements, const_cast<float*>(in.floats) + at);
        }
      }
      base += p.bytes(rows);
    }
  }

  static void lay_out(const Preparation& p, const float* x, float* to) {
    if (!p.like) {
      std::copy_n(x, p.elements, to);
      return;
    }
    for (int64_t i = 0; i < p.like->segment_count; ++i) {
      const TileSegment& segment = p.like->segments[i];
      std::fill(std::copy_n(x + segment.start, segment.length, to), to + segment.padded, 0.0f);
      to += segment.padded;
    }
  }

  // This thread's share of the strips of a group; after(first, last) for the output rows it made.
  template <typename After>
  void multiply(const LinearGroup& group, uint8_t* base, int64_t rows, float* out, int64_t stride,
                After after) const {
    TileInput inputs[kMostLinears];
    for (size_t i = 0; i < group.preparations.size(); ++i) {
      inputs[i] = group.preparations[i].input(base, rows);
      base += group.preparations[i].bytes(rows);
    }
    int64_t first, last;
    while (member_.next(group.strips, kAnyRange, &first, &last)) {
      int64_t offset = 0;
      for (const PlannedLinear& linear : group.linears) {
        const int64_t begin = std::max<int64_t>(first - offset, 0);
        const int64_t end = std::min(last - offset, linear.strips);
        if (begin < end) {
          strips(linear, inputs[linear.preparation], out + linear.first_row, stride, begin, end);
          after(linear.first_row + begin * kStripRows,
                linear.first_row + std::min(end * kStripRows, linear.source.rows));
        }
        offset += linear.strips;
      }
    }
  }

  void strips(const PlannedLinear& linear, const TileInput& in, float* out, int64_t stride,
              int64_t first, int64_t last) const {
    const QlLinear& source = linear.source;
    if (source.tiled) {
      const auto compute = source.mode == QL_INPUT_INT8 ? context_.isa->tiles->int8_strips
                                                        : context_.isa->tiles->exact_strips;
      compute(*source.tiled, in, TileOutput{out, stride, source.bias, false}, first, last,
              own_.scratch);
    } else {
      const DenseProblem problem{dense(source),   in.floats, out,      source.bias,
                                 in.value_stride, stride,    in.tokens};
      engine_.dense_rows(problem, first * kStripRows, std::min(last * kStripRows, source.rows));
    }
  }

  // The residual stream after the last layer, of all rows.
  void leave() const {
    if (step_.count == 1) return enter_layer(model_.layer_count, 0);
    int64_t first, last;
    while (member_.next(step_.count, kAnyRange, &first, &last)) {
      for (int64_t row = first; row < last; ++row) enter_layer(model_.layer_count, row);
    }
    member_.barrier();
  }

  void head() const {
    const LinearGroup& group = context_.plan->head;
    const int64_t wanted = step_.wanted_count, vocabulary = model_.vocabulary;
    std::fill_n(own_.best, wanted, -1);
    uint8_t* inputs = prepare_all(group, wanted, [&](int64_t index) {
      return normed(hidden(step_.wanted[index]), model_.final_norm);
    });
    multiply(group, inputs, wanted, context_.logits, vocabulary, [&](int64_t first, int64_t last) {
      for (int64_t i = 0; i < wanted; ++i) finish_logits(i, first, last);
    });
    if (!step_.best) return;
    member_.barrier();
    if (member_.index > 0) return;
    for (int64_t i = 0; i < wanted; ++i) step_.best[i] = best_of_all(i);
  }

  // Scale and softcap of logits [first, last) of a wanted row, and the best of them.
  void finish_logits(int64_t index, int64_t first, int64_t last) const {
    float* row = context_.logits + index * model_.vocabulary;
    if (model_.logit_softcap != 0.0f || model_.logit_scale != 1.0f) {
      engine_.softcap(row + first, last - first, model_.logit_scale, model_.logit_softcap);
    }
    if (!step_.best) return;
    const int64_t found = first + engine_.largest(row + first, last - first);
    own_.best[index] = better(row, own_.best[index], static_cast<int32_t>(found));
  }

  int32_t best_of_all(int64_t index) const {
    const float* row = context_.logits + index * model_.vocabulary;
    int32_t best = -1;
    for (int32_t thread = 0; thread < member_.threads; ++thread) {
      best = better(row, best, context_.work->threads[static_cast<size_t>(thread)].best[index]);
    }
    return best;
  }

  // Of two indices into a row, -1 for none, that of the larger number, or of equals the first.
  static int32_t better(const float* row, int32_t a, int32_t b) {
    if (a < 0 || b < 0) return std::max(a, b);
    const int32_t key_a = order_key(row[a]), key_b = order_key(row[b]);
    if (key_a == key_b) return std::min(a, b);
    return key_a > key_b ? a : b;
  }

  const StepContext& context_;
  const Member& member_;
  const QlModel& model_;
  const QlStep& step_;
  const EngineKernels& engine_;
  const SharedWork& shared_;
  const ThreadWork& own_;
};

}  // namespace

void run_step(void* context, const Member& member) {
  Worker(*static_cast<const StepContext*>(context), member).run();
}

}  // namespace ql
