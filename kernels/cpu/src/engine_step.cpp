#include "engine_step.h"

#include <algorithm>
#include <cstring>

#include "engine_prepare.h"
#include "ordering.h"

namespace ql {
namespace {

constexpr int64_t kAnyRange = INT64_MAX;

// Where linears write, and whether they add to what is there.
struct Output {
  float* y;
  int64_t stride;
  bool accumulate;
};

// Outputs of a linear for one token that a thread has just made, ascending in their vector.
struct Made {
  float* values;          // [count]
  int64_t count;
  const int32_t* places;  // [count] in the vector; null: from `first` on
  int64_t first;
  int64_t place(int64_t i) const { return places ? places[i] : first + i; }
};

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
    enter();
    for (int64_t i = 0; i < model_.layer_count; ++i) {
      const PlannedLayer& layer = context_.plan->layers[static_cast<size_t>(i)];
      const QlLayer& source = layer.source;
      project(layer.qkv, rows, {shared_.qkv, shared_.qkv_stride, false}, [&](int64_t row) {
        enter_layer(i, row);
        return normed(hidden(row), source.input_norm);
      });
      run_attention(context_, member_, i);
      project(layer.o, rows, delta_of(source.attention_out_norm),
              [&](int64_t row) { return shared_.heads + row * shared_.heads_stride; });
      const auto enter_ffn = [&](int64_t row) {
        add_delta(row, source.attention_out_norm);
        return normed(hidden(row), source.ffn_norm);
      };
      if (layer.gates_at_once) {
        project_gated(layer, rows, enter_ffn);
      } else {
        project(layer.gate_up, rows, {shared_.gated, shared_.gated_stride, false}, enter_ffn);
      }
      project(layer.down, rows, delta_of(source.ffn_out_norm),
              [&](int64_t row) { return gated(layer, row); });
    }
    finish();
    if (step_.wanted_count > 0) head();
  }

 private:
  using Inputs = TileInput[kMostLinears];  // of a group's linears

  // With a single token every thread keeps the residual stream by itself.
  float* hidden(int64_t row) const {
    return step_.count == 1 ? own_.hidden : shared_.hidden + row * shared_.hidden_stride;
  }

  // The residual stream of a row as it enters a layer, or leaves the last one.
  void enter_layer(int64_t layer, int64_t row) const {
    if (layer > 0) {
      add_delta(row, context_.plan->layers[static_cast<size_t>(layer) - 1].source.ffn_out_norm);
    } else if (context_.plan->enter.linears.empty()) {
      embed(row, hidden(row));
    } else {
      std::copy_n(delta(row), model_.hidden, hidden(row));
    }
    if (step_.hidden_states && (step_.count > 1 || member_.index == 0)) {
      float* to = step_.hidden_states + (layer * step_.count + row) * model_.hidden;
      std::copy_n(hidden(row), model_.hidden, to);
    }
  }

  // The change of basis after the embedding, if there is one: to `delta`.
  void enter() const {
    if (context_.plan->enter.linears.empty()) return;
    project(context_.plan->enter, step_.count, {shared_.delta, shared_.hidden_stride, false},
            [&](int64_t row) {
              embed(row, own_.row);
              return own_.row;
            });
  }

  float* delta(int64_t row) const { return shared_.delta + row * shared_.hidden_stride; }

  void embed(int64_t row, float* x) const {
    if (step_.embeddings) {
      std::copy_n(step_.embeddings + row * model_.hidden, model_.hidden, x);
      return;
    }
    const RowSource from = context_.plan->embedding_rows[static_cast<size_t>(step_.tokens[row])];
    const QlLinear& embedding =
        context_.plan->embedding.linears[static_cast<size_t>(from.linear)].source;
    const int64_t id = from.row;
    if (embedding.tiled) {
      context_.isa->tiles->dequantize_rows(*embedding.tiled, &id, 0, 1, x);
    } else {
      engine_.dense_row(dense(embedding), id, x);
    }
    if (model_.embedding_scale != 1.0f) engine_.multiply(x, model_.embedding_scale, model_.hidden);
  }

  // Whether linears add their outputs to the residual stream themselves: they cannot where it is
  // every thread's own, or where a norm comes in between.
  bool adds_up(const float* norm) const { return step_.count > 1 && !norm; }

  // Where linears write what is to be added to the residual stream.
  Output delta_of(const float* norm) const {
    const bool adds = adds_up(norm);
    return {adds ? shared_.hidden : shared_.delta, shared_.hidden_stride, adds};
  }

  void add_delta(int64_t row, const float* norm) const {
    if (!adds_up(norm)) engine_.add(hidden(row), normed(delta(row), norm), model_.hidden);
  }

  const float* normed(const float* x, const float* weight) const {
    if (!weight) return x;
    engine_.rms_norm(x, weight, model_.hidden, model_.norm_epsilon, own_.row);
    return own_.row;
  }

  static DenseWeight dense(const QlLinear& linear) {
    return {linear.dense, linear.rows, linear.columns, linear.dense_type};
  }

  // The outputs of a group of linears for `rows` inputs, load(row) each. Ends with a barrier.
  template <typename Load>
  void project(const LinearGroup& group, int64_t rows, const Output& out, Load load) const {
    const auto nothing = [](int64_t, const Made&) {};
    multiply(group, prepare_all(group, rows, load), rows, out, nothing);
    member_.barrier();
  }

  // The same for gate and up, to `gated`: a thread combines what it has just made, while it is in
  // its cache. Ends with a barrier.
  template <typename Load>
  void project_gated(const PlannedLayer& layer, int64_t rows, Load load) const {
    const LinearGroup& group = layer.gate_up;
    Inputs inputs;
    find_inputs(group, prepare_all(group, rows, load), rows, inputs);
    const int64_t width = layer.source.intermediate, most = gate_strips(rows);
    const int64_t stride = 2 * gate_columns(rows);
    int64_t first, last;
    while (member_.next((width + kStripRows - 1) / kStripRows, most, &first, &last)) {
      const int64_t begin = first * kStripRows, end = std::min(last * kStripRows, width);
      GateProblem problem{};
      problem.gate = some_rows(group, inputs, begin, end, own_.made, stride);
      problem.up =
          some_rows(group, inputs, width + begin, width + end, own_.made + stride / 2, stride);
      problem.out = shared_.gated + begin;
      problem.in_stride = stride;
      problem.out_stride = shared_.gated_stride;
      problem.rows = rows;
      problem.count = end - begin;
      problem.activation = model_.activation;
      engine_.gate(problem);
    }
    member_.barrier();
  }

  // What the down projection reads. Where nobody has combined gate and up yet, whoever prepares the
  // row does: of a single token that is every thread, which costs less than waiting once more.
  const float* gated(const PlannedLayer& layer, int64_t row) const {
    const float* made = shared_.gated + row * shared_.gated_stride;
    if (layer.gates_at_once) return made;
    GateProblem problem{};
    problem.gate = made;
    problem.up = made + layer.source.intermediate;
    problem.out = own_.row;
    problem.rows = 1;
    problem.count = layer.source.intermediate;
    problem.activation = model_.activation;
    engine_.gate(problem);
    return own_.row;
  }

  // Output rows [begin, end) of a group, all of one linear, to `to` or somewhat behind it.
  const float* some_rows(const LinearGroup& group, Inputs& inputs, int64_t begin, int64_t end,
                         float* to, int64_t stride) const {
    const size_t at = begin >= group.linears[0].source.rows ? 1 : 0;
    const PlannedLinear& linear = group.linears[at];
    begin -= linear.first_row;
    end -= linear.first_row;
    const int64_t first = begin / kStripRows, last = (end + kStripRows - 1) / kStripRows;
    strips(group, inputs, at, {to - first * kStripRows, stride, false}, first, last);
    return to + begin % kStripRows;
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
      prepare_row(*context_.isa->tiles, p, x, group.columns, p.input(base, rows), row,
                  own_.prepare);
      base += p.bytes(rows);
    }
  }

  // What the linears of a group read, prepared one after the other from `base` on.
  static void find_inputs(const LinearGroup& group, uint8_t* base, int64_t rows, Inputs& inputs) {
    for (size_t i = 0; i < group.preparations.size(); ++i) {
      const TileInput in = group.preparations[i].input(base, rows);
      base += group.preparations[i].bytes(rows);
      for (size_t j = 0; j < group.linears.size(); ++j) {
        if (group.linears[j].preparation == static_cast<int64_t>(i)) inputs[j] = in;
      }
    }
  }

  // This thread's share of the strips of a group; after(token, made) for the outputs it made.
  template <typename After>
  void multiply(const LinearGroup& group, uint8_t* base, int64_t rows, const Output& out,
                After after) const {
    Inputs inputs;
    find_inputs(group, base, rows, inputs);
    int64_t first, last;
    while (member_.next(group.strips, kAnyRange, &first, &last)) {
      int64_t offset = 0;
      for (size_t i = 0; i < group.linears.size(); ++i) {
        const PlannedLinear& linear = group.linears[i];
        const int64_t begin = std::max<int64_t>(first - offset, 0);
        const int64_t end = std::min(last - offset, linear.strips);
        if (begin < end && linear.source.places) {
          strips_in_places(group, inputs, i, out, begin, end, after);
        } else if (begin < end) {
          strips_in_order(group, inputs, i, out, begin, end, after);
        }
        offset += linear.strips;
      }
    }
  }

  template <typename After>
  void strips_in_order(const LinearGroup& group, Inputs& inputs, size_t index, const Output& out,
                       int64_t first, int64_t last, After after) const {
    const PlannedLinear& linear = group.linears[index];
    strips(group, inputs, index, {out.y + linear.first_row, out.stride, out.accumulate}, first,
           last);
    const int64_t begin = first * kStripRows, end = std::min(last * kStripRows, linear.source.rows);
    for (int64_t token = 0; token < inputs[index].tokens; ++token) {
      float* const y = out.y + token * out.stride + linear.first_row + begin;
      after(token, Made{y, end - begin, nullptr, linear.first_row + begin});
    }
  }

  // Of a linear whose rows have places: made in memory of this thread, from where they go there.
  template <typename After>
  void strips_in_places(const LinearGroup& group, Inputs& inputs, size_t index, const Output& out,
                        int64_t first, int64_t last, After after) const {
    const QlLinear& source = group.linears[index].source;
    const int64_t tokens = inputs[index].tokens, most = made_strips(tokens);
    const int64_t stride = most * kStripRows;
    for (int64_t strip = first; strip < last; strip += most) {
      const int64_t stop = std::min(strip + most, last);
      const int64_t begin = strip * kStripRows, end = std::min(stop * kStripRows, source.rows);
      strips(group, inputs, index, {own_.made - begin, stride, false}, strip, stop);
      for (int64_t token = 0; token < tokens; ++token) {
        const Made made{own_.made + token * stride, end - begin, source.places + begin, 0};
        after(token, made);
        put(made, out.y + token * out.stride, out.accumulate);
      }
    }
  }

  static void put(const Made& made, float* y, bool accumulate) {
    if (accumulate) {
      for (int64_t i = 0; i < made.count; ++i) y[made.places[i]] += made.values[i];
    } else {
      for (int64_t i = 0; i < made.count; ++i) y[made.places[i]] = made.values[i];
    }
  }

  // Strips [first, last) of linear `index` of a group. What a thread makes of the inputs' sums, it
  // makes once.
  void strips(const LinearGroup& group, Inputs& inputs, size_t index, const Output& out,
              int64_t first, int64_t last) const {
    const QlLinear& source = group.linears[index].source;
    TileInput& in = inputs[index];
    if (source.tiled) {
      if (source.mode == QL_INPUT_INT8 && !in.terms) {
        int32_t* const terms =
            own_.terms + static_cast<int64_t>(index) * context_.work->term_stride;
        context_.isa->tiles->fill_terms(*source.tiled, in, terms);
        in.terms = terms;
      }
      const auto compute = source.mode == QL_INPUT_INT8 ? context_.isa->tiles->int8_strips
                                                        : context_.isa->tiles->exact_strips;
      compute(*source.tiled, in, TileOutput{out.y, out.stride, source.bias, out.accumulate}, first,
              last, own_.scratch);
    } else {
      const DenseProblem problem{dense(source),   in.floats,  out.y,     source.bias,
                                 in.value_stride, out.stride, in.tokens, out.accumulate};
      engine_.dense_rows(problem, first * kStripRows, std::min(last * kStripRows, source.rows));
    }
  }

  // The residual stream after the last layer, of all rows.
  void finish() const {
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
    // The change of basis before the final norm, if there is one, goes to what nobody reads any
    // more: of a single token, others may still add `delta` to the stream of their own.
    const LinearGroup& leave = context_.plan->leave;
    float* left = step_.count == 1 ? shared_.hidden : shared_.delta;
    const bool leaves = !leave.linears.empty();
    if (leaves) {
      project(leave, wanted, {left, shared_.hidden_stride, false},
              [&](int64_t index) { return hidden(step_.wanted[index]); });
    }
    uint8_t* inputs = prepare_all(group, wanted, [&](int64_t index) {
      const float* row = hidden(step_.wanted[index]);
      return normed(leaves ? left + index * shared_.hidden_stride : row, model_.final_norm);
    });
    const Output out{context_.logits, vocabulary, false};
    multiply(group, inputs, wanted, out,
             [&](int64_t index, const Made& made) { finish_logits(index, made); });
    if (!step_.best) return;
    member_.barrier();
    if (member_.index > 0) return;
    for (int64_t i = 0; i < wanted; ++i) step_.best[i] = best_of_all(i);
  }

  // Scale and softcap of some logits of a wanted row, and the best of them.
  void finish_logits(int64_t index, const Made& made) const {
    if (model_.logit_softcap != 0.0f || model_.logit_scale != 1.0f) {
      engine_.softcap(made.values, made.count, model_.logit_scale, model_.logit_softcap);
    }
    if (!step_.best) return;
    float* row = context_.logits + index * model_.vocabulary;
    const int64_t found = engine_.largest(made.values, made.count);
    const int64_t at = made.place(found);
    row[at] = made.values[found];  // where it is compared, and belongs
    own_.best[index] = better(row, own_.best[index], static_cast<int32_t>(at));
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
