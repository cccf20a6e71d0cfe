#include <cmath>

#include "checks.h"
#include "weights.h"

// kernels/cpu/src/timing.cpp
extern "C" int32_t ql_time_strips(const ql::TiledWeight* weight, const uint8_t* tiles,
                                  int64_t bytes, int64_t copies, int64_t tokens,
                                  int64_t act_group, int32_t exact, int32_t isa, int32_t threads,
                                  int64_t passes, double* seconds);

namespace {

struct Mode {
  const char* name;
  bool exact;
  int64_t act_group;
  bool formed;  // tokens rotated, turned around, and rounded to other widths
};

constexpr Mode kModes[] = {{"exact", true, 0, false},         {"int8", false, 0, false},
                           {"int8 by groups", false, 128, false}, {"formed, exact", true, 0, true},
                           {"formed", false, 0, true},        {"formed by groups", false, 32, true}};

// A form for any weight: blocks of 32 are rotated where they fit, and of 4, by a matrix, elsewhere.
class Form {
 public:
  Form(const ql::TiledWeight& weight, const Mode& mode)
      : order_(weight.columns), dense_(16), rounding_(weight.segment_count) {
    for (int64_t k = 0; k < weight.columns; ++k) {
      order_[k] = static_cast<int32_t>(weight.columns - 1 - k);
    }
    for (int64_t i = 0; i < 16; ++i) dense_[i] = i % 5 == 0 ? -0.5f : 0.5f;
    for (int64_t i = 0; i < weight.segment_count; ++i) {
      rounding_[i] = {i % 2 ? 8 : 4, i % 2 ? 1 : 0, 0.9f, 0, mode.act_group};
    }
    view_.order = order_.get();
    view_.rounding = mode.exact ? nullptr : rounding_.get();
    view_.norm = 0.25f;
    view_.power = weight.columns % 32 ? 1 : 32;
    view_.dense_order = weight.columns % 32 == 0 ? 1 : weight.columns % 4 == 0 ? 4 : 0;
    if (view_.power == 1) view_.dense = dense_.get();
  }

  const ql::TileForm& view() const { return view_; }

 private:
  Exact<int32_t> order_;
  Exact<float> dense_;
  Exact<ql::TileRounding> rounding_;
  ql::TileForm view_{};
};

int32_t linear(const Tiles& tiles, const Exact<float>& x, const Mode& mode,
               const Exact<float>* bias, const Exact<float>& y, int32_t isa, int32_t threads) {
  const int64_t tokens = x.count() / tiles.view().columns;
  const float* offsets = bias ? bias->get() : nullptr;
  if (mode.formed) {
    const Form form(tiles.view(), mode);
    return ql_linear_as(&tiles.view(), &form.view(), x.get(), tokens, offsets, y.get(), isa,
                        threads);
  }
  if (mode.exact) {
    return ql_linear_exact(&tiles.view(), x.get(), tokens, offsets, y.get(), isa, threads);
  }
  return ql_linear_int8(&tiles.view(), x.get(), tokens, mode.act_group, offsets, y.get(), isa,
                        threads);
}

void check_linears(const Weight& weight, const Exact<float>& x, const Exact<float>* bias,
                   int32_t threads, const char* name) {
  const int64_t tokens = x.count() / weight.columns();
  const Tiles portable(weight, QL_ISA_PORTABLE, 1);
  for (const Mode& mode : kModes) {
    const Exact<float> expected = exact_floats(tokens * weight.rows());
    linear(portable, x, mode, bias, expected, QL_ISA_PORTABLE, 1);
    for (const int32_t isa : instruction_sets()) {
      const Tiles tiles(weight, isa, threads);
      const Exact<float> y = exact_floats(expected.count());
      const int32_t status = linear(tiles, x, mode, bias, y, isa, threads);
      expect(status == QL_OK && same(y, expected), mode.name, name, isa, tokens);
    }
  }
}

void check_rows(const Weight& weight, int32_t threads, const char* name) {
  Exact<int64_t> ids(3, 8);
  ids[0] = weight.rows() - 1;
  ids[1] = 0;
  ids[2] = weight.rows() / 2;
  const Tiles portable(weight, QL_ISA_PORTABLE, 1);
  const Exact<float> all = exact_floats(weight.rows() * weight.columns());
  ql_dequantize(&portable.view(), nullptr, 0, weight.rows(), all.get(), QL_ISA_PORTABLE, 1);
  for (const int32_t isa : instruction_sets()) {
    const Tiles tiles(weight, isa, threads);
    expect(weight.equals_unpacked(tiles.memory().get(), isa, threads), "unpacking", name, isa);
    const Exact<float> whole = exact_floats(all.count());
    ql_dequantize(&tiles.view(), nullptr, 0, weight.rows(), whole.get(), isa, threads);
    expect(same(whole, all), "dequantizing", name, isa);
    const Exact<float> some = exact_floats(3 * weight.columns());
    ql_dequantize(&tiles.view(), ids.get(), 0, 3, some.get(), isa, threads);
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t k = 0; k < weight.columns(); ++k) {
        const float a = some[i * weight.columns() + k], b = all[ids[i] * weight.columns() + k];
        if (a != b && (a == a || b == b)) expect(false, "rows", name, isa, k);
      }
    }
  }
  ids[1] = weight.rows();
  const Exact<float> out = exact_floats(3 * weight.columns());
  expect(ql_dequantize(&portable.view(), ids.get(), 0, 3, out.get(), 0, threads) ==
             QL_ROW_OUT_OF_RANGE,
         "a row too far", name);
}

void check_shape(int64_t rows, const std::vector<Part>& parts, int64_t tokens, int32_t threads) {
  Random random(static_cast<uint64_t>(rows * 100 + tokens));
  const Weight weight(rows, parts, 7);
  const Exact<float> x = exact_floats(tokens * weight.columns());
  const Exact<float> bias = exact_floats(rows);
  random.fill(x, -3.0f, 3.0f);
  random.fill(bias, -1.0f, 1.0f);
  check_linears(weight, x, tokens % 2 ? &bias : nullptr, threads, parts[0].format);
  if (tokens == 1) check_rows(weight, threads, parts[0].format);
}

void check_timing(int32_t threads) {
  const Weight weight(70, {{"w4g64", 100}, {"w3g32z", 40}}, 3);
  for (const int32_t isa : instruction_sets()) {
    const Tiles tiles(weight, isa, 1);
    Exact<double> seconds(2);
    for (const int64_t act_group : {0, 32, 128}) {
      for (const int32_t exact : {0, 1}) {
        const int32_t status =
            ql_time_strips(&tiles.view(), tiles.memory().get(), tiles.memory().bytes(), 3, 5,
                           act_group, exact, isa, threads, 2, seconds.get());
        expect(status == QL_OK && seconds[1] > 0, "timing", "strips", isa, act_group);
      }
    }
  }
}

}  // namespace

void check_weights(int32_t threads) {
  for (const Format& format : kFormats) {
    const auto alone = [&](int64_t columns) { return std::vector<Part>{{format.name, columns}}; };
    check_shape(1, alone(1), 1, threads);
    check_shape(5, alone(31), 2, threads);
    check_shape(33, alone(100), 1, threads);
    check_shape(16, alone(300), 7, threads);
    check_shape(70, alone(157), 19, threads);
  }
  for (const int64_t tokens : {1, 4, 13, 33}) {
    check_shape(47, {{"w4g64", 448}, {"w8", 64}}, tokens, threads);
    check_shape(33, {{"w2g16z", 100}, {"w4g128z6", 31}, {"w5g32z", 45}}, tokens, threads);
    check_shape(20, {{"w3g128s5", 1}, {"fp8", 57}, {"nvfp4", 99}}, tokens, threads);
  }
  check_shape(40, {{"w2g64z4s4", 1088}, {"w8", 96}}, 9, threads);
  // Enough work for more than one thread.
  check_shape(700, {{"w4g64", 1600}, {"w8", 100}}, 1, threads);
  check_shape(300, {{"w6g256zs7", 600}}, 40, threads);
  check_timing(threads);
}

void check_unusual_numbers() {
  const float unusual[] = {NAN, INFINITY, -INFINITY, 3e38f, -1e30f, 1e-45f, 1e-38f, -0.0f};
  for (const char* name : {"w4g64", "w8g16zs8", "mxfp4", "fp8e5m2g64", "w2"}) {
    const Weight weight(37, {{name, 130}, {"w5g32z", 11}}, 5);
    for (const int64_t tokens : {1, 6, 19}) {
      const Exact<float> x = exact_floats(tokens * weight.columns());
      for (const float number : unusual) {
        Random random(11);
        random.fill(x, -2.0f, 2.0f);
        for (int64_t at = 0; at < x.count(); at += 97) x[at] = number;
        check_linears(weight, x, nullptr, 1, name);
        for (int64_t at = 0; at < x.count(); ++at) x[at] = number;
        check_linears(weight, x, nullptr, 1, name);
      }
    }
  }
}
