#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The warpgroup's matrix product. Included by instructions.cuh, which says when.
//
// d [64][2 kRegisters] (+)= A [64][16] B [16][2 kRegisters]. Thread t of the warpgroup holds of row t / 32 * 16 +
// t % 32 / 4, with c = t % 4 * 2, in d[4 n], d[4 n + 1] the columns 8 n + c and 8 n + c + 1; in d[4 n + 2], d[4 n + 3]
// the same columns eight rows below. A in registers: a[0] columns c, c + 1 of the row, a[1] eight rows below, a[2],
// a[3] the same eight columns on.

namespace linearard::cuda::sm90 {

/// Before the first product that reads or adds to registers which the thread has written.
__device__ inline void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until the committed groups, but for the last kPending, are done.
template <int kPending>
__device__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// The compiler may not move uses of these registers across: between products and the code that reads their result.
template <int kRegisters>
__device__ void pin(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i)
    asm volatile("" : "+f"(d[i])::"memory");
}

// The text of an instruction names its registers one by one.
#define LINEARARD_NAMES_32                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LINEARARD_NAMES_64                                                                       \
  LINEARARD_NAMES_32                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LINEARARD_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LINEARARD_SIXTEEN(i) LINEARARD_FOUR(i), LINEARARD_FOUR(i + 4), LINEARARD_FOUR(i + 8), LINEARARD_FOUR(i + 12)
#define LINEARARD_OPERANDS_32 LINEARARD_SIXTEEN(0), LINEARARD_SIXTEEN(16)
#define LINEARARD_OPERANDS_64 LINEARARD_OPERANDS_32, LINEARARD_SIXTEEN(32), LINEARARD_SIXTEEN(48)

// A and B in shared memory; the names of a, b and accumulate follow those of d.
#define LINEARARD_WGMMA_SHARED(kRegisters, columns, type, a_name, b_name, accumulate_name, a_major, b_major)          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_name                                                    \
               ", 0;\n"                                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" LINEARARD_NAMES_##kRegisters \
               "}, " a_name ", " b_name ", p, 1, 1, " a_major ", " b_major ";\n}\n"                                   \
               : LINEARARD_OPERANDS_##kRegisters                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0),                         \
                 "n"(kTransposeB ? 1 : 0))

// A in registers.
#define LINEARARD_WGMMA_REGISTERS(kRegisters, columns, type, a0, a1, a2, a3, b_name, accumulate_name, b_major)        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_name                                                    \
               ", 0;\n"                                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" LINEARARD_NAMES_##kRegisters \
               "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_name ", p, 1, 1, " b_major ";\n}\n"                          \
               : LINEARARD_OPERANDS_##kRegisters                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),               \
                 "n"(kTransposeB ? 1 : 0))

template <typename T>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<__half> = true;

#define LINEARARD_SHARED(kRegisters, columns, ...)                    \
  if constexpr (kIsHalf<T>) {                                         \
    LINEARARD_WGMMA_SHARED(kRegisters, columns, "f16", __VA_ARGS__);  \
  } else {                                                            \
    LINEARARD_WGMMA_SHARED(kRegisters, columns, "bf16", __VA_ARGS__); \
  }
#define LINEARARD_REGISTERS(kRegisters, columns, ...)                    \
  if constexpr (kIsHalf<T>) {                                            \
    LINEARARD_WGMMA_REGISTERS(kRegisters, columns, "f16", __VA_ARGS__);  \
  } else {                                                               \
    LINEARARD_WGMMA_REGISTERS(kRegisters, columns, "bf16", __VA_ARGS__); \
  }

/// @param a, b descriptors; transposed: rows of A (columns of B) are contiguous in memory, else the 16 that are summed
/// over. @param accumulate false: d is overwritten.
template <typename T, bool kTransposeA, bool kTransposeB, int kRegisters>
__device__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (kRegisters == 32) {
    LINEARARD_SHARED(32, "64", "%32", "%33", "%34", "%35", "%36")
  } else {
    static_assert(kRegisters == 64);
    LINEARARD_SHARED(64, "128", "%64", "%65", "%66", "%67", "%68")
  }
}

/// The same with A in registers, which must keep their values until the product is done.
template <typename T, bool kTransposeB, int kRegisters>
__device__ void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (kRegisters == 32) {
    LINEARARD_REGISTERS(32, "64", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
  } else {
    static_assert(kRegisters == 64);
    LINEARARD_REGISTERS(64, "128", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
  }
}

#undef LINEARARD_SHARED
#undef LINEARARD_REGISTERS
#undef LINEARARD_WGMMA_SHARED
#undef LINEARARD_WGMMA_REGISTERS
#undef LINEARARD_NAMES_32
#undef LINEARARD_NAMES_64
#undef LINEARARD_FOUR
#undef LINEARARD_SIXTEEN
#undef LINEARARD_OPERANDS_32
#undef LINEARARD_OPERANDS_64

}  // namespace linearard::cuda::sm90
