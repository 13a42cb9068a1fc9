#pragma once

#include "../common/launch.cuh"
#include "backward_relation.cuh"
#include "forward.cuh"
#include "tensor_map.h"

namespace linearard::cuda::sm90 {

static_assert(sizeof(ForwardArguments) <= 4096 && sizeof(BackwardArguments) <= 4096, "parameters of any driver");

template <typename Arguments, typename Params>
cudaError_t prepare_arguments(Arguments& arguments, const Params& p, int owners, int multiprocessors) {
  const int token_blocks = (p.tokens + owners - 1) / owners;
  const int longest = (p.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t head_bytes = int64_t{4} * p.tokens * p.student.dim;  // of both sides
  arguments.params = p;
  arguments.schedule =
      Schedule::make(p.group.problems, token_blocks, longest, owners / kTileTokens, head_bytes, multiprocessors);
  for (int r = 0; r < kLargestGroup && p.group.first[r] < p.group.problems; ++r) {
    const int heads = p.group.heads[r];
    cudaError_t error = map_vectors(arguments.student[r], p.vectors.student[r], p.batch, heads, p.tokens);
    if (error != cudaSuccess) return error;
    error = map_vectors(arguments.teacher[r], p.vectors.teacher[r], p.batch, heads, p.tokens);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, int kDim, bool kCausal>
cudaError_t launch_forward_kernel(const TriangularForwardParams& params, int multiprocessors, cudaStream_t stream) {
  using Kernel = Forward<T, kDim, kCausal>;
  ForwardArguments arguments;
  const cudaError_t error = prepare_arguments(arguments, params, Kernel::kOwners, multiprocessors);
  if (error != cudaSuccess) return error;
  return launch_overlapping_blocks(forward_kernel<T, kDim, kCausal>, arguments, arguments.schedule.blocks(),
                                   Kernel::kThreads, Kernel::kSharedBytes, stream);
}

/// Instantiated in instantiations/, one file for each dtype and dimension.
template <typename T, int kDim>
cudaError_t launch_forward(const TriangularForwardParams& params, int multiprocessors, cudaStream_t stream) {
  return params.causal ? launch_forward_kernel<T, kDim, true>(params, multiprocessors, stream)
                       : launch_forward_kernel<T, kDim, false>(params, multiprocessors, stream);
}

template <typename T, int kDim>
cudaError_t launch_backward(const TriangularBackwardParams& params, int multiprocessors, cudaStream_t stream) {
  using Kernel = Backward<T, kDim, RelationForm>;
  BackwardArguments arguments;
  cudaError_t error = prepare_arguments(arguments, params, Kernel::kOwners, multiprocessors);
  if (error != cudaSuccess) return error;
  const int heads = params.group.problems;
  error = map_token_values(arguments.token_values, params.token_values, heads, params.tokens);
  if (error != cudaSuccess) return error;
  error = map_gradient(arguments.gradient, params.gradient, heads, params.tokens, params.student.dim);
  if (error != cudaSuccess) return error;
  return launch_overlapping_blocks(backward_kernel<T, kDim, RelationForm>, arguments, arguments.schedule.blocks(),
                                   kThreads, Kernel::kSharedBytes, stream);
}

}  // namespace linearard::cuda::sm90
