// The C interface: picks the instruction set, prepares tokens, and splits rows over threads.
#include <cstdlib>

#include "kernels.h"
#include "pool.h"

namespace {

using ql::IsaKernels;
using ql::LinearKernel;
using ql::Problem;

#ifdef QL_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif

// The kernels of an instruction set, null when this processor (or this build) does not have it.
const IsaKernels* kernels_of(int32_t isa) {
  if (isa == QL_ISA_BEST) isa = ql_best_isa();
#ifdef QL_X86
  if (isa == QL_ISA_AVX2 && has_avx2()) return &ql::avx2_kernels;
  if (isa == QL_ISA_AVX512 && has_avx512()) return &ql::avx512_kernels;
#endif
  return isa == QL_ISA_PORTABLE ? &ql::portable_kernels : nullptr;
}

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
  uint8_t* reserve(int64_t bytes) {
    if (bytes <= size_) return data_;
    free(data_);
    size_ = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
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

constexpr int64_t kTokensPerTask = 16;

struct PrepareJob {
  const LinearKernel* kernel;
  const Problem* problem;
};

void prepare_task(void* context, int64_t index) {
  const PrepareJob& job = *static_cast<const PrepareJob*>(context);
  const int64_t begin = index * kTokensPerTask, end = begin + kTokensPerTask;
  for (int64_t token = begin; token < end && token < job.problem->tokens; ++token) {
    job.kernel->prepare(*job.problem, token);
  }
}

struct LinearJob {
  const LinearKernel* kernel;
  const Problem* problem;
  int64_t rows_per_task;
  int64_t scratch_bytes;
  bool out_of_memory;
};

void linear_task(void* context, int64_t index) {
  LinearJob& job = *static_cast<LinearJob*>(context);
  const int64_t rows = job.problem->weight->rows;
  const int64_t begin = index * job.rows_per_task, end = begin + job.rows_per_task;
  uint8_t* scratch = scratch_buffer.reserve(job.scratch_bytes);
  if (!scratch) {
    __atomic_store_n(&job.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  job.kernel->rows(*job.problem, begin, end < rows ? end : rows, scratch);
}

// Rows per task: whole row blocks, several tasks per thread so that a slow one does not hold up the
// rest.
int64_t task_rows(int64_t rows, int64_t block, int32_t threads) {
  const int64_t tasks = 8 * static_cast<int64_t>(threads);
  const int64_t blocks = (rows + block - 1) / block;
  return (blocks + tasks - 1) / tasks * block;
}

int32_t run_linear(const LinearKernel& kernel, const QlWeight* weight, const float* x,
                   int64_t tokens, const float* bias, float* y, int32_t threads) {
  if (tokens == 0 || weight->rows == 0) return QL_OK;
  Problem problem{weight, x, bias, y, tokens, nullptr, kernel.token_bytes(*weight, tokens)};
  problem.token_data = token_buffer.reserve(problem.token_bytes * tokens);
  if (!problem.token_data) return QL_NO_MEMORY;

  // A token more costs less than the first one, which pays for decoding.
  const int64_t work = weight->rows * weight->columns * (8 + tokens) / 9;
  if (work < kernel.serial_work || threads < 1) threads = 1;
  PrepareJob prepare{&kernel, &problem};
  ql::parallel_for((tokens + kTokensPerTask - 1) / kTokensPerTask, threads, prepare_task, &prepare);
  LinearJob job{&kernel, &problem, task_rows(weight->rows, kernel.row_block, threads),
                kernel.scratch_bytes(*weight, tokens), false};
  ql::parallel_for((weight->rows + job.rows_per_task - 1) / job.rows_per_task, threads, linear_task,
                   &job);
  token_buffer.trim();
  return job.out_of_memory ? QL_NO_MEMORY : QL_OK;
}

struct DequantizeJob {
  const IsaKernels* kernels;
  const QlWeight* weight;
  const int64_t* ids;
  int64_t first, count;
  float* out;
  int64_t rows_per_task;
  bool out_of_memory;
};

void dequantize_task(void* context, int64_t index) {
  DequantizeJob& job = *static_cast<DequantizeJob*>(context);
  uint8_t* scratch = scratch_buffer.reserve(job.kernels->dequantize_scratch_bytes(*job.weight));
  if (!scratch) {
    __atomic_store_n(&job.out_of_memory, true, __ATOMIC_RELAXED);
    return;
  }
  const int64_t begin = index * job.rows_per_task, end = begin + job.rows_per_task;
  for (int64_t i = begin; i < end && i < job.count; ++i) {
    const int64_t row = job.ids ? job.ids[i] : job.first + i;
    job.kernels->dequantize_row(*job.weight, row, job.out + i * job.weight->columns, scratch);
  }
}

}  // namespace

int32_t ql_abi_version() { return QL_ABI_VERSION; }

int64_t ql_segment_bytes() { return sizeof(QlSegment); }

int32_t ql_best_isa() {
#ifdef QL_X86
  static const int32_t best = has_avx512() ? QL_ISA_AVX512
                              : has_avx2() ? QL_ISA_AVX2
                                           : QL_ISA_PORTABLE;
  return best;
#else
  return QL_ISA_PORTABLE;
#endif
}

int32_t ql_supports_isa(int32_t isa) { return kernels_of(isa) != nullptr; }

int32_t ql_linear_int8(const QlWeight* weight, const float* x, int64_t tokens, const float* bias,
                       float* y, int32_t isa, int32_t threads) {
  const IsaKernels* kernels = kernels_of(isa);
  return kernels ? run_linear(kernels->int8, weight, x, tokens, bias, y, threads) : QL_NO_SUCH_ISA;
}

int32_t ql_linear_exact(const QlWeight* weight, const float* x, int64_t tokens, const float* bias,
                        float* y, int32_t isa, int32_t threads) {
  const IsaKernels* kernels = kernels_of(isa);
  return kernels ? run_linear(kernels->exact, weight, x, tokens, bias, y, threads) : QL_NO_SUCH_ISA;
}

int32_t ql_dequantize(const QlWeight* weight, const int64_t* ids, int64_t first, int64_t count,
                      float* out, int32_t isa, int32_t threads) {
  const IsaKernels* kernels = kernels_of(isa);
  if (!kernels) return QL_NO_SUCH_ISA;
  for (int64_t i = 0; ids && i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= weight->rows) return QL_ROW_OUT_OF_RANGE;
  }
  if (!ids && (first < 0 || count < 0 || first > weight->rows - count)) return QL_ROW_OUT_OF_RANGE;
  if (count * weight->columns < kernels->exact.serial_work || threads < 1) threads = 1;
  DequantizeJob job{kernels, weight, ids, first, count, out, task_rows(count, 1, threads), false};
  if (count)
    ql::parallel_for((count + job.rows_per_task - 1) / job.rows_per_task, threads, dequantize_task,
                     &job);
  return job.out_of_memory ? QL_NO_MEMORY : QL_OK;
}
