#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "backward.cuh"
#include "forward.cuh"

namespace linearard::cuda::mma {

/// Rows of a warp in slabs of 16: two while the gradient of 32 rows fits into registers.
template <int kDim>
inline constexpr int kSlabsFor = kDim <= 128 ? 2 : 1;

/// Blocks of a grid for rows in `count` blocks; of listed rows, mostly none, no more than the GPU holds: a grid of many
/// blocks takes a while to find out that there is nothing to do.
inline int64_t grid_blocks(int64_t count, bool listed) {
  return listed ? std::min<int64_t>(count, 2 * multiprocessors()) : count;
}

/// Defined in instantiations/, one file for each dtype and dimension.
template <typename T, int kDim>
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

#define LINEARARD_INSTANTIATE(T, kDim)                                                                         \
  namespace linearard::cuda::mma {                                                                             \
  template <>                                                                                                  \
  cudaError_t launch_forward<T, kDim>(const ForwardParams& params, cudaStream_t stream) {                      \
    using K = Forward<T, kDim, kSlabsFor<kDim>>;                                                               \
    const int64_t blocks = (static_cast<int64_t>(params.visibility.rows) + K::kOwners - 1) / K::kOwners;       \
    const int64_t grid = grid_blocks(blocks * params.batch * params.heads, params.row_counts != nullptr);      \
    return launch_overlapping_blocks(forward_kernel<T, kDim, kSlabsFor<kDim>>, params, grid, kThreads,         \
                                     K::kSharedBytes, stream);                                                 \
  }                                                                                                            \
  template <>                                                                                                  \
  cudaError_t launch_backward<T, kDim>(const BackwardParams& params, cudaStream_t stream) {                    \
    using K = Backward<T, kDim, kSlabsFor<kDim>>;                                                              \
    const int64_t blocks = (static_cast<int64_t>(K::owner_count(params)) + K::kOwners - 1) / K::kOwners;       \
    return launch_overlapping_blocks(backward_kernel<T, kDim, kSlabsFor<kDim>>, params,                        \
                                     blocks * params.batch * params.heads, kThreads, K::kSharedBytes, stream); \
  }                                                                                                            \
  }

}  // namespace linearard::cuda::mma
