#include <cmath>

#include "attention.h"
#include "checks.h"
#include "weights.h"

// kernels/cpu/src/kv_api.cpp
extern "C" {
int32_t ql_kv_append(const ql::KvLayer* cache, int64_t count, int64_t tokens,
                     const int64_t* sequences, const int64_t* firsts, const float* keys,
                     const float* values, int32_t isa, int32_t threads);
int32_t ql_attend(const ql::KvLayer* cache, const ql::AttentionShape* shape, int64_t count,
                  int64_t tokens, const int64_t* sequences, const int64_t* firsts,
                  const float* query, float* out, int32_t isa, int32_t threads);
int32_t ql_kv_dequantize(const ql::KvLayer* cache, int64_t sequence, int64_t length, float* keys,
                         float* values, int32_t isa);
}

namespace {

constexpr int64_t kKvHeads = 2, kCapacity = 320, kSequences = 2;

struct Sides {
  const char* name;
  ql::KvFormat key, value;
  int64_t sinks = 0;
};

constexpr Sides kSides[] = {
    {"f32", {32, 0, 0, 0}, {32, 0, 0, 0}},
    {"int8", {8, 0, 0, 0}, {8, 0, 0, 0}},
    {"int4", {4, 0, 0, 0}, {4, 0, 0, 0}},
    {"int4h16/int8g16", {4, 16, 0, 0}, {8, 0, 16, 0}},
    {"int8g16/int4h16g32", {8, 0, 16, 0}, {4, 16, 32, 0}},
    {"int4r/int8r", {4, 0, 0, 1}, {8, 0, 0, 1}},
    {"int4/int8k64", {4, 0, 0, 0}, {8, 0, 0, 0}, 64},
    {"int8r/f32k3", {8, 0, 0, 1}, {32, 0, 0, 0}, 3},
};

class Cache {
 public:
  Cache(const Sides& sides, int64_t head_dim)
      : layer_{sides.key, sides.value, kSequences,  kKvHeads, head_dim, kCapacity,
               nullptr,   nullptr,     sides.sinks, nullptr,  nullptr},
        keys_(kv_side_bytes(sides.key, layer_), 0, 64),
        values_(kv_side_bytes(sides.value, layer_), 0, 64),
        sink_keys_(kSequences * kKvHeads * kv_sink_floats(sides.key, layer_), 0, 64),
        sink_values_(kSequences * kKvHeads * kv_sink_floats(sides.value, layer_), 0, 64) {
    layer_.keys = keys_.get();
    layer_.values = values_.get();
    layer_.sink_keys = sink_keys_.get();
    layer_.sink_values = sink_values_.get();
  }
  const ql::KvLayer& layer() const { return layer_; }

 private:
  ql::KvLayer layer_;
  Exact<uint8_t> keys_, values_;
  Exact<float> sink_keys_, sink_values_;
};

// Prompts of different places in the cache, then single tokens; returns everything computed.
Exact<float> run(const Sides& sides, int64_t head_dim, int64_t share, float unusual, int32_t isa,
                 int32_t threads) {
  const Cache cache(sides, head_dim);
  const int64_t heads = kKvHeads * share, tokens[] = {67, 1, 150, 1, 80, 1};
  const ql::AttentionShape shapes[] = {{heads, 0, 0.2f, 0.0f, 0, 0},
                                       {heads, 50, 0.3f, 20.0f, 0, 0},
                                       {heads, 70, 0.2f, 0.0f, 1, 0}};
  Exact<int64_t> sequences(kSequences, 8), firsts(kSequences, 8);
  sequences[0] = 1;
  sequences[1] = 0;
  Random random(static_cast<uint64_t>(head_dim));
  Exact<float> all = exact_floats(3 * kSequences * 300 * heads * head_dim);
  int64_t written = 0;
  for (const int64_t count : tokens) {
    const int64_t rows = kSequences * count;
    const Exact<float> keys = exact_floats(rows * kKvHeads * head_dim);
    const Exact<float> values = exact_floats(keys.count());
    const Exact<float> query = exact_floats(rows * heads * head_dim);
    random.fill(keys, -2.0f, 2.0f);
    random.fill(values, -2.0f, 2.0f);
    random.fill(query, -1.0f, 1.0f);
    if (unusual != 0.0f) keys[keys.count() / 3] = values[0] = query[query.count() - 1] = unusual;
    ql_kv_append(&cache.layer(), kSequences, count, sequences.get(), firsts.get(), keys.get(),
                 values.get(), isa, threads);
    for (const ql::AttentionShape& shape : shapes) {
      const Exact<float> out = exact_floats(query.count());
      const int32_t status = ql_attend(&cache.layer(), &shape, kSequences, count, sequences.get(),
                                       firsts.get(), query.get(), out.get(), isa, threads);
      expect(status == QL_OK, "attention", sides.name, isa, count);
      memcpy(all.get() + written, out.get(), static_cast<size_t>(out.bytes()));
      written += out.count();
    }
    for (int64_t i = 0; i < kSequences; ++i) firsts[i] += count;
  }
  const Exact<float> keys = exact_floats(firsts[0] * kKvHeads * head_dim);
  const Exact<float> values = exact_floats(keys.count());
  const int32_t status =
      ql_kv_dequantize(&cache.layer(), 1, firsts[0], keys.get(), values.get(), isa);
  expect(status == QL_OK && written == all.count(), "dequantizing", sides.name, isa, written);
  return all;
}

}  // namespace

void check_attention(int32_t threads) {
  for (const Sides& sides : kSides) {
    const bool rotates = sides.key.rotate != 0 || sides.value.rotate != 0;
    for (const int64_t head_dim : {rotates ? 48 : 17, 32}) {
      for (const float unusual : {0.0f, NAN, INFINITY, 3e38f}) {
        if (unusual != 0.0f && head_dim == 32) continue;
        const int64_t share = unusual == 0.0f ? 3 : 1;
        const Exact<float> expected = run(sides, head_dim, share, unusual, QL_ISA_PORTABLE, 1);
        for (const int32_t isa : instruction_sets()) {
          const Exact<float> found = run(sides, head_dim, share, unusual, isa, threads);
          expect(same(found, expected), "attention's bits", sides.name, isa, head_dim);
        }
      }
    }
  }
}
