// The C interface of weights: prepares tokens and splits strips over threads.
#include <atomic>
#include <cstdlib>

#include "kernels.h"
#include "parts.h"
#include "team.h"

namespace {

using ql::TiledWeight;
using ql::TileKernels;

// Memory of one thread that stays for the next call, as a decoding step makes hundreds.
class Buffer {
 public:
  ~Buffer() { free(data_); }
  // Give back what only a long prompt needs.
  void trim() {
    if (size_ <= kKeptBytes) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  // Null only when there is no memory, also for no bytes.
  uint8_t* reserve(int64_t bytes) {
    if (data_ && bytes <= size_) return data_;
    free(data_);
    size_ = 0;
    const int64_t rounded = (bytes / 4096 + 1) * 4096;
    data_ = static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>(rounded)));
    if (data_) size_ = rounded;
    return data_;
  }

 private:
  static constexpr int64_t kKeptBytes = 4 << 20;
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Buffer scratch_buffer, token_buffer;

constexpr int64_t kMostTokensPerTask = 16;
constexpr int64_t kTaskWork = 1 << 17;    // multiply-adds: at least so many in a task
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds of some 20 us: below it, waking other
                                          // threads costs more than it saves

// How the tokens of a call enter the kernels.
enum class Entry {
  kInt8,     // rounded to int8
  kExact,    // as they are
  kRounded,  // rounded to int8, as floats: for elements without an int8 mode
};

struct LinearJob {
  const TileKernels* kernels;
  const TiledWeight* weight;
  const ql::TileForm* form;  // null: what `entry` and in.act_group say
  const float* x;
  Entry entry;
  int64_t act_group;  // of the rounding; in.act_group is what the kernels are told
  ql::TileInput in;
  ql::TileOutput out;
  int64_t scratch_bytes;
  int64_t tokens_per_task;
  int32_t threads;
  int64_t least_strips;  // of a task
  int64_t preparations;  // tasks that prepare tokens; they come first
  std::atomic<int64_t> prepared;
  ql::WaitingRoom waiting;
  bool out_of_memory;
};

// An odd multiple of 64 keeps tokens in different cache sets.
int64_t token_stride(int64_t columns) { return ((columns + 63) / 64 | 1) * 64; }

// Where the prepared tokens of a job lie; null members when the base is null. Returns the bytes.
int64_t place_tokens(LinearJob& job, uint8_t* base) {
  ql::Parts parts(base);
  ql::TileInput& in = job.in;
  if (job.entry != Entry::kExact) in.values = parts.take<int8_t>(in.tokens * in.value_stride);
  if (job.entry != Entry::kInt8) in.floats = parts.take<float>(in.tokens * in.value_stride);
  in.sums = parts.take<float>(in.tokens * in.sum_stride);
  in.scales = parts.take<float>(in.tokens * in.scale_stride);
  return parts.used();
}

// The rounded values of a token as floats. Scales of segments and activation groups are multiplied
// in; that of a whole token is left to the end.
void widen_token(const TiledWeight& w, int64_t act_group, const int8_t* values, float* scales,
                 float* out) {
  const float* scale = scales;
  for (int64_t i = 0; i < w.segment_count; ++i) {
    const int64_t padded = w.segments[i].padded, span = act_group > 0 ? act_group : padded;
    for (int64_t k = 0; k < padded; k += span) {
      const float factor = act_group ? *scale++ : 1.0f;
      for (int64_t j = k; j < k + span && j < padded; ++j) {
        *out++ = static_cast<float>(*values++) * factor;
      }
    }
  }
  if (act_group) *scales = 1.0f;
}

void prepare_token(const LinearJob& job, int64_t token, float* work) {
  const TiledWeight& w = *job.weight;
  const ql::TileInput& in = job.in;
  const float* x = job.x + token * w.columns;
  // The buffers are this call's own: they are const for the kernels that read them.
  float* floats = const_cast<float*>(in.floats) + token * in.value_stride;
  float* scales = const_cast<float*>(in.scales) + token * in.scale_stride;
  if (job.entry == Entry::kExact) {
    job.kernels->arrange_token(w, job.form ? *job.form : ql::TileForm{}, x, work, floats);
    *scales = 1.0f;
    return;
  }
  int8_t* values = const_cast<int8_t*>(in.values) + token * in.value_stride;
  float* sums = const_cast<float*>(in.sums) + token * in.sum_stride;
  if (job.form) {
    job.kernels->round_token_as(w, *job.form, x, work, values, sums, scales);
  } else {
    job.kernels->round_token(w, x, job.act_group, values, sums, scales);
  }
  if (job.entry == Entry::kRounded) widen_token(w, job.act_group, values, scales, floats);
}

uint8_t* task_scratch(LinearJob& job, int64_t bytes) {
  uint8_t* scratch = scratch_buffer.reserve(bytes);
  if (!scratch) __atomic_store_n(&job.out_of_memory, true, __ATOMIC_RELAXED);
  return scratch;
}

void prepare_task(LinearJob& job, int64_t index) {
  const int64_t floats = job.form ? form_work_floats(*job.weight, *job.form) : 0;
  uint8_t* work = task_scratch(job, floats * static_cast<int64_t>(sizeof(float)));
  const int64_t begin = index * job.tokens_per_task, end = begin + job.tokens_per_task;
  for (int64_t token = begin; work && token < end && token < job.in.tokens; ++token) {
    prepare_token(job, token, reinterpret_cast<float*>(work));
  }
  if (job.prepared.fetch_add(1) + 1 == job.preparations) job.waiting.wake();
}

// How many strips the next task takes of those that are left. The first tasks read memory in order for
// long, as each one begins with codes that nobody has asked for; the last are not waited for.
int64_t next_strips(const LinearJob& job, int64_t left) {
  const int64_t share = job.threads > 1 ? left / (2 * job.threads) : left;
  const int64_t wanted = share > job.least_strips ? share : job.least_strips;
  return wanted < left ? wanted : left;
}

void strips_task(LinearJob& job, int64_t index) {
  uint8_t* scratch = task_scratch(job, job.scratch_bytes);
  // Every preparation has a thread, since indices are handed out in order.
  job.waiting.wait([&] { return job.prepared.load() == job.preparations; });
  if (!scratch || __atomic_load_n(&job.out_of_memory, __ATOMIC_RELAXED)) return;
  const int64_t strips = tile_strips(*job.weight);
  int64_t first = 0;
  for (; index > 0; --index) first += next_strips(job, strips - first);
  const int64_t last = first + next_strips(job, strips - first);
  const auto run =
      job.entry == Entry::kInt8 ? job.kernels->int8_strips : job.kernels->exact_strips;
  run(*job.weight, job.in, job.out, first, last, scratch);
}

// Both in one loop over all threads: while the first one prepares, the others wake up.
void linear_task(void* context, int64_t index) {
  LinearJob& job = *static_cast<LinearJob*>(context);
  if (index < job.preparations) {
    prepare_task(job, index);
  } else {
    strips_task(job, index - job.preparations);
  }
}

int64_t ceil_of_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `count` rows make a task: several tasks per thread, so that a slow one does not hold up
// the rest.
int64_t rows_per_task(int64_t count, int32_t threads) {
  return ceil_of_quotient(count, 8 * static_cast<int64_t>(threads));
}

// Cuts the strips into tasks; returns how many.
int64_t cut_strips(LinearJob& job, int64_t work, int32_t threads) {
  const int64_t strips = tile_strips(*job.weight);
  job.threads = threads;
  job.least_strips = ceil_of_quotient(kTaskWork, ceil_of_quotient(work, strips));
  int64_t tasks = 0;
  for (int64_t left = strips; left > 0; ++tasks) left -= next_strips(job, left);
  return tasks;
}

int32_t run_linear(LinearJob& job, int32_t threads) {
  const TiledWeight& w = *job.weight;
  ql::TileInput& in = job.in;
  if (in.tokens == 0 || w.rows == 0) return QL_OK;
  in.value_stride = token_stride(tile_padded_columns(w));
  in.sum_stride = job.entry == Entry::kExact ? 0 : tile_sum_count(w);
  in.scale_stride = tile_scale_count(w, job.act_group);
  in.act_group = job.entry == Entry::kInt8 ? job.act_group : 0;  // else it is in the floats
  uint8_t* tokens = token_buffer.reserve(place_tokens(job, nullptr));
  if (!tokens) return QL_NO_MEMORY;
  place_tokens(job, tokens);

  // A token more costs less than the first one, which pays for reading the weight.
  const int64_t work = w.rows * w.columns * (8 + in.tokens) / 9;
  if (work < kSerialWork || threads < 1) threads = 1;
  const auto bytes = job.entry == Entry::kInt8 ? job.kernels->int8_scratch_bytes
                                               : job.kernels->exact_scratch_bytes;
  job.scratch_bytes = bytes(w, in.tokens);
  const int64_t share = ceil_of_quotient(in.tokens, threads);
  job.tokens_per_task = share < kMostTokensPerTask ? share : kMostTokensPerTask;
  job.preparations = ceil_of_quotient(in.tokens, job.tokens_per_task);
  const int64_t tasks = cut_strips(job, work, threads);
  ql::parallel_for(job.preparations + tasks, threads, linear_task, &job);
  token_buffer.trim();
  return job.out_of_memory ? QL_NO_MEMORY : QL_OK;
}

bool has_int8_mode(const TiledWeight& w) {
  for (int64_t i = 0; i < w.segment_count; ++i) {
    if (w.segments[i].float_values && !w.segments[i].integer_values) return false;
  }
  return true;
}

struct DequantizeJob {
  const TileKernels* kernels;
  const TiledWeight* weight;
  const int64_t* ids;
  int64_t first, count;
  float* out;
  int64_t rows_per_task;
};

void dequantize_task(void* context, int64_t index) {
  const DequantizeJob& job = *static_cast<const DequantizeJob*>(context);
  const int64_t begin = index * job.rows_per_task, left = job.count - begin;
  job.kernels->dequantize_rows(*job.weight, job.ids ? job.ids + begin : nullptr, job.first + begin,
                               left < job.rows_per_task ? left : job.rows_per_task,
                               job.out + begin * job.weight->columns);
}

struct PackJob {
  const QlWeight* weight;
  const ql::TileSegment* tiles;
  int64_t strips;
  void (*move)(const QlSegment&, const ql::TileSegment&, int64_t rows, int64_t strip);
};

constexpr int64_t kStripsPerTask = 8;  // neighbours: one strip's work brings the next one's rows

void pack_task(void* context, int64_t index) {
  const PackJob& job = *static_cast<const PackJob*>(context);
  const int64_t begin = index * kStripsPerTask, end = begin + kStripsPerTask;
  for (int64_t i = 0; i < job.weight->segment_count; ++i) {
    for (int64_t strip = begin; strip < end && strip < job.strips; ++strip) {
      job.move(job.weight->segments[i], job.tiles[i], job.weight->rows, strip);
    }
  }
}

const ql::TilePacker* packer_of(int32_t isa) {
  if (isa == QL_ISA_BEST) isa = ql_chosen_isa();
#ifdef QL_X86
  if (isa != QL_ISA_PORTABLE && ql_supports_isa(isa)) {
    return isa == QL_ISA_AVX512 ? &ql::avx512_packer : &ql::bmi2_packer;
  }
#endif
  return ql_supports_isa(isa) ? &ql::portable_packer : nullptr;
}

int32_t move_strips(const QlWeight* weight, const uint8_t* memory, bool packing, int32_t isa,
                    int32_t threads) {
  const ql::TilePacker* packer = packer_of(isa);
  if (!packer) return QL_NO_SUCH_ISA;
  Buffer buffer;
  auto* tiles = reinterpret_cast<ql::TileSegment*>(buffer.reserve(
      weight->segment_count * static_cast<int64_t>(sizeof(ql::TileSegment))));
  if (!tiles) return QL_NO_MEMORY;
  ql_tile_describe(weight, memory, tiles);
  const int64_t strips = (weight->rows + ql::kStripRows - 1) / ql::kStripRows;
  PackJob job{weight, tiles, strips, packing ? packer->pack : packer->unpack};
  ql::parallel_for((strips + kStripsPerTask - 1) / kStripsPerTask, threads, pack_task, &job);
  return QL_OK;
}

}  // namespace

int32_t ql_abi_version() { return QL_ABI_VERSION; }

void ql_struct_bytes(int64_t sizes[4]) {
  sizes[0] = sizeof(QlSegment);
  sizes[1] = sizeof(ql::TileSegment);
  sizes[2] = sizeof(ql::TileForm);
  sizes[3] = sizeof(ql::TileRounding);
}

int32_t ql_tile_pack(const QlWeight* weight, uint8_t* memory, int32_t isa, int32_t threads) {
  return move_strips(weight, memory, true, isa, threads);
}

int32_t ql_tile_unpack(const QlWeight* weight, const uint8_t* memory, int32_t isa,
                       int32_t threads) {
  return move_strips(weight, memory, false, isa, threads);
}

int32_t ql_linear_int8(const ql::TiledWeight* weight, const float* x, int64_t tokens,
                       int64_t act_group, const float* bias, float* y, int32_t isa,
                       int32_t threads) {
  LinearJob job = {};
  job.kernels = ql::kernels_of(isa);
  if (!job.kernels) return QL_NO_SUCH_ISA;
  job.weight = weight;
  job.x = x;
  job.entry = has_int8_mode(*weight) ? Entry::kInt8 : Entry::kRounded;
  job.in.tokens = tokens;
  job.act_group = act_group;
  job.out = {y, weight->rows, bias, false};
  return run_linear(job, threads);
}

int32_t ql_linear_exact(const ql::TiledWeight* weight, const float* x, int64_t tokens,
                        const float* bias, float* y, int32_t isa, int32_t threads) {
  LinearJob job = {};
  job.kernels = ql::kernels_of(isa);
  if (!job.kernels) return QL_NO_SUCH_ISA;
  job.weight = weight;
  job.x = x;
  job.entry = Entry::kExact;
  job.in.tokens = tokens;
  job.out = {y, weight->rows, bias, false};
  return run_linear(job, threads);
}

int32_t ql_linear_as(const ql::TiledWeight* weight, const ql::TileForm* form, const float* x,
                     int64_t tokens, const float* bias, float* y, int32_t isa, int32_t threads) {
  LinearJob job = {};
  job.kernels = ql::kernels_of(isa);
  if (!job.kernels) return QL_NO_SUCH_ISA;
  job.weight = weight;
  job.form = form;
  job.x = x;
  job.entry = !form->rounding            ? Entry::kExact
              : has_int8_mode(*weight) ? Entry::kInt8
                                       : Entry::kRounded;
  job.in.tokens = tokens;
  job.act_group = form->rounding ? form_act_group(*weight, *form) : 0;
  job.out = {y, weight->rows, bias, false};
  return run_linear(job, threads);
}

int32_t ql_dequantize(const ql::TiledWeight* weight, const int64_t* ids, int64_t first,
                      int64_t count, float* out, int32_t isa, int32_t threads) {
  const TileKernels* kernels = ql::kernels_of(isa);
  if (!kernels) return QL_NO_SUCH_ISA;
  for (int64_t i = 0; ids && i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= weight->rows) return QL_ROW_OUT_OF_RANGE;
  }
  if (!ids && (first < 0 || count < 0 || first > weight->rows - count)) return QL_ROW_OUT_OF_RANGE;
  if (count * weight->columns < kSerialWork || threads < 1) threads = 1;
  DequantizeJob job{kernels, weight, ids, first, count, out, rows_per_task(count, threads)};
  if (count) {
    ql::parallel_for((count + job.rows_per_task - 1) / job.rows_per_task, threads, dequantize_task,
                     &job);
  }
  return QL_OK;
}
