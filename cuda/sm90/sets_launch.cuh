#pragma once

#include "../common/launch.cuh"
#include "backward_sets.cuh"
#include "rows_arguments.cuh"
#include "tensor_map.h"

namespace linearard::cuda::sm90 {

static_assert(sizeof(SetsBackwardArguments) <= 4096, "parameters of any driver");

/// Instantiated in instantiations/, one file for each dtype and dimension.
template <typename T, int kDim>
cudaError_t launch_sets_backward(const RowsBackwardParams& p,
                                 float* key_sums,
                                 int multiprocessors,
                                 cudaStream_t stream) {
  using Kernel = Backward<T, kDim, SetsForm>;
  SetsBackwardArguments arguments;
  cudaError_t error = prepare_arguments(arguments, p, Pairs::kQueries, Kernel::kOwners, multiprocessors);
  if (error != cudaSuccess) return error;
  error = map_gradient(arguments.gradient, key_sums, p.batch * p.heads / p.group, p.others, p.own_student.dim);
  if (error != cudaSuccess) return error;
  return launch_overlapping_blocks(backward_kernel<T, kDim, SetsForm>, arguments, arguments.schedule.blocks(), kThreads,
                                   Kernel::kSharedBytes, stream);
}

}  // namespace linearard::cuda::sm90
