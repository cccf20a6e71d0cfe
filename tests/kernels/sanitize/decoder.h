// A small random decoder with weights of many formats, for the engine.
#pragma once

#include <algorithm>
#include <memory>

#include "engine.h"
#include "weights.h"

constexpr int64_t kHidden = 80, kIntermediate = 100, kHeads = 4, kKvHeadCount = 2, kHeadDim = 32;
constexpr int64_t kVocabulary = 150, kLayers = 2, kSequenceCount = 3, kEngineCapacity = 400;

class Decoder {
 public:
  // `mode` is a QlInputMode of tiled weights. `changed`: in other bases, with inputs rotated, put
  // in order and rounded to few bits, first positions kept, attention in integers. `blocks`: rows
  // of weights in several formats.
  Decoder(int32_t mode, const ql::KvFormat& key, const ql::KvFormat& value, bool changed,
          bool blocks)
      : mode_(mode), changed_(changed), blocks_(blocks) {
    const int64_t q = kHeads * kHeadDim, kv = kKvHeadCount * kHeadDim;
    for (int64_t i = 0; i < kLayers; ++i) {
      const bool second = i == 1;
      const QlLinears qkv = together(
          {tiled(q, {{"w4g64", 64}, {"w8", kHidden - 64}}),
           second ? dense(kv, kHidden, QL_DENSE_BF16) : tiled(kv, {{"w3g32z", kHidden}}),
           tiled(kv, {{second ? "nvfp4" : "w5g32z", kHidden}})});
      const QlLinears gate_up = together({tiled(kIntermediate, {{"w2g16z", kHidden}}),
                                          tiled(kIntermediate, {{"w6g256zs7", kHidden}})});
      QlLinear o = tiled(kHidden, {{second ? "mxfp4" : "w7g128z", q}});
      QlLinear down = second ? dense(kHidden, kIntermediate, QL_DENSE_F16)
                             : tiled(kHidden, {{"fp6g32", kIntermediate}});
      if (changed) {
        o.form = form(o, 16);
        down.form = form(down, 20);
      }
      QlLayer layer = {};
      layer.input_norm = norm(kHidden);
      layer.ffn_norm = norm(kHidden);
      layer.attention_out_norm = second ? norm(kHidden) : nullptr;
      layer.ffn_out_norm = second ? norm(kHidden) : nullptr;
      layer.q_norm = second ? norm(kHeadDim) : nullptr;
      layer.k_norm = second ? norm(kHeadDim) : nullptr;
      layer.qkv = blocks ? in_blocks(q + 2 * kv, kHidden, 5) : qkv;
      layer.o = blocks ? in_blocks(kHidden, q, 3, changed ? 16 : 0) : together({o});
      layer.gate_up = blocks ? in_blocks(2 * kIntermediate, kHidden, 7) : gate_up;
      layer.down = blocks ? in_blocks(kHidden, kIntermediate, 2, changed ? 20 : 0)
                          : together({down});
      layer.intermediate = kIntermediate;
      layer.window = second ? 37 : 0;
      layer.attention_scale = 0.2f;
      layer.attention_softcap = second ? 30.0f : 0.0f;
      layer.rope = second ? -1 : 0;
      layer.key = key;
      layer.value = value;
      if (changed) {
        layer.key_basis = matrix(kKvHeadCount * kHeadDim * kHeadDim);
        layer.query_bits = second ? 4 : 0;
        layer.sinks = 3;
      }
      layers_.push_back(layer);
    }
    describe();
  }
  Decoder(const Decoder&) = delete;
  const QlModel& model() const { return model_; }

 private:
  void describe() {
    const Exact<float>& frequencies = floats_.emplace_back(exact_floats(kHeadDim / 2 - 3));
    random_.fill(frequencies, 0.001f, 1.0f);
    rope_ = {frequencies.get(), frequencies.count(), 1.0f, 0};
    model_ = {};
    model_.layers = layers_.data();
    model_.ropes = &rope_;
    model_.final_norm = norm(kHidden);
    model_.head = blocks_ ? in_blocks(kVocabulary, kHidden, 3)
                          : together({tiled(kVocabulary, {{"w4g64", kHidden}})});
    model_.embedding = model_.head;  // its rows are looked up, its mode is unused
    model_.layer_count = kLayers;
    model_.rope_count = 1;
    model_.vocabulary = kVocabulary;
    model_.hidden = kHidden;
    model_.heads = kHeads;
    model_.kv_heads = kKvHeadCount;
    model_.head_dim = kHeadDim;
    model_.sequences = kSequenceCount;
    model_.capacity = kEngineCapacity;
    model_.embedding_scale = 1.5f;
    model_.norm_epsilon = 1e-6f;
    model_.logit_scale = 1.0f;
    model_.logit_softcap = 30.0f;
    model_.activation = QL_GELU_TANH;
    model_.integer_attention = changed_;
    if (changed_) {
      model_.enter = together({dense(kHidden, kHidden, QL_DENSE_BF16)});
      model_.leave = together({dense(kHidden, kHidden, QL_DENSE_F16)});
    }
  }

  // Rotation of blocks of `block` (a power of two, or 20 with a dense part), an order, and rounding
  // to 4 bits where the linear rounds.
  const ql::TileForm* form(QlLinear& linear, int64_t block) {
    ql::TileForm& form = forms_.emplace_back();
    form.power = block == 20 ? 1 : block;
    form.dense_order = block == 20 ? block : 1;
    form.dense = block == 20 ? matrix(block * block) : nullptr;
    form.norm = 0.25f;
    std::vector<int32_t>& order = orders_.emplace_back();
    for (int64_t k = 0; k < linear.columns; ++k) {
      order.push_back(static_cast<int32_t>((7 * k + 3) % linear.columns));
    }
    form.order = order.data();
    if (linear.mode == QL_INPUT_EXACT) return &form;
    std::vector<ql::TileRounding>& rounding = roundings_.emplace_back();
    for (int64_t i = 0; i < linear.tiled->segment_count; ++i) {
      rounding.push_back({4, 0, 1.0f, 0, linear.mode == QL_INPUT_ROUNDED ? 32 : 0});
    }
    form.rounding = rounding.data();
    linear.act_group = 0;
    return &form;
  }

  const float* matrix(int64_t count) {
    const Exact<float>& values = floats_.emplace_back(exact_floats(count));
    random_.fill(values, -0.3f, 0.3f);
    return values.get();
  }

  const float* norm(int64_t count) {
    const Exact<float>& values = floats_.emplace_back(exact_floats(count));
    random_.fill(values, 0.5f, 1.5f);
    return values.get();
  }

  QlLinear tiled(int64_t rows, const std::vector<Part>& parts) {
    const Weight& weight = weights_.emplace_back(rows, parts, ++seed_);
    const Tiles& tiles = tiles_.emplace_back(weight, QL_ISA_BEST, 1);
    QlLinear linear = {};
    linear.tiled = &tiles.view();
    linear.rows = rows;
    linear.columns = weight.columns();
    linear.mode = mode_;
    bool integers = true;
    for (int64_t i = 0; i < tiles.view().segment_count; ++i) {
      const ql::TileSegment& s = tiles.view().segments[i];
      integers = integers && (!s.float_values || s.integer_values);
    }
    if (mode_ == QL_INPUT_INT8 && !integers) linear.mode = QL_INPUT_ROUNDED;
    if (linear.mode == QL_INPUT_INT8 && seed_ % 2) linear.act_group = 128;
    linear.bias = seed_ % 3 ? nullptr : norm(rows);
    return linear;
  }

  QlLinear dense(int64_t rows, int64_t columns, int32_t type) {
    const Exact<uint16_t>& values = halves_.emplace_back(rows * columns, 2);
    for (int64_t i = 0; i < values.count(); ++i) {
      const uint16_t half = half_of(random_.uniform(0.01f, 0.2f));  // as bfloat16: tiny numbers
      values[i] = static_cast<uint16_t>(half | random_.below(2) << 15);
    }
    QlLinear linear = {};
    linear.dense = values.get();
    linear.dense_type = type;
    linear.rows = rows;
    linear.columns = columns;
    return linear;
  }

  QlLinears together(std::vector<QlLinear> linears) {
    const std::vector<QlLinear>& kept = linears_.emplace_back(std::move(linears));
    return {kept.data(), static_cast<int64_t>(kept.size())};
  }

  // A matrix in three blocks of rows, which take turns with `step` rows in each: w6, dense, w3.
  // turned: see `form`; 0: inputs as they are.
  QlLinears in_blocks(int64_t rows, int64_t columns, int64_t step, int64_t turned = 0) {
    std::vector<QlLinear> linears;
    for (int64_t block = 0; block < 3; ++block) {
      std::vector<int32_t> own;
      for (int64_t row = 0; row < rows; ++row) {
        if (row / step % 3 == block) own.push_back(static_cast<int32_t>(row));
      }
      const Exact<int32_t>& places = places_.emplace_back(static_cast<int64_t>(own.size()), 4);
      std::copy(own.begin(), own.end(), places.get());
      const int64_t count = places.count();
      linears.push_back(block == 1   ? dense(count, columns, QL_DENSE_BF16)
                        : block == 0 ? tiled(count, {{"w6g256zs7", columns}})
                                     : tiled(count, {{"w3g32z", columns}}));
      linears.back().places = places.get();
      if (turned) linears.back().form = form(linears.back(), turned);
    }
    return together(std::move(linears));
  }

  int32_t mode_;
  bool changed_;
  bool blocks_;
  uint64_t seed_ = 0;
  Random random_{17};
  std::deque<std::vector<QlLinear>> linears_;
  std::deque<Weight> weights_;
  std::deque<Tiles> tiles_;
  std::deque<Exact<float>> floats_;
  std::deque<Exact<uint16_t>> halves_;
  std::deque<ql::TileForm> forms_;
  std::deque<std::vector<int32_t>> orders_;
  std::deque<Exact<int32_t>> places_;
  std::deque<std::vector<ql::TileRounding>> roundings_;
  std::vector<QlLayer> layers_;
  QlRope rope_;
  QlModel model_;
};

struct EngineDeleter {
  void operator()(QlEngine* engine) const { ql_engine_destroy(engine); }
};
using Engine = std::unique_ptr<QlEngine, EngineDeleter>;

inline Engine make_engine(const Decoder& decoder, int32_t isa) {
  QlEngine* engine = nullptr;
  const int32_t status = ql_engine_create(&decoder.model(), isa, &engine);
  expect(status == QL_ENGINE_OK, "making an engine", ql_engine_problem(), status);
  if (!engine) abort();
  return Engine(engine);
}
