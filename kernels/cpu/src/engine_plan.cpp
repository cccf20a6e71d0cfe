#include "engine_plan.h"

#include <cstddef>

#include "attention.h"

namespace ql {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 31;  // of anything: keeps products of two in int64

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

Preparation preparation_of(const QlLinear& linear) {
  Preparation p{linear.tiled, linear.form, linear.act_group, linear.mode, linear.columns, 0, 0, 0};
  if (linear.tiled) p.elements = tile_padded_columns(*linear.tiled);
  p.stride = odd_stride(p.elements);
  if (p.mode == QL_INPUT_EXACT) return p;
  if (p.form) p.act_group = form_act_group(*linear.tiled, *p.form);
  p.scales = tile_scale_count(*linear.tiled, p.act_group);
  p.sums = tile_sum_count(*linear.tiled);
  return p;
}

bool same_segments(const TiledWeight* a, const TiledWeight* b) {
  if (a == b) return true;
  if (!a || !b || a->segment_count != b->segment_count) return false;
  for (int64_t i = 0; i < a->segment_count; ++i) {
    const TileSegment &s = a->segments[i], &t = b->segments[i];
    if (s.start != t.start || s.length != t.length || s.padded != t.padded) return false;
  }
  return true;
}

bool same(const Preparation& a, const Preparation& b) {
  return a.mode == b.mode && a.form == b.form && a.act_group == b.act_group &&
         same_segments(a.like, b.like);
}

LinearGroup group_linears(const QlLinear* linears, int64_t count) {
  LinearGroup group;
  if (linears[0].rows == 0) return group;
  group.columns = linears[0].columns;
  for (int64_t i = 0; i < count; ++i) {
    const Preparation wanted = preparation_of(linears[i]);
    std::size_t at = 0;
    while (at < group.preparations.size() && !same(group.preparations[at], wanted)) ++at;
    if (at == group.preparations.size()) group.preparations.push_back(wanted);
    const int64_t strips = (linears[i].rows + kStripRows - 1) / kStripRows;
    group.linears.push_back({linears[i], strips, static_cast<int64_t>(at), group.rows});
    group.rows += linears[i].rows;
    group.strips += strips;
  }
  return group;
}

bool is_count(int64_t value) { return value >= 1 && value < kMaxCount; }

const char* check_linear(const QlLinear& linear, int64_t columns) {
  if (!is_count(linear.rows) || linear.columns != columns) return "a linear has the wrong columns";
  if (!linear.tiled == !linear.dense) return "a linear needs a tiled or a dense weight, not both";
  if (linear.mode < QL_INPUT_EXACT || linear.mode > QL_INPUT_ROUNDED) {
    return "a linear has an unknown input mode";
  }
  if (linear.dense) {
    if (linear.mode != QL_INPUT_EXACT) return "a dense weight has another mode than exact";
    if (linear.dense_type < QL_DENSE_F32 || linear.dense_type > QL_DENSE_BF16) {
      return "a dense weight has an unknown type";
    }
    return nullptr;
  }
  if (linear.tiled->rows != linear.rows || linear.tiled->columns != columns) {
    return "a tiled weight has another shape than its linear";
  }
  if (linear.form && linear.mode != QL_INPUT_EXACT && !linear.form->rounding) {
    return "inputs are to be rounded in a form that does not say how";
  }
  const bool grouped = linear.mode == QL_INPUT_INT8 && !linear.form && linear.act_group > 0;
  if (linear.act_group != 0 && (!grouped || linear.act_group % kMaxPiece != 0)) {
    return "activation groups are multiples of 128 columns, and for int8 inputs only";
  }
  return nullptr;
}

const char* check_group(const QlLinear* linears, int64_t count, int64_t most, int64_t columns,
                        int64_t rows) {
  if (!linears || count < 1 || count > most) return "a layer has too few or too many linears";
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (const char* problem = check_linear(linears[i], columns)) return problem;
    found += linears[i].rows;
  }
  return found == rows ? nullptr : "the rows of a layer's linears do not add up";
}

const char* check_layer(const QlLayer& layer, const QlModel& model) {
  const int64_t q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  if (!is_count(layer.intermediate)) return "a layer has no intermediate features";
  if (layer.window < 0) return "an attention window is negative";
  if (layer.rope < -1 || layer.rope >= model.rope_count) return "a layer has an unknown rope";
  if (!kv_format_is_valid(layer.key, model.head_dim) ||
      !kv_format_is_valid(layer.value, model.head_dim)) {
    return "a format of the KV cache does not exist or does not fit head_dim";
  }
  if (layer.sinks < 0 || layer.sinks > kKvBlock) return "too many first positions are kept";
  if (layer.query_bits != 0 && (layer.query_bits < 2 || layer.query_bits > 8)) {
    return "queries are rounded to 2 to 8 bits";
  }
  const char* problem = check_group(layer.qkv, layer.qkv_count, 3, model.hidden, q + 2 * kv);
  if (!problem) problem = check_group(&layer.o, 1, 1, q, model.hidden);
  if (!problem) {
    problem = check_group(layer.gate_up, layer.gate_up_count, 2, model.hidden,
                          2 * layer.intermediate);
  }
  if (!problem && layer.gate_up_count == 2 && layer.gate_up[0].rows != layer.intermediate) {
    problem = "gate and up have different sizes";
  }
  if (!problem) problem = check_group(&layer.down, 1, 1, layer.intermediate, model.hidden);
  return problem;
}

const char* check_sizes(const QlModel& model) {
  for (const int64_t size : {model.layer_count, model.vocabulary, model.hidden, model.heads,
                             model.kv_heads, model.head_dim, model.sequences, model.capacity}) {
    if (!is_count(size)) return "a size of the model is not positive, or too large";
  }
  if (model.heads % model.kv_heads != 0) return "kv_heads does not divide heads";
  if (model.vocabulary > INT32_MAX) return "the vocabulary is too large";
  if (!model.layers || model.rope_count < 0 || (model.rope_count > 0 && !model.ropes)) {
    return "layers or ropes are missing";
  }
  if (model.head_dim > kKvMaxHeadDim) return "head_dim is larger than the KV cache allows";
  if (model.heads / model.kv_heads > kAttentionRows) return "too many heads share a KV head";
  if (model.activation != QL_SILU && model.activation != QL_GELU_TANH) {
    return "the activation is unknown";
  }
  return nullptr;
}

const char* check_model(const QlModel& model) {
  if (const char* problem = check_sizes(model)) return problem;
  for (int64_t i = 0; i < model.rope_count; ++i) {
    const QlRope& rope = model.ropes[i];
    if (!rope.inverse_frequencies || rope.count < 1 || 2 * rope.count > model.head_dim) {
      return "a rope has no frequencies, or more than half a head";
    }
  }
  for (const QlLinear* linear : {&model.embedding, &model.head}) {
    if (const char* problem = check_linear(*linear, model.hidden)) return problem;
    if (linear->rows != model.vocabulary) return "embedding or head has another vocabulary";
  }
  for (const QlLinear* linear : {&model.enter, &model.leave}) {
    if (linear->rows == 0) continue;
    if (const char* problem = check_linear(*linear, model.hidden)) return problem;
    if (linear->rows != model.hidden) return "a change of basis has another size";
  }
  for (int64_t i = 0; i < model.layer_count; ++i) {
    if (const char* problem = check_layer(model.layers[i], model)) return problem;
  }
  return nullptr;
}

}  // namespace

int64_t odd_stride(int64_t elements) {
  const int64_t lines = round_up(elements, 64) / 64;
  return (lines + 1 - lines % 2) * 64;
}

int64_t Preparation::bytes(int64_t tokens) const {
  const int64_t element = mode == QL_INPUT_INT8 ? 1 : 4;
  return tokens * (stride * element + round_up(4 * sums, 64) + round_up(4 * scales, 64));
}

TileInput Preparation::input(uint8_t* base, int64_t tokens) const {
  TileInput in{};
  in.value_stride = stride;
  in.sum_stride = round_up(sums, 16);
  in.scale_stride = round_up(scales, 16);
  in.act_group = mode == QL_INPUT_INT8 ? act_group : 0;  // elsewhere it is in the floats
  in.tokens = tokens;
  const int64_t values = tokens * stride * (mode == QL_INPUT_INT8 ? 1 : 4);
  if (mode == QL_INPUT_INT8) {
    in.values = reinterpret_cast<const int8_t*>(base);
  } else {
    in.floats = reinterpret_cast<const float*>(base);
  }
  const float* after = reinterpret_cast<const float*>(base + values);
  if (sums > 0) in.sums = after;
  if (scales > 0) in.scales = after + tokens * in.sum_stride;
  return in;
}

int64_t LinearGroup::input_bytes(int64_t tokens) const {
  int64_t total = 0;
  for (const Preparation& preparation : preparations) total += preparation.bytes(tokens);
  return total;
}

const char* make_plan(const QlModel& model, Plan* plan) {
  if (const char* problem = check_model(model)) return problem;
  plan->model = model;
  plan->ropes.assign(model.ropes, model.ropes + model.rope_count);
  for (int64_t i = 0; i < model.layer_count; ++i) {
    const QlLayer& layer = model.layers[i];
    plan->layers.push_back({layer, group_linears(layer.qkv, layer.qkv_count),
                            group_linears(&layer.o, 1),
                            group_linears(layer.gate_up, layer.gate_up_count),
                            group_linears(&layer.down, 1)});
  }
  plan->head = group_linears(&model.head, 1);
  plan->enter = group_linears(&model.enter, 1);
  plan->leave = group_linears(&model.leave, 1);
  return nullptr;
}

}  // namespace ql
