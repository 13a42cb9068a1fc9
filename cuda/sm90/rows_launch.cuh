#pragma once

#include "../common/launch.cuh"
#include "rows_arguments.cuh"
#include "rows_backward.cuh"
#include "rows_forward.cuh"
#include "tensor_map.h"

namespace linearard::cuda::sm90 {

template <typename T, int kDim, Pairs kPairs>
cudaError_t launch_rows(const RowsBackwardParams& p, int multiprocessors, cudaStream_t stream) {
  using Kernel = RowsBackward<T, kDim, kPairs>;
  RowsBackwardArguments arguments;
  cudaError_t error = prepare_arguments(arguments, p, kPairs, Kernel::kOwners, multiprocessors);
  if (error == cudaSuccess && p.other_values != nullptr) {
    const int other_heads = p.heads * p.other_heads / p.group;
    error = map_token_values(arguments.other_values, p.other_values, p.batch * other_heads, p.others);
  }
  if (error != cudaSuccess) return error;
  return launch_overlapping_blocks(rows_backward_kernel<T, kDim, kPairs>, arguments, arguments.schedule.blocks(),
                                   kThreads, Kernel::kSharedBytes, stream);
}

template <typename T, int kDim, typename Rows>
cudaError_t launch_rows(const RowsForwardParams& p, int multiprocessors, cudaStream_t stream) {
  using Kernel = RowsForward<T, kDim, Rows>;
  RowsForwardArguments arguments;
  arguments.params = p;
  const int64_t head_bytes = int64_t{4} * p.others * p.own_student.dim / p.group;  // of both sides
  const RowWalks walks = p.causal ? RowWalks::of_queries(p.offset, p.others) : RowWalks{};
  arguments.schedule =
      schedule_of_rows(p.batch * p.heads, p.owners, Kernel::kOwners, walks, head_bytes, multiprocessors);
  const int other_heads = p.heads / p.group;
  cudaError_t error = map_vectors(arguments.own_student, p.own_student, p.batch, p.heads, p.owners);
  if (error == cudaSuccess) error = map_vectors(arguments.own_teacher, p.own_teacher, p.batch, p.heads, p.owners);
  if (error == cudaSuccess)
    error = map_vectors(arguments.other_student, p.other_student, p.batch, other_heads, p.others);
  if (error == cudaSuccess)
    error = map_vectors(arguments.other_teacher, p.other_teacher, p.batch, other_heads, p.others);
  if (error != cudaSuccess) return error;
  return launch_overlapping_blocks(rows_forward_kernel<T, kDim, Rows>, arguments, arguments.schedule.blocks(), kThreads,
                                   Kernel::kSharedBytes, stream);
}

/// Instantiated in instantiations/, one file for each dtype and dimension.
template <typename T, int kDim>
cudaError_t launch_rows_forward(const TriangularForwardParams& p, int multiprocessors, cudaStream_t stream) {
  RowsForwardParams rows{};
  rows.own_student = rows.other_student = p.student;
  rows.own_teacher = rows.other_teacher = p.teacher;
  rows.batch = p.batch;
  rows.heads = p.heads;
  rows.group = 1;
  rows.owners = rows.others = p.tokens;
  rows.causal = p.causal;
  rows.factors = p.factors;
  rows.token_values = p.token_values;
  rows.centers = p.centers;
  rows.wide_heads = p.wide_heads;
  rows.sums = p.sums;
  rows.own = p.own;
  return launch_rows<T, kDim, RelationRows>(rows, multiprocessors, stream);
}

template <typename T, int kDim>
cudaError_t launch_rows_backward(const TriangularBackwardParams& p, int multiprocessors, cudaStream_t stream) {
  RowsBackwardParams rows{};
  rows.own_student = rows.other_student = p.student;
  rows.own_teacher = rows.other_teacher = p.teacher;
  rows.batch = p.batch;
  rows.heads = p.heads;
  rows.other_heads = rows.group = 1;
  rows.owners = rows.others = p.tokens;
  rows.causal = p.causal;
  rows.factors = p.factors;
  rows.own_values = rows.other_values = p.token_values;
  rows.wide_heads = p.wide_heads;
  rows.gradient = p.result;
  rows.output_scale = p.output_scale;
  rows.largest_grad = p.largest_grad;
  rows.redo = p.redo;
  return launch_rows<T, kDim, Pairs::kRelation>(rows, multiprocessors, stream);
}

template <typename T, int kDim>
cudaError_t launch_pairs_forward(const RowsForwardParams& p, int multiprocessors, cudaStream_t stream) {
  return launch_rows<T, kDim, AttentionRows>(p, multiprocessors, stream);
}

template <typename T, int kDim>
cudaError_t launch_pairs_backward(const RowsBackwardParams& p, Pairs pairs, int multiprocessors, cudaStream_t stream) {
  return pairs == Pairs::kQueries ? launch_rows<T, kDim, Pairs::kQueries>(p, multiprocessors, stream)
                                  : launch_rows<T, kDim, Pairs::kKeys>(p, multiprocessors, stream);
}

}  // namespace linearard::cuda::sm90
