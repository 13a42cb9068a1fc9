#pragma once

#include "../common/device_math.cuh"
#include "params.h"

// What a head's tokens have in common in the forward.

namespace linearard::cuda::triangular {

__device__ inline int blocks_of_head(int tokens) { return (tokens + kRedoRows - 1) / kRedoRows; }

/// What the exponents of a token's row begin with. @param reference t_ii
__device__ inline float token_bias(float reference, bool is_plain) {
  return is_plain ? 0.f : reference / 2 - kHeadroom / 2;
}

struct ForwardHead {
  bool is_wide;
  bool is_plain;
  float center;

  /// @param largest t_ii, @param may_be_plain whether the kernels know plain heads
  __device__ static ForwardHead of(float largest, bool may_be_plain) {
    const bool is_plain = may_be_plain && largest < kPlainReach * kLog2E;
    // Mid-range of t_ii / 2: both ends of 2^(t_ii / 2 - center) are as far from float's. Not below: NaN is wide.
    return {!(largest < kLargestSpread * kLog2E), is_plain, is_plain ? kHeadroom / 2 : largest / 4};
  }

  /// By a whole warp. @param blocks bits of the largest t_ii of each: floats that are not negative are ordered as
  /// integers are, and NaN is above all of them
  __device__ static ForwardHead of(const int* blocks, int count) {
    int largest = 0;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32)
      largest = max(largest, __ldg(blocks + i));
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2)
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lane));
    return of(__int_as_float(largest), true);
  }

  /// @param reference t_ii
  __device__ ForwardToken value(float reference) const {
    return {token_bias(reference, is_plain), is_plain ? 1.f : exp2f(reference / 2 - center)};
  }
};

}  // namespace linearard::cuda::triangular
