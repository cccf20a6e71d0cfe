// Which instruction sets this processor has, and which one computes.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#ifdef QL_X86
#include <cpuid.h>
#endif

namespace {

struct Isa {
  const char* name;  // in QUANTLIB_ISA
  const ql::TileKernels* tiles;
  bool (*supported)();
};

bool always() { return true; }

#ifdef QL_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}

bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512() { return has_avx512vnni() && __builtin_cpu_supports("avx512vbmi"); }

// By hand: the compiler's own list knows AVX-VNNI only since GCC 14. Whether the system saves the
// 256-bit registers is what has_avx2 says.
bool has_avx2vnni() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

// By QlIsa.
const Isa kIsas[] = {
    {"", nullptr, nullptr},
    {"portable", &ql::portable_tiles, always},
#ifdef QL_X86
    {"avx2", &ql::avx2_tiles, has_avx2},
    {"avx2vnni", &ql::avx2vnni_tiles, has_avx2vnni},
    {"avx512vnni", &ql::avx512vnni_tiles, has_avx512vnni},
    {"avx512", &ql::avx512_tiles, has_avx512},
#endif
};

constexpr int32_t kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

int32_t choose_isa() {
  const char* forced = getenv("QUANTLIB_ISA");
  int32_t chosen = 0;
  for (int32_t isa = 1; isa < kIsaCount; ++isa) {
    const bool wanted = !forced || !*forced || strcmp(forced, kIsas[isa].name) == 0;
    if (wanted && ql_supports_isa(isa)) chosen = isa;
  }
  return chosen;
}

}  // namespace

namespace ql {

const TileKernels* kernels_of(int32_t isa) {
  if (isa == QL_ISA_BEST) isa = ql_chosen_isa();
  return ql_supports_isa(isa) ? kIsas[isa].tiles : nullptr;
}

}  // namespace ql

int32_t ql_chosen_isa() {
  static const int32_t chosen = choose_isa();
  return chosen;
}

int32_t ql_supports_isa(int32_t isa) {
  return isa > 0 && isa < kIsaCount && kIsas[isa].supported();
}
