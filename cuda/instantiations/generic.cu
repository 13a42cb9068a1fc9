#include <algorithm>
#include <climits>

#include "../common/launch.cuh"
#include "../generic/backward.cuh"
#include "../generic/closeness.cuh"
#include "../generic/forward.cuh"
#include "generic.h"

namespace linearard::cuda::generic {
namespace {

/// Blocks of a grid that has `count` blocks' work. What runs only where marks say so has one for each multiprocessor:
/// mostly there is nothing to do, and a grid of many blocks takes a while to find that out.
unsigned grid_blocks(int64_t count, Blocks blocks) {
  return static_cast<unsigned>(blocks == Blocks::kAll ? count : std::min<int64_t>(count, multiprocessors()));
}

}  // namespace

template <typename Real>
cudaError_t launch_forward(const ForwardParams& params, Blocks blocks, cudaStream_t stream) {
  const int64_t per_head = (static_cast<int64_t>(params.visibility.rows) + kTile - 1) / kTile;
  const int64_t count = per_head * params.batch * params.heads;
  if (count > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_overlapping(forward_kernel<Real>, dim3(grid_blocks(count, blocks)), kThreads, 0, stream, params,
                            static_cast<int>(count), blocks == Blocks::kMarked, blocks == Blocks::kAllIfAnyIsMarked);
}

template <typename Real>
cudaError_t launch_backward(const BackwardParams& params, Blocks blocks, cudaStream_t stream) {
  const int64_t owners = params.row_term ? params.visibility.rows : params.visibility.keys;
  const int64_t count = (owners + kTile - 1) / kTile * params.batch * params.heads;
  if (count > INT_MAX) return cudaErrorInvalidConfiguration;
  const int slices = (params.owner_student.dim + kSlice - 1) / kSlice;
  constexpr int kSharedBytes = sizeof(BackwardShared<Real>);
  const dim3 grid(grid_blocks(count, blocks), static_cast<unsigned>(slices));
  return launch_overlapping(backward_kernel<Real>, grid, kThreads, kSharedBytes, stream, params,
                            static_cast<int>(count), blocks == Blocks::kMarked);
}

template cudaError_t launch_forward<float>(const ForwardParams&, Blocks, cudaStream_t);
template cudaError_t launch_forward<double>(const ForwardParams&, Blocks, cudaStream_t);
template cudaError_t launch_backward<float>(const BackwardParams&, Blocks, cudaStream_t);
template cudaError_t launch_backward<double>(const BackwardParams&, Blocks, cudaStream_t);

}  // namespace linearard::cuda::generic

namespace linearard::cuda {

cudaError_t measure_closeness(const ClosenessParams& params, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(params.batch) * params.heads;
  return launch_blocks(generic::closeness_kernel, params, heads, generic::kThreads, 0, stream);
}

}  // namespace linearard::cuda
