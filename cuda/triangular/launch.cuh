#pragma once

#include "../common/launch.cuh"
#include "backward.cuh"
#include "forward.cuh"
#include "instantiations.h"

namespace linearard::cuda::triangular {

/// Rows of a warp in slabs of 16: two while the vectors of 128 rows fit into shared memory.
template <int kDim>
inline constexpr int kSlabsFor = kDim <= 128 ? 2 : 1;

inline int64_t blocks_of(int64_t tokens, int owners, int problems) { return (tokens + owners - 1) / owners * problems; }

}  // namespace linearard::cuda::triangular

/// Defines the forward for one type and dimension, and in instantiations/ one file for each.
#define LINEARARD_INSTANTIATE_TRIANGULAR_FORWARD(T, kDim)                                                             \
  namespace linearard::cuda::triangular {                                                                             \
  template <>                                                                                                         \
  int forward_shared_bytes<T, kDim>() {                                                                               \
    return Forward<T, kDim, kSlabsFor<kDim>>::kSharedBytes;                                                           \
  }                                                                                                                   \
  template <>                                                                                                         \
  cudaError_t launch_forward<T, kDim>(const TriangularForwardParams& params, cudaStream_t stream) {                   \
    using K = Forward<T, kDim, kSlabsFor<kDim>>;                                                                      \
    return launch_blocks(forward_kernel<T, kDim, kSlabsFor<kDim>>, params,                                            \
                         blocks_of(params.tokens, K::kOwners, params.group.problems), mma::kThreads, K::kSharedBytes, \
                         stream);                                                                                     \
  }                                                                                                                   \
  }

#define LINEARARD_INSTANTIATE_TRIANGULAR_BACKWARD(T, kDim)                                                            \
  namespace linearard::cuda::triangular {                                                                             \
  template <>                                                                                                         \
  int backward_shared_bytes<T, kDim>() {                                                                              \
    return Backward<T, kDim, kSlabsFor<kDim>>::kSharedBytes;                                                          \
  }                                                                                                                   \
  template <>                                                                                                         \
  cudaError_t launch_backward<T, kDim>(const TriangularBackwardParams& params, cudaStream_t stream) {                 \
    using K = Backward<T, kDim, kSlabsFor<kDim>>;                                                                     \
    return launch_blocks(backward_kernel<T, kDim, kSlabsFor<kDim>>, params,                                           \
                         blocks_of(params.tokens, K::kOwners, params.group.problems), mma::kThreads, K::kSharedBytes, \
                         stream);                                                                                     \
  }                                                                                                                   \
  }
