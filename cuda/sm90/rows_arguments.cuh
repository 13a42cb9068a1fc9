#pragma once

#include <algorithm>

#include "rows.h"
#include "schedule.cuh"
#include "tensor_map.h"

namespace linearard::cuda::sm90 {

/// How long the walks of a head are, in tokens, where they differ: each owner's but for the longest is longer by one
/// than that of the owner with the next shorter one. Of no length: all are equally long.
struct RowWalks {
  int shortest = 0;  ///< less than 0: as many owners see nothing
  int longest = 0;

  static RowWalks of_queries(int offset, int others) { return {offset, others}; }
  static RowWalks of_keys(int owners, int others) { return {0, std::min(owners, others)}; }
};

/// Walks are not cut: an owner's result is complete at the end of its own.
/// @param block owners of a block of threads
inline Schedule schedule_of_rows(
    int problems, int owners, int block, const RowWalks& walks, int64_t head_bytes, int multiprocessors) {
  Schedule schedule = Schedule::make(problems, (owners + block - 1) / block, 1, 0, head_bytes, multiprocessors);
  schedule.parts = 1;
  if (walks.longest > 0) {
    schedule.order(static_cast<double>(walks.shortest) / block, static_cast<double>(walks.longest) / block,
                   multiprocessors);
  }
  return schedule;
}

/// What the backward kernels whose owners' gradient is complete after one walk have in common.
/// @param block owners of a block of threads
template <typename Arguments>
cudaError_t prepare_arguments(
    Arguments& arguments, const RowsBackwardParams& p, Pairs pairs, int block, int multiprocessors) {
  arguments.params = p;
  // Of both sides: heads that share the others, or walk over several of them, read one of them at a time.
  const int64_t head_bytes = int64_t{4} * p.others * p.own_student.dim / p.group;
  RowWalks walks;  // those of a relation meet all tokens, as rows or as keys
  if (p.causal && pairs == Pairs::kQueries) walks = RowWalks::of_queries(p.offset, p.others);
  if (p.causal && pairs == Pairs::kKeys) walks = RowWalks::of_keys(p.owners, p.others);
  arguments.schedule = schedule_of_rows(p.batch * p.heads, p.owners, block, walks, head_bytes, multiprocessors);
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
