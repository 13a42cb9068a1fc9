#pragma once

#include "../common/launch.cuh"
#include "rows_backward.cuh"
#include "rows_forward.cuh"
#include "tensor_map.h"

namespace linearard::cuda::sm90 {

inline Schedule schedule_of_rows(int problems, int owners, int block, int64_t head_bytes, int multiprocessors) {
  Schedule schedule = Schedule::make(problems, (owners + block - 1) / block, 1, head_bytes, multiprocessors);
  schedule.parts = 1;
  return schedule;
}

/// Instantiated in instantiations/, one file for each dtype and dimension.
template <typename T, int kDim>
cudaError_t launch_rows_forward(const TriangularForwardParams& p, int multiprocessors, cudaStream_t stream) {
  using Kernel = RowsForward<T, kDim>;
  RowsForwardArguments arguments;
  arguments.params = p;
  const int64_t head_bytes = int64_t{4} * p.tokens * p.student.dim;  // of both sides
  arguments.schedule = schedule_of_rows(p.batch * p.heads, p.tokens, Kernel::kOwners, head_bytes, multiprocessors);
  cudaError_t error = map_vectors(arguments.student, p.student, p.batch, p.heads, p.tokens);
  if (error == cudaSuccess) error = map_vectors(arguments.teacher, p.teacher, p.batch, p.heads, p.tokens);
  if (error != cudaSuccess) return error;
  return launch_blocks(rows_forward_kernel<T, kDim>, arguments, arguments.schedule.blocks(), kThreads,
                       Kernel::kSharedBytes, stream);
}

template <typename T, int kDim>
cudaError_t launch_rows_backward(const TriangularBackwardParams& p, int multiprocessors, cudaStream_t stream) {
  using Kernel = RowsBackward<T, kDim>;
  RowsBackwardArguments arguments;
  arguments.params = p;
  const int64_t head_bytes = int64_t{4} * p.tokens * p.student.dim;  // of both sides
  arguments.schedule = schedule_of_rows(p.batch * p.heads, p.tokens, Kernel::kOwners, head_bytes, multiprocessors);
  cudaError_t error = map_vectors(arguments.student, p.student, p.batch, p.heads, p.tokens);
  if (error == cudaSuccess) error = map_vectors(arguments.teacher, p.teacher, p.batch, p.heads, p.tokens);
  if (error == cudaSuccess) {
    error = map_token_values(arguments.token_values, p.token_values, p.batch * p.heads, p.tokens);
  }
  if (error != cudaSuccess) return error;
  return launch_blocks(rows_backward_kernel<T, kDim>, arguments, arguments.schedule.blocks(), kThreads,
                       Kernel::kSharedBytes, stream);
}

}  // namespace linearard::cuda::sm90
