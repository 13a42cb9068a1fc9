#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../params.h"

// The tensor-core kernels that exist: each is defined in a file of its own in this directory.

#define LINEARARD_FOR_EACH_DIM(macro, T) \
  macro(T, 64) macro(T, 80) macro(T, 96) macro(T, 128) macro(T, 192) macro(T, 256)

namespace linearard::cuda::mma {

template <typename T, int kDim>
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

#define LINEARARD_DECLARE(T, kDim)                                                       \
  template <>                                                                            \
  cudaError_t launch_forward<T, kDim>(const ForwardParams& params, cudaStream_t stream); \
  template <>                                                                            \
  cudaError_t launch_backward<T, kDim>(const BackwardParams& params, cudaStream_t stream);
LINEARARD_FOR_EACH_DIM(LINEARARD_DECLARE, __half)
LINEARARD_FOR_EACH_DIM(LINEARARD_DECLARE, __nv_bfloat16)
#undef LINEARARD_DECLARE

}  // namespace linearard::cuda::mma
