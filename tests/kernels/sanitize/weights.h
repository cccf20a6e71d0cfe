// Random weights as a checkpoint stores them, in buffers of exactly their size, and their tiles.
#pragma once

#include <cmath>
#include <deque>
#include <limits>
#include <vector>

#include "abi.h"
#include "buffers.h"

// An element without zero points is symmetric. `exponent_bits` is 0 for integers.
struct Format {
  const char* name;
  int32_t bits;
  int32_t exponent_bits;
  int64_t group;  // 0: a channel; -1: the whole weight has one scale
  int32_t scale_kind;
  int32_t scale_bits;
  int32_t zero_bits;
};

constexpr Format kFormats[] = {
    {"w2", 2, 0, 0, ql::SCALE_F16, 16, 0},
    {"w2g16z", 2, 0, 16, ql::SCALE_F16, 16, 2},
    {"w2g64z4s4", 2, 0, 64, ql::SCALE_CODE, 4, 4},
    {"w3g32z", 3, 0, 32, ql::SCALE_F16, 16, 3},
    {"w3g128s5", 3, 0, 128, ql::SCALE_CODE, 5, 0},
    {"w4g64", 4, 0, 64, ql::SCALE_F16, 16, 0},
    {"w4g128z6", 4, 0, 128, ql::SCALE_F16, 16, 6},
    {"w4g64z6s6", 4, 0, 64, ql::SCALE_CODE, 6, 6},
    {"w5g32z", 5, 0, 32, ql::SCALE_F16, 16, 5},
    {"w6t", 6, 0, -1, ql::SCALE_F16, 16, 0},
    {"w6g256zs7", 6, 0, 256, ql::SCALE_CODE, 7, 6},
    {"w7g128z", 7, 0, 128, ql::SCALE_F16, 16, 7},
    {"w8", 8, 0, 0, ql::SCALE_F16, 16, 0},
    {"w8g16zs8", 8, 0, 16, ql::SCALE_CODE, 8, 8},
    {"w8tz", 8, 0, -1, ql::SCALE_F16, 16, 8},
    {"fp8", 8, 4, 0, ql::SCALE_F16, 16, 0},
    {"fp8e5m2g64", 8, 5, 64, ql::SCALE_F16, 16, 0},
    {"fp6g32", 6, 3, 32, ql::SCALE_F16, 16, 0},
    {"mxfp6e2m3", 6, 2, 32, ql::SCALE_E8M0, 8, 0},
    {"mxfp4", 4, 2, 32, ql::SCALE_E8M0, 8, 0},
    {"nvfp4", 4, 2, 16, ql::SCALE_E4M3, 8, 0},
    {"fp5e2m2g32", 5, 2, 32, ql::SCALE_F16, 16, 0},
    {"fp5e3m1", 5, 3, 0, ql::SCALE_F16, 16, 0},
    {"fp7e2m4", 7, 2, 0, ql::SCALE_F16, 16, 0},
    {"fp7e3m3g64", 7, 3, 64, ql::SCALE_F16, 16, 0},
    {"fp7e5m1t", 7, 5, -1, ql::SCALE_F16, 16, 0},
    {"fp8e2m5g16", 8, 2, 16, ql::SCALE_F16, 16, 0},
};

inline const Format& format_of(const char* name) {
  for (const Format& format : kFormats) {
    if (strcmp(format.name, name) == 0) return format;
  }
  abort();
}

struct Part {
  const char* format;
  int64_t columns;
};

// Little-endian: bit i of a stream is bit i % 8 of its byte i / 8.
inline void put_bits(uint8_t* stream, int64_t at, int32_t bits, int64_t code) {
  for (int32_t bit = 0; bit < bits; ++bit, ++at) {
    if (code >> bit & 1) stream[at / 8] = static_cast<uint8_t>(stream[at / 8] | 1 << at % 8);
  }
}

inline uint16_t half_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);  // a positive normal number of half precision, rounded to zero
  return static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

// The values of all codes of a float element, infinities and NaNs among them.
inline Exact<float> float_values_of(const Format& f) {
  const int32_t mantissa_bits = f.bits - 1 - f.exponent_bits, half = 1 << (f.bits - 1);
  const int32_t bias = (1 << (f.exponent_bits - 1)) - 1, ones = (1 << mantissa_bits) - 1;
  const bool is_e4m3 = f.bits == 8 && f.exponent_bits == 4;
  const int32_t specials = f.exponent_bits == 5 ? 31 << mantissa_bits : half - is_e4m3;
  Exact<float> values(2 * half);
  for (int32_t code = 0; code < half; ++code) {
    const int32_t exponent = code >> mantissa_bits, normal = exponent > 0;
    const float significand = static_cast<float>((code & ones) + (normal << mantissa_bits));
    float value = std::ldexp(significand, (normal ? exponent : 1) - bias - mantissa_bits);
    if (code >= specials) value = std::numeric_limits<float>::quiet_NaN();
    if (f.exponent_bits == 5 && code == specials) value = std::numeric_limits<float>::infinity();
    values[code] = value;
    values[code + half] = -value;
  }
  return values;
}

// A canonical weight. Its tensors begin at odd addresses and end with their allocations.
class Weight {
 public:
  Weight(int64_t rows, const std::vector<Part>& parts, uint64_t seed) : random_(seed) {
    int64_t start = 0;
    for (const Part& part : parts) {
      add(rows, start, part.columns, format_of(part.format));
      start += part.columns;
    }
    view_ = {segments_.data(), static_cast<int64_t>(segments_.size()), rows, start};
  }
  Weight(const Weight&) = delete;

  const QlWeight& view() const { return view_; }
  int64_t rows() const { return view_.rows; }
  int64_t columns() const { return view_.columns; }

  // Whether packing these tiles away gives the same tensors.
  bool equals_unpacked(const uint8_t* tiles, int32_t isa, int32_t threads) const {
    std::deque<Exact<uint8_t>> again;
    std::vector<QlSegment> segments = segments_;
    size_t next = 0;
    for (QlSegment& s : segments) {
      for (uint8_t** tensor : {&s.packed, &s.scale, &s.row_scale, &s.zero_point}) {
        if (*tensor) *tensor = again.emplace_back(tensors_[next++].count(), 1).get();
      }
    }
    QlWeight target = view_;
    target.segments = segments.data();
    if (ql_tile_unpack(&target, tiles, isa, threads) != QL_OK) return false;
    for (size_t i = 0; i < again.size(); ++i) {
      if (!same_bytes(again[i], tensors_[i])) return false;
    }
    return true;
  }

 private:
  uint8_t* tensor(int64_t bytes) { return tensors_.emplace_back(bytes, 1).get(); }

  void add(int64_t rows, int64_t start, int64_t columns, const Format& f) {
    QlSegment s = {};
    const bool shared = f.group < 0;
    s.start = start;
    s.length = columns;
    s.group_size = shared ? 0 : f.group;
    s.groups = f.group > 0 ? (columns + f.group - 1) / f.group : 1;
    s.bits = f.bits;
    s.scale_kind = f.scale_kind;
    s.scale_bits = f.scale_bits;
    s.zero_bits = f.zero_bits;
    s.integer_unit = 1.0f;
    s.row_bytes = f.exponent_bits ? (columns * f.bits + 7) / 8 : (columns * f.bits + 31) / 32 * 4;
    const int64_t scale_bytes = (s.groups * f.scale_bits + 7) / 8, scale_rows = shared ? 1 : rows;
    s.scale_row_bytes = shared ? 0 : scale_bytes;
    s.packed = tensor(rows * s.row_bytes);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t k = 0; k < columns; ++k) {
        put_bits(s.packed + n * s.row_bytes, k * f.bits, f.bits, random_.below(1 << f.bits));
      }
    }
    s.scale = tensor(scale_rows * scale_bytes);
    for (int64_t n = 0; n < scale_rows; ++n) {
      for (int64_t g = 0; g < s.groups; ++g) {
        put_bits(s.scale + n * scale_bytes, g * f.scale_bits, f.scale_bits, scale_code(f));
      }
    }
    add_row_scale(s, rows);
    add_zeros(s, scale_rows);
    if (f.exponent_bits) add_values(s, f);
    if (!f.exponent_bits && !f.zero_bits) s.zero_constant = static_cast<float>(1 << (f.bits - 1));
    segments_.push_back(s);
  }

  int64_t scale_code(const Format& f) {
    switch (f.scale_kind) {
      case ql::SCALE_F16:
        return half_of(random_.uniform(0.01f, 0.1f));
      case ql::SCALE_E8M0:
        return 118 + random_.below(8);
      case ql::SCALE_E4M3:
        return random_.below(0x7F);
      default:
        return random_.below(1 << f.scale_bits);
    }
  }

  void add_row_scale(QlSegment& s, int64_t rows) {
    const float whole = 0.01f;
    if (s.scale_kind == ql::SCALE_E4M3) memcpy(s.row_scale = tensor(4), &whole, 4);
    if (s.scale_kind != ql::SCALE_CODE) return;
    s.row_scale = tensor(2 * rows);
    for (int64_t n = 0; n < rows; ++n) {
      put_bits(s.row_scale, 16 * n, 16, half_of(random_.uniform(0.01f, 0.1f)));
    }
  }

  // Packed along N: word w of a group has the bits from 32 * w on of its rows' codes.
  void add_zeros(QlSegment& s, int64_t rows) {
    if (s.zero_bits == 0) return;
    const auto largest = [](int32_t bits) { return static_cast<float>((1 << bits) - 1); };
    s.zero_step = largest(s.bits) / largest(s.zero_bits);
    s.zero_point = tensor((rows * s.zero_bits + 31) / 32 * s.groups * 4);
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t at = 0; at < rows * s.zero_bits; ++at) {
        put_bits(s.zero_point + (at / 32 * s.groups + g) * 4, at % 32, 1, random_.below(2));
      }
    }
  }

  void add_values(QlSegment& s, const Format& f) {
    const Exact<float>& values = floats_.emplace_back(float_values_of(f));
    s.float_values = values.get();
    if (f.exponent_bits != 2 || f.bits > 7) return;
    s.integer_unit = std::ldexp(1.0f, 3 - f.bits);
    s.zero_constant = values[(1 << (f.bits - 1)) - 1] / s.integer_unit;
    const Exact<uint8_t>& integers = bytes_.emplace_back(values.count(), 1);
    s.integer_values = integers.get();
    for (int64_t code = 0; code < values.count(); ++code) {
      integers[code] = static_cast<uint8_t>(values[code] / s.integer_unit + s.zero_constant);
    }
  }

  Random random_;
  std::vector<QlSegment> segments_;
  std::deque<Exact<uint8_t>> tensors_;  // in the order of the segments' pointers
  std::deque<Exact<float>> floats_;
  std::deque<Exact<uint8_t>> bytes_;
  QlWeight view_;
};

// The tiles of a weight, for one instruction set, in memory of exactly their size.
class Tiles {
 public:
  Tiles(const Weight& weight, int32_t isa, int32_t threads)
      : memory_(ql_tile_bytes(&weight.view()), 0, 64),
        segments_(static_cast<size_t>(weight.view().segment_count)) {
    // What packing leaves as it was is read by nobody, or does not matter.
    memset(memory_.get(), 0xA5, static_cast<size_t>(memory_.bytes()));
    const int32_t status = ql_tile_pack(&weight.view(), memory_.get(), isa, threads);
    expect(status == QL_OK, "packing", "status", status);
    ql_tile_describe(&weight.view(), memory_.get(), segments_.data());
    view_ = {segments_.data(), weight.view().segment_count, weight.rows(), weight.columns()};
  }
  Tiles(const Tiles&) = delete;

  const ql::TiledWeight& view() const { return view_; }
  const Exact<uint8_t>& memory() const { return memory_; }

 private:
  Exact<uint8_t> memory_;
  std::vector<ql::TileSegment> segments_;
  ql::TiledWeight view_;
};

inline std::vector<int32_t> instruction_sets() {
  std::vector<int32_t> found;
  for (int32_t isa = QL_ISA_PORTABLE; isa <= QL_ISA_AVX512; ++isa) {
    if (ql_supports_isa(isa)) found.push_back(isa);
  }
  return found;
}
