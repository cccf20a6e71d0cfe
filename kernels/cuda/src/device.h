// The instructions that kernels are written in: everything a kernel does beyond C++ goes through
// `ptx::`, so that one source is compiled by nvcc, by NVRTC, and, for the emulator, by any C++17
// compiler (emulated_device.h has the other side). No CUDA header is needed.
//
// Contracts, of both sides:
//   thread_index    threadIdx.x, read anew: what is computed from it is not kept in registers for
//                   the next time, over a loop that needs them
//   copy_async      16 bytes to shared memory, aligned at both ends: `bytes` of them from global
//                   memory, zeros for the rest; with a policy, the L2 cache gives the line up first
//   wait_copies<n>  all but the latest n committed groups of this thread have arrived
//   load_matrices   ldmatrix.x4: lane 8m + r gives the address of row r (16 bytes) of matrix m;
//                   lane 4r + c gets columns 2c and 2c + 1 of row r of matrix m in registers[m]
//   multiply        c += a b, mma.m16n8k16 with float sums; fragments as the PTX manual has them
//   multiply_sparse c += a b, mma.sp.m16n8k32 with float sums: a has two of every four columns, and
//                   `places` says which, two bits each, ascending: of columns 0 to 15 in lane 0 of
//                   every four and 16 to 31 in lane 1 (pair 0), or in lanes 2 and 3 (pair 1); low
//                   half the row lane / 4, high half the one 8 below
//   multiply_integers
//                   d = a b + c, exact: mma.m16n8k32 of bytes, m16n8k64 of nibbles. Nibbles are for
//                   sm_80 to sm_89: later tensor cores have none, and compilers emulate them
//   load_shared, store_shared, load_matrices, multiply, multiply_sparse, multiply_integers
//                   warp-wide: all 32 lanes come to the same one
//   load_shared_alone, store_shared_alone
//                   of one lane, whatever the others do
//   and_or, and_xor (a & mask) | bits, (a & mask) ^ bits
//   fma2            a b + c of two 16-bit numbers each, rounded once
//   fma, product    a b + c and a b, rounded once: no compiler puts them together differently
//   power_of_two    2^a, off by 2^-22 of it at most
//   quotient        a / b, rounded once; nearest: to a whole number, ties to even
//   as_float, as_bits
//                   the float with these bits, and the bits of a float
//   exchange        the value of lane ^ `other`; warp-wide
//   load_acquire, store_release
//                   flags between blocks, at the scope of the GPU
#pragma once

#ifdef QL_EMULATED
#include "emulated_device.h"
#else

#ifdef __CUDACC_RTC__
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#define QL_KERNEL(name)

namespace ptx {

using Shared = uint32_t;

struct Half {};
struct BFloat {};
template <class Element>
constexpr bool is_half = false;
template <>
constexpr bool is_half<Half> = true;
struct Int8 {};
struct Int4 {};
struct Uint4 {};

__device__ __forceinline__ Shared shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void copy_async(Shared to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void copy_async(Shared to, const void* from, int bytes,
                                           uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(bytes), "l"(policy));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row)
               : "memory");
}

// Plain loads and stores, which the compiler may move between barriers as it likes.
template <class Value>
__device__ __forceinline__ Value load_shared(Shared from) {
  return *static_cast<const Value*>(__cvta_shared_to_generic(from));
}

template <class Value>
__device__ __forceinline__ void store_shared(Shared to, Value value) {
  *static_cast<Value*>(__cvta_shared_to_generic(to)) = value;
}

template <class Value = float>
__device__ __forceinline__ Value load_shared_alone(Shared from) {
  return load_shared<Value>(from);
}

template <class Value>
__device__ __forceinline__ void store_shared_alone(Shared to, Value value) {
  store_shared(to, value);
}

#define QL_MULTIPLY(name)                                                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                       \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Element>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<Half>(float (&c)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
  QL_MULTIPLY("f16");
}
template <>
__device__ __forceinline__ void multiply<BFloat>(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  QL_MULTIPLY("bf16");
}
#undef QL_MULTIPLY

#define QL_MULTIPLY_SPARSE(name)                                                                   \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." name "." name                  \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"   \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),    \
        "r"(places), "n"(pair))

template <class Element, int pair>
__device__ __forceinline__ void multiply_sparse(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t places) {
  if constexpr (is_half<Element>) {
    QL_MULTIPLY_SPARSE("f16");
  } else {
    QL_MULTIPLY_SPARSE("bf16");
  }
}
#undef QL_MULTIPLY_SPARSE

#define QL_MULTIPLY_INTEGERS(Left, Right, shape)                                                  \
  template <>                                                                                      \
  __device__ __forceinline__ void multiply_integers<Left, Right>(                                  \
      int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {            \
    asm("mma.sync.aligned." shape                                                                  \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                     \
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),  \
          "r"(c[2]), "r"(c[3]));                                                                   \
  }

template <class Left, class Right>
__device__ __forceinline__ void multiply_integers(int (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const int (&c)[4]);
QL_MULTIPLY_INTEGERS(Int8, Int8, "m16n8k32.row.col.s32.s8.s8.s32")
QL_MULTIPLY_INTEGERS(Int4, Int4, "m16n8k64.row.col.s32.s4.s4.s32")
QL_MULTIPLY_INTEGERS(Int4, Uint4, "m16n8k64.row.col.s32.s4.u4.s32")
#undef QL_MULTIPLY_INTEGERS

__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float power_of_two(float a) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(a));
  return out;
}
__device__ __forceinline__ float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float nearest(float a) { return rintf(a); }
__device__ __forceinline__ float as_float(int bits) { return __int_as_float(bits); }
__device__ __forceinline__ int as_bits(float value) { return __float_as_int(value); }
__device__ __forceinline__ int exchange(int value, int other) {
  return __shfl_xor_sync(0xffffffffu, value, other);
}

// One instruction: left to itself, the compiler takes two where both constants are immediate.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(a), "r"(mask), "r"(bits));
  return out;
}
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(out) : "r"(a), "r"(mask), "r"(bits));
  return out;
}

template <class Element>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
template <>
__device__ __forceinline__ uint32_t fma2<BFloat>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// The number in the low 16 bits.
template <class Element>
__device__ __forceinline__ float to_float(uint32_t low_bits);
template <>
__device__ __forceinline__ float to_float<Half>(uint32_t low_bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(static_cast<uint16_t>(low_bits)));
  return out;
}
template <>
__device__ __forceinline__ float to_float<BFloat>(uint32_t low_bits) {
  return __uint_as_float(low_bits << 16);
}

// Two floats, each rounded to nearest even, the first in the low bits.
template <class Element>
__device__ __forceinline__ uint32_t to_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t to_pair<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ uint32_t to_pair<BFloat>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <class Value>
__device__ __forceinline__ Value load_global(const void* from) {
  return *static_cast<const Value*>(from);
}

template <class Value>
__device__ __forceinline__ void store_global(void* to, Value value) {
  *static_cast<Value*>(to) = value;
}

// Past the L1 cache, which other multiprocessors do not keep coherent.
template <class Value>
__device__ __forceinline__ Value load_global_from_l2(const void* from);
template <>
__device__ __forceinline__ float4 load_global_from_l2<float4>(const void* from) {
  float4 out;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
               : "l"(from)
               : "memory");
  return out;
}

template <>
__device__ __forceinline__ float load_global_from_l2<float>(const void* from) {
  float out;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(out) : "l"(from) : "memory");
  return out;
}

__device__ __forceinline__ int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* to, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

}  // namespace ptx
#endif
