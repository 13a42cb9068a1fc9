#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "params.h"

// The triangular kernels that exist: each is defined in a file of its own in ../instantiations. In the backward of
// larger dimensions the gradients of a tile's rows and columns do not fit into registers together.

#define LINEARARD_FOR_EACH_TRIANGULAR_FORWARD(macro, T) \
  macro(T, 64) macro(T, 80) macro(T, 96) macro(T, 128) macro(T, 192) macro(T, 256)
#define LINEARARD_FOR_EACH_TRIANGULAR_BACKWARD(macro, T) macro(T, 64) macro(T, 80) macro(T, 96) macro(T, 128)

namespace linearard::cuda::triangular {

template <typename T, int kDim>
int forward_shared_bytes();
template <typename T, int kDim>
int backward_shared_bytes();
template <typename T, int kDim>
cudaError_t launch_forward(const TriangularForwardParams& params, cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_backward(const TriangularBackwardParams& params, cudaStream_t stream);

#define LINEARARD_DECLARE(T, kDim)     \
  template <>                          \
  int forward_shared_bytes<T, kDim>(); \
  template <>                          \
  cudaError_t launch_forward<T, kDim>(const TriangularForwardParams& params, cudaStream_t stream);
LINEARARD_FOR_EACH_TRIANGULAR_FORWARD(LINEARARD_DECLARE, __half)
LINEARARD_FOR_EACH_TRIANGULAR_FORWARD(LINEARARD_DECLARE, __nv_bfloat16)
#undef LINEARARD_DECLARE

#define LINEARARD_DECLARE(T, kDim)      \
  template <>                           \
  int backward_shared_bytes<T, kDim>(); \
  template <>                           \
  cudaError_t launch_backward<T, kDim>(const TriangularBackwardParams& params, cudaStream_t stream);
LINEARARD_FOR_EACH_TRIANGULAR_BACKWARD(LINEARARD_DECLARE, __half)
LINEARARD_FOR_EACH_TRIANGULAR_BACKWARD(LINEARARD_DECLARE, __nv_bfloat16)
#undef LINEARARD_DECLARE

}  // namespace linearard::cuda::triangular
