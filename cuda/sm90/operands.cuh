#pragma once

#include "../common/instructions.cuh"
#include "descriptors.cuh"

namespace linearard::cuda::sm90 {

/// A matrix descriptor whose steps change its lower half only. Made anew for each use: descriptors of all steps, kept
/// from tile to tile, would take the registers that accumulators need.
template <int kChunkBytes>
class Operand {
 public:
  __device__ explicit Operand(uint32_t shared)
      : low_(static_cast<uint32_t>(anew(static_cast<int>(matrix_descriptor<kChunkBytes>(shared))))) {}

  /// @param step as dimension_step or token_step gives it, or a sum of them
  __device__ uint64_t at(uint64_t step) const {
    constexpr uint64_t kUpper = (uint64_t{1} << 62 | static_cast<uint64_t>(kSwizzleBytes / 16) << 32) >> 32;
    return kUpper << 32 | (low_ + static_cast<uint32_t>(step));
  }

 private:
  uint32_t low_;
};

}  // namespace linearard::cuda::sm90
