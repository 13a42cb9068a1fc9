#pragma once

#include "device_math.cuh"

namespace linearard::cuda {

/// A power of two on the upstream gradient that keeps H inside the range of half; 1 where it is not needed.
/// @param largest_grad max |grad_kl|, of any sign; null for other types
__device__ inline float half_range_scale(const float* largest_grad) {
  if (largest_grad == nullptr) return 1;
  const float largest = fabsf(*largest_grad);
  // H is at most 2 max |grad|: 2^14 of 65504 leaves room, and the small entries keep most of their digits.
  return largest > 0 && largest < Base<float>::kHuge ? exp2f(13.f - ceilf(log2f(largest))) : 1.f;
}

}  // namespace linearard::cuda
