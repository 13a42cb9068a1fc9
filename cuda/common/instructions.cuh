#pragma once

#include <cstdint>

// Instructions that every kernel may use. All inline PTX of the project lies in files of this name: the tests replace
// them by functions of the same names (tests/emulation), so that the kernels run on a CPU.

#ifdef LINEARARD_EMULATION

#include <emulation/common_instructions.h>

#else

namespace linearard::cuda {

/// The block's dynamic shared memory.
__device__ inline char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char shared[];
  return shared;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint16_t load_shared_16(uint32_t shared) {
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(shared));
  return bits;
}
__device__ inline void store_shared_16(uint32_t shared, uint16_t bits) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(bits) : "memory");
}

/// x, out of the compiler's sight: what is computed from it inside a loop stays there and takes no registers outside.
__device__ inline int anew(int x) {
  int same;
  asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(x));
  return same;
}
__device__ inline uint64_t anew(uint64_t x) {
  uint64_t same;
  asm volatile("mov.b64 %0, %1;" : "=l"(same) : "l"(x));
  return same;
}

// --- a kernel that begins before the one ahead of it in the stream has ended (see launch_overlapping) ----------------

/// Waits until the kernels ahead have ended and what they wrote is seen. Every thread's first access to memory that
/// another kernel touches, be it to read or to write, comes after it. Without such a launch there is nothing to wait
/// for.
__device__ inline void wait_for_kernels_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Once all blocks have come here or ended, the blocks of the next kernel may take what room there is. They wait there
/// for the end of this one, so nothing has to be done before.
__device__ inline void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// 2^x to 2 units in the last place; results below the normal range are 0.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace linearard::cuda

#endif
