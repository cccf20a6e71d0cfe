// The engine's C interface (engine.h): models, sequences, and steps, checked before they run.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#include "engine_step.h"
#include "kernels.h"

namespace ql {

const EngineKernels* engine_kernels_of(int32_t isa) {
  const TileKernels* tiles = kernels_of(isa);
  if (!tiles) return nullptr;
#ifdef QL_X86
  if (tiles == &avx512_tiles || tiles == &avx512vnni_tiles) return &avx512_engine;
  if (tiles == &avx2_tiles || tiles == &avx2vnni_tiles) return &avx2_engine;
#endif
  return &portable_engine;
}

}  // namespace ql

namespace {

constexpr int32_t kMaxThreads = 256;

thread_local const char* last_problem = "";

// Memory of zeros that the system maps at first touch: a long capacity costs nothing until it is
// used.
struct ZeroMemory {
  ~ZeroMemory() { free(memory); }
  uint8_t* reserve(int64_t bytes) {
    memory = calloc(static_cast<size_t>(bytes + 64), 1);
    const uintptr_t at = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
    return memory ? reinterpret_cast<uint8_t*>(at) : nullptr;
  }
  void* memory = nullptr;
};

}  // namespace

struct QlEngine {
  ql::Plan plan;
  ql::EngineIsa isa;
  ZeroMemory cache_memory;  // of all layers, one after the other
  int64_t cache_bytes = 0;
  std::vector<ql::KvLayer> caches;
  std::vector<int64_t> lengths;  // of sequences
  ql::StepWork work;
  std::vector<ql::StepRun> runs;
  mutable std::mutex mutex;  // held while any of the above changes or is read
};

namespace {

ql::EngineIsa isa_of(int32_t isa) {
  return {ql::kernels_of(isa), ql::engine_kernels_of(isa), ql::attention_of(isa)};
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of a layer's cache: blocks, then sinks, keys and values each.
struct CacheBytes {
  int64_t keys, values, sink_keys, sink_values;
  int64_t sum() const { return keys + values + sink_keys + sink_values; }
};

CacheBytes cache_bytes(const ql::KvLayer& cache) {
  const int64_t heads = cache.batch * cache.kv_heads * static_cast<int64_t>(sizeof(float));
  return {kv_side_bytes(cache.key, cache), kv_side_bytes(cache.value, cache),
          whole_lines(heads * kv_sink_floats(cache.key, cache)),
          whole_lines(heads * kv_sink_floats(cache.value, cache))};
}

bool make_caches(QlEngine* engine) {
  const QlModel& model = engine->plan.model;
  const int64_t capacity = (model.capacity + ql::kKvBlock - 1) / ql::kKvBlock * ql::kKvBlock;
  for (const ql::PlannedLayer& layer : engine->plan.layers) {
    engine->caches.push_back({layer.source.key, layer.source.value, model.sequences, model.kv_heads,
                              model.head_dim, capacity, nullptr, nullptr, layer.source.sinks,
                              nullptr, nullptr});
    engine->cache_bytes += cache_bytes(engine->caches.back()).sum();
  }
  uint8_t* memory = engine->cache_memory.reserve(engine->cache_bytes);
  if (!memory) return false;
  for (ql::KvLayer& cache : engine->caches) {
    const CacheBytes bytes = cache_bytes(cache);
    cache.keys = memory;
    cache.values = cache.keys + bytes.keys;
    uint8_t* sinks = cache.values + bytes.values;
    cache.sink_keys = reinterpret_cast<float*>(sinks);
    cache.sink_values = reinterpret_cast<float*>(sinks + bytes.sink_keys);
    memory += bytes.sum();
  }
  return true;
}

int32_t create(const QlModel& model, int32_t isa, std::unique_ptr<QlEngine>* engine) {
  const ql::EngineIsa kernels = isa_of(isa);
  if (!kernels.tiles || !kernels.engine || !kernels.attention) return QL_ENGINE_NO_SUCH_ISA;
  auto fresh = std::make_unique<QlEngine>();
  fresh->isa = kernels;
  if (const char* problem = ql::make_plan(model, &fresh->plan)) {
    last_problem = problem;
    return QL_ENGINE_BAD_MODEL;
  }
  fresh->lengths.assign(static_cast<size_t>(model.sequences), 0);
  if (!make_caches(fresh.get())) return QL_ENGINE_NO_MEMORY;
  *engine = std::move(fresh);
  return QL_ENGINE_OK;
}

bool has_sequence(const QlEngine& engine, int64_t sequence) {
  return sequence >= 0 && sequence < static_cast<int64_t>(engine.lengths.size());
}

int64_t& length_of(QlEngine& engine, int64_t sequence) {
  return engine.lengths[static_cast<size_t>(sequence)];
}

// Cuts the rows of a step into runs of one sequence each.
int32_t find_runs(QlEngine& engine, const QlStep& step) {
  engine.runs.clear();
  int64_t splits = 0;
  for (int64_t row = 0; row < step.count; ++row) {
    const int64_t sequence = step.sequences[row];
    if (!has_sequence(engine, sequence)) return QL_ENGINE_BAD_SEQUENCE;
    if (row > 0 && engine.runs.back().sequence == sequence) {
      ++engine.runs.back().rows;
      continue;
    }
    for (const ql::StepRun& run : engine.runs) {
      if (run.sequence == sequence) return QL_ENGINE_BAD_SEQUENCE;
    }
    const int64_t position = length_of(engine, sequence);
    engine.runs.push_back({sequence, row, 1, position, splits});
    splits += ql::full_splits(position);
  }
  for (const ql::StepRun& run : engine.runs) {
    if (run.position + run.rows > engine.plan.model.capacity) return QL_ENGINE_FULL;
  }
  return QL_ENGINE_OK;
}

int32_t check_step(const QlEngine& engine, const QlStep& step) {
  const bool has_inputs = step.sequences && (step.tokens || step.embeddings);
  if (step.count < 1 || !has_inputs || step.wanted_count < 0) return QL_ENGINE_BAD_STEP;
  for (int64_t i = 0; i < step.wanted_count; ++i) {
    const int64_t least = i == 0 ? 0 : step.wanted[i - 1] + 1;
    if (step.wanted[i] < least || step.wanted[i] >= step.count) return QL_ENGINE_BAD_STEP;
  }
  for (int64_t row = 0; !step.embeddings && row < step.count; ++row) {
    const int32_t token = step.tokens[row];
    if (token < 0 || token >= engine.plan.model.vocabulary) return QL_ENGINE_BAD_TOKEN;
  }
  return QL_ENGINE_OK;
}

int64_t partial_count(const QlEngine& engine) {
  const ql::StepRun& last = engine.runs.back();
  const int64_t splits = last.splits_before + ql::full_splits(last.position);
  const ql::AttentionShape shape = ql::attention_shape(engine.plan, 0);
  return splits * engine.plan.model.kv_heads * partial_floats(engine.caches[0], shape);
}

// Cosines and sines of every row's position, for every rope: the angle in float32, as models are
// trained with, its cosine and sine rounded from double precision.
void fill_angles(const QlEngine& engine, int64_t count) {
  float* at = engine.work.shared.angles;
  for (const QlRope& rope : engine.plan.ropes) {
    float *cosines = at, *sines = at + count * rope.count;
    for (const ql::StepRun& run : engine.runs) {
      for (int64_t row = 0; row < run.rows; ++row) {
        const float position = static_cast<float>(run.position + row);
        for (int64_t i = 0; i < rope.count; ++i) {
          const double angle = position * rope.inverse_frequencies[i];
          *cosines++ = static_cast<float>(std::cos(angle)) * rope.scaling;
          *sines++ = static_cast<float>(std::sin(angle)) * rope.scaling;
        }
      }
    }
    at += 2 * count * rope.count;
  }
}

int32_t run_checked(QlEngine& engine, const QlStep& step) {
  if (const int32_t status = check_step(engine, step)) return status;
  if (const int32_t status = find_runs(engine, step)) return status;
  const int32_t threads = std::clamp(step.threads, 1, kMaxThreads);
  const bool own_logits = !step.logits && step.wanted_count > 0;
  const ql::StepSize size{step.count, step.wanted_count, partial_count(engine), threads,
                          own_logits};
  if (!engine.work.reserve(engine.plan, engine.isa, engine.caches[0], size)) {
    return QL_ENGINE_NO_MEMORY;
  }
  fill_angles(engine, step.count);
  ql::StepContext context{};
  context.plan = &engine.plan;
  context.isa = &engine.isa;
  context.caches = engine.caches.data();
  context.step = &step;
  context.runs = engine.runs.data();
  context.run_count = static_cast<int64_t>(engine.runs.size());
  context.decode = context.run_count == step.count;
  context.logits = own_logits ? engine.work.shared.logits : step.logits;
  context.work = &engine.work;
  ql::run_team(threads, ql::run_step, &context);
  for (const ql::StepRun& run : engine.runs) length_of(engine, run.sequence) += run.rows;
  return QL_ENGINE_OK;
}

// What of a side of a layer holds positions [0, length).
void copy_side(const ql::KvLayer& cache, const ql::KvFormat& format, uint8_t* base,
               float* sink_base, int64_t from, int64_t to, int64_t length) {
  const int64_t blocks = (length + ql::kKvBlock - 1) / ql::kKvBlock;
  const size_t bytes = static_cast<size_t>(blocks * kv_block_bytes(format, cache.head_dim));
  for (int64_t head = 0; head < cache.kv_heads; ++head) {
    memcpy(kv_head_blocks(cache, format, base, to, head),
           kv_head_blocks(cache, format, base, from, head), bytes);
    const size_t floats = static_cast<size_t>(kv_sink_floats(format, cache));
    if (floats) {
      memcpy(kv_sink_block(cache, format, sink_base, to, head),
             kv_sink_block(cache, format, sink_base, from, head), floats * sizeof(float));
    }
  }
}

}  // namespace

void ql_engine_struct_bytes(int64_t sizes[5]) {
  const size_t bytes[5] = {sizeof(QlLinear), sizeof(QlRope), sizeof(QlLayer), sizeof(QlModel),
                           sizeof(QlStep)};
  std::copy_n(bytes, 5, sizes);
}

const char* ql_engine_problem() { return last_problem; }

int32_t ql_engine_create(const QlModel* model, int32_t isa, QlEngine** engine) {
  *engine = nullptr;
  last_problem = "";
  try {
    std::unique_ptr<QlEngine> fresh;
    const int32_t status = create(*model, isa, &fresh);
    *engine = fresh.release();
    return status;
  } catch (const std::bad_alloc&) {
    return QL_ENGINE_NO_MEMORY;
  }
}

void ql_engine_destroy(QlEngine* engine) { delete engine; }

int32_t ql_engine_step(QlEngine* engine, const QlStep* step) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  try {
    return run_checked(*engine, *step);
  } catch (const std::bad_alloc&) {
    return QL_ENGINE_NO_MEMORY;
  }
}

int64_t ql_engine_length(const QlEngine* engine, int32_t sequence) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (!has_sequence(*engine, sequence)) return -1;
  return engine->lengths[static_cast<size_t>(sequence)];
}

int32_t ql_engine_truncate(QlEngine* engine, int32_t sequence, int64_t length) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (!has_sequence(*engine, sequence) || length < 0) return QL_ENGINE_BAD_SEQUENCE;
  length_of(*engine, sequence) = std::min(length_of(*engine, sequence), length);
  return QL_ENGINE_OK;
}

int32_t ql_engine_copy(QlEngine* engine, int32_t from, int32_t to) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (!has_sequence(*engine, from) || !has_sequence(*engine, to)) return QL_ENGINE_BAD_SEQUENCE;
  if (from == to) return QL_ENGINE_OK;
  const int64_t length = length_of(*engine, from);
  for (const ql::KvLayer& cache : engine->caches) {
    copy_side(cache, cache.key, cache.keys, cache.sink_keys, from, to, length);
    copy_side(cache, cache.value, cache.values, cache.sink_values, from, to, length);
  }
  length_of(*engine, to) = length;
  return QL_ENGINE_OK;
}

int64_t ql_engine_memory(const QlEngine* engine) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  return engine->cache_bytes + engine->work.bytes();
}
