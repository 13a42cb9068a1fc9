#include <climits>

#include "../common/launch.cuh"
#include "../generic/backward.cuh"
#include "../generic/closeness.cuh"
#include "../generic/forward.cuh"
#include "generic.h"

namespace linearard::cuda::generic {

template <typename Real>
cudaError_t launch_forward(const ForwardParams& params, Blocks blocks, cudaStream_t stream) {
  const int64_t per_head = (static_cast<int64_t>(params.visibility.rows) + kTile - 1) / kTile;
  const int64_t count = per_head * params.batch * params.heads;
  if (count > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(forward_kernel<Real>, dim3(static_cast<unsigned>(count)), kThreads, 0, stream, params,
                       blocks == Blocks::kMarked, blocks == Blocks::kAllIfAnyIsMarked);
}

template <typename Real>
cudaError_t launch_backward(const BackwardParams& params, Blocks blocks, cudaStream_t stream) {
  const int64_t owners = params.row_term ? params.visibility.rows : params.visibility.keys;
  const int64_t count = (owners + kTile - 1) / kTile * params.batch * params.heads;
  if (count > INT_MAX) return cudaErrorInvalidConfiguration;
  const int slices = (params.owner_student.dim + kSlice - 1) / kSlice;
  constexpr int kSharedBytes = sizeof(BackwardShared<Real>);
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(slices));
  return launch_kernel(backward_kernel<Real>, grid, kThreads, kSharedBytes, stream, params, blocks == Blocks::kMarked);
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
