// How long a weight takes where the decoder engine multiplies it: inside a parallel region, the
// threads sharing out its strips and waiting for one another at its end. kernels/timing.py turns it
// into the cost table of latency budgets.
//
// A model's weights do not stay in the caches from one token to the next, so the same weight in the
// same place would be timed too fast: as many copies as the caller asks for lie one after the other
// and are read in turn.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "abi.h"
#include "kernels.h"
#include "memory.h"
#include "team.h"

namespace {

using Clock = std::chrono::steady_clock;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory of the kernels' kind, gone with its scope.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), data_(ql::allocate(bytes)) {}
  ~Memory() {
    if (data_) ql::release(data_, bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }

 private:
  int64_t bytes_;
  uint8_t* data_;
};

// A weight and copies of it whose tiles lie in other memory.
class Copies {
 public:
  Copies(const ql::TiledWeight& weight, const uint8_t* tiles, int64_t bytes, int64_t count)
      : stride_(round_up(bytes, 64)),
        memory_(stride_ * count),
        segments_(static_cast<size_t>(weight.segment_count * count)),
        weights_(static_cast<size_t>(count), weight) {
    if (!memory_.data()) return;
    for (int64_t copy = 0; copy < count; ++copy) {
      uint8_t* target = memory_.data() + copy * stride_;
      memcpy(target, tiles, static_cast<size_t>(bytes));
      ql::TileSegment* segments = &segments_[static_cast<size_t>(copy * weight.segment_count)];
      for (int64_t i = 0; i < weight.segment_count; ++i) {
        segments[i] = weight.segments[i];
        segments[i].codes = target + (weight.segments[i].codes - tiles);
        segments[i].meta = target + (weight.segments[i].meta - tiles);
      }
      weights_[static_cast<size_t>(copy)].segments = segments;
    }
  }

  bool made() const { return memory_.data() != nullptr; }
  int64_t count() const { return static_cast<int64_t>(weights_.size()); }
  const ql::TiledWeight& operator[](int64_t copy) const {
    return weights_[static_cast<size_t>(copy)];
  }

 private:
  int64_t stride_;
  Memory memory_;
  std::vector<ql::TileSegment> segments_;
  std::vector<ql::TiledWeight> weights_;
};

// Inputs that are all alike: what the numbers are does not change how long they take. They lie as
// the engine's do: aligned, at strides of an odd number of lines.
class Inputs {
 public:
  Inputs(const ql::TiledWeight& weight, int64_t tokens, int64_t act_group, bool exact)
      : stride_(64 * ((tile_padded_columns(weight) + 63) / 64 | 1)),
        sums_(round_up(tile_sum_count(weight), 16)),
        scales_(round_up(tile_scale_count(weight, act_group), 16)),
        memory_(round_up(4 * tokens * (stride_ + sums_ + scales_), 64) + 64) {
    if (!memory_.data()) return;
    input_.tokens = tokens;
    input_.value_stride = stride_;
    input_.sum_stride = sums_;
    input_.scale_stride = scales_;
    input_.act_group = exact ? 0 : act_group;
    float* floats = reinterpret_cast<float*>(memory_.data());
    if (exact) {
      std::fill_n(floats, tokens * stride_, 0.25f);
      input_.floats = floats;
      return;
    }
    std::fill_n(floats, tokens * (sums_ + scales_), 3.0f);
    input_.sums = floats;
    input_.scales = floats + tokens * sums_;
    uint8_t* values = memory_.data() + round_up(4 * tokens * (sums_ + scales_), 64);
    memset(values, 3, static_cast<size_t>(tokens * stride_));
    input_.values = reinterpret_cast<int8_t*>(values);
  }

  bool made() const { return memory_.data() != nullptr; }
  const ql::TileInput& input() const { return input_; }

 private:
  int64_t stride_, sums_, scales_;
  Memory memory_;
  ql::TileInput input_{};
};

struct Job {
  const Copies* copies;
  const ql::TileKernels* kernels;
  const ql::TileInput* input;
  ql::TileOutput output;
  uint8_t* scratch;
  int64_t scratch_bytes;  // of a thread
  int64_t strips;         // of one copy
  bool exact;
};

// A thread's part of a pass, as in the engine's step.
void compute(void* context, const ql::Member& member) {
  const Job& job = *static_cast<const Job*>(context);
  uint8_t* scratch = job.scratch + member.index * job.scratch_bytes;
  const auto strips = job.exact ? job.kernels->exact_strips : job.kernels->int8_strips;
  for (int64_t copy = 0; copy < job.copies->count(); ++copy) {
    int64_t first = 0, last = 0;
    while (member.next(job.strips, job.strips, &first, &last)) {
      strips((*job.copies)[copy], *job.input, job.output, first, last, scratch);
    }
    member.barrier();
  }
}

}  // namespace

// seconds[passes]: what one pass over `copies` copies of a weight takes on up to `threads` threads,
// divided by `copies`; a first pass is not counted. `tiles` and `bytes` are the memory that the
// weight was described with (ql_tile_describe), `act_group` is that of TileInput. Returns a QlStatus.
QL_API int32_t ql_time_strips(const ql::TiledWeight* weight, const uint8_t* tiles, int64_t bytes,
                              int64_t copies, int64_t tokens, int64_t act_group, int32_t exact,
                              int32_t isa, int32_t threads, int64_t passes, double* seconds) try {
  const ql::TileKernels* kernels = ql::kernels_of(isa);
  if (!kernels) return QL_NO_SUCH_ISA;
  const auto scratch_of = exact ? kernels->exact_scratch_bytes : kernels->int8_scratch_bytes;
  const int64_t scratch_bytes = round_up(scratch_of(*weight, tokens), 64) + 64;
  const Copies made(*weight, tiles, bytes, copies);
  const Memory scratch(scratch_bytes * threads);
  const Inputs inputs(*weight, tokens, act_group, exact != 0);
  if (!made.made() || !scratch.data() || !inputs.made()) return QL_NO_MEMORY;
  std::vector<float> y(static_cast<size_t>(tokens * weight->rows));
  Job job{&made, kernels, &inputs.input(), {y.data(), weight->rows, nullptr, false}, scratch.data(),
          scratch_bytes, tile_strips(*weight), exact != 0};
  ql::run_team(threads, compute, &job);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const auto start = Clock::now();
    ql::run_team(threads, compute, &job);
    const std::chrono::duration<double> passed = Clock::now() - start;
    seconds[pass] = passed.count() / static_cast<double>(copies);
  }
  return QL_OK;
} catch (const std::bad_alloc&) {
  return QL_NO_MEMORY;
}
