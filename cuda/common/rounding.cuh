#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace linearard::cuda {

/// Rounded to the nearest; beyond the range of the type its largest value, not infinity. NaN stays.
template <typename T>
__device__ T saturated_to(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x > 65504.f ? 65504.f : (x < -65504.f ? -65504.f : x));
  } else {
    constexpr float kLargest = 3.3895313892515355e38f;
    return __float2bfloat16_rn(x > kLargest ? kLargest : (x < -kLargest ? -kLargest : x));
  }
}

}  // namespace linearard::cuda
