#pragma once

#include <cmath>

#include "shared_memory.h"

// Twins of cuda/common/instructions.cuh.

namespace linearard::cuda {

inline char* dynamic_shared_memory() { return emulation::dynamic_shared_memory(); }

inline uint32_t shared_address(const void* pointer, LINEARARD_CALLER) {
  return emulation::shared_address_of(pointer, at);
}

inline uint16_t load_shared_16(uint32_t shared, LINEARARD_CALLER) {
  return emulation::read_shared<uint16_t>(shared, at);
}
inline void store_shared_16(uint32_t shared, uint16_t bits, LINEARARD_CALLER) {
  emulation::write_shared(shared, bits, at);
}

inline int anew(int x) { return x; }
inline uint64_t anew(uint64_t x) { return x; }

// Kernels run one after the other.
inline void wait_for_kernels_ahead() {}
inline void let_next_kernel_begin() {}

inline float exp2_approximate(float x) {
  const float result = std::exp2(x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.f : result;
}

}  // namespace linearard::cuda
