#pragma once

#include "rows.h"
#include "schedule.cuh"
#include "tensor_map.h"

namespace linearard::cuda::sm90 {

inline Schedule schedule_of_rows(int problems, int owners, int block, int64_t head_bytes, int multiprocessors) {
  Schedule schedule = Schedule::make(problems, (owners + block - 1) / block, 1, head_bytes, multiprocessors);
  schedule.parts = 1;
  return schedule;
}

/// What the backward kernels whose owners' gradient is complete after one walk have in common.
/// @param block owners of a block of threads
template <typename Arguments>
cudaError_t prepare_arguments(Arguments& arguments, const RowsBackwardParams& p, int block, int multiprocessors) {
  arguments.params = p;
  // Of both sides: heads that share the others, or walk over several of them, read one of them at a time.
  const int64_t head_bytes = int64_t{4} * p.others * p.own_student.dim / p.group;
  arguments.schedule = schedule_of_rows(p.batch * p.heads, p.owners, block, head_bytes, multiprocessors);
  const int other_heads = p.heads * p.other_heads / p.group;
  const auto map = [&](CUtensorMap& to, const Vectors& vectors, int heads, int tokens) {
    return map_vectors(to, vectors, p.batch, heads, tokens);
  };
  cudaError_t error = map(arguments.own_student, p.own_student, p.heads, p.owners);
  if (error == cudaSuccess) error = map(arguments.own_teacher, p.own_teacher, p.heads, p.owners);
  if (error == cudaSuccess) error = map(arguments.other_student, p.other_student, other_heads, p.others);
  if (error == cudaSuccess) error = map(arguments.other_teacher, p.other_teacher, other_heads, p.others);
  return error;
}

}  // namespace linearard::cuda::sm90
