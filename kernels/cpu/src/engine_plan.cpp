#include "engine_plan.h"

#include <cstddef>
#include <utility>

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

LinearGroup group_linears(const QlLinears& source) {
  LinearGroup group;
  for (int64_t i = 0; i < source.count; ++i) {
    const QlLinear& linear = source.linears[i];
    const Preparation wanted = preparation_of(linear);
    std::size_t at = 0;
    while (at < group.preparations.size() && !same(group.preparations[at], wanted)) ++at;
    if (at == group.preparations.size()) group.preparations.push_back(wanted);
    const int64_t strips = (linear.rows + kStripRows - 1) / kStripRows;
    const int64_t first_row = linear.places ? 0 : group.rows;
    group.linears.push_back({linear, strips, static_cast<int64_t>(at), first_row});
    group.columns = linear.columns;
    group.rows += linear.rows;
    group.strips += strips;
    group.placed = group.placed || linear.places;
  }
  return group;
}

// Whether strips of gate and of up for the same outputs are next to one another in their linears.
bool gates_at_once(const LinearGroup& gate_up, int64_t intermediate) {
  if (gate_up.placed || gate_up.linears.size() > 2) return false;
  return gate_up.linears.size() == 1 || gate_up.linears[0].source.rows == intermediate;
}

std::vector<RowSource> sources_of(const LinearGroup& group) {
  std::vector<RowSource> sources(static_cast<std::size_t>(group.rows));
  for (std::size_t i = 0; i < group.linears.size(); ++i) {
    const PlannedLinear& linear = group.linears[i];
    for (int64_t row = 0; row < linear.source.rows; ++row) {
      const int64_t at = linear.source.places ? linear.source.places[row] : linear.first_row + row;
      sources[static_cast<std::size_t>(at)] = {static_cast<int32_t>(i), static_cast<int32_t>(row)};
    }
  }
  return sources;
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

// Whether every output of linears of so many rows in all is made once, places ascending.
bool covers_all(const QlLinears& group, int64_t rows) {
  std::vector<bool> made(static_cast<std::size_t>(rows), false);
  int64_t before = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const QlLinear& linear = group.linears[i];
    for (int64_t row = 0, last = -1; row < linear.rows; ++row) {
      const int64_t at = linear.places ? linear.places[row] : before + row;
      if (at <= last || at >= rows || made[static_cast<std::size_t>(at)]) return false;
      made[static_cast<std::size_t>(at)] = true;
      last = at;
    }
    before += linear.rows;
  }
  return true;
}

const char* check_group(const QlLinears& group, int64_t columns, int64_t rows) {
  if (!group.linears || group.count < 1 || group.count > kMostLinears) {
    return "an input has no linears, or too many";
  }
  int64_t found = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    if (const char* problem = check_linear(group.linears[i], columns)) return problem;
    found += group.linears[i].rows;
  }
  if (found != rows) return "the rows of linears that read one input do not add up";
  if (!covers_all(group, rows)) {
    return "the places of a linear's rows are not ascending, or another row is there";
  }
  return nullptr;
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
  const char* problem = check_group(layer.qkv, model.hidden, q + 2 * kv);
  if (!problem) problem = check_group(layer.o, q, model.hidden);
  if (!problem) problem = check_group(layer.gate_up, model.hidden, 2 * layer.intermediate);
  if (!problem) problem = check_group(layer.down, layer.intermediate, model.hidden);
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
  for (const QlLinears* group : {&model.embedding, &model.head}) {
    if (const char* problem = check_group(*group, model.hidden, model.vocabulary)) return problem;
  }
  for (const QlLinears* group : {&model.enter, &model.leave}) {
    if (group->count == 0) continue;
    if (const char* problem = check_group(*group, model.hidden, model.hidden)) return problem;
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
    LinearGroup gate_up = group_linears(layer.gate_up);
    const bool at_once = gates_at_once(gate_up, layer.intermediate);
    plan->layers.push_back({layer, group_linears(layer.qkv), group_linears(layer.o),
                            std::move(gate_up), group_linears(layer.down), at_once});
  }
  plan->embedding = group_linears(model.embedding);
  plan->head = group_linears(model.head);
  plan->enter = group_linears(model.enter);
  plan->leave = group_linears(model.leave);
  plan->embedding_rows = sources_of(plan->embedding);
  return nullptr;
}

}  // namespace ql
