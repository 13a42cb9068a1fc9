#pragma once

#include "params.h"

// Which relation of a group a problem belongs to.

namespace linearard::cuda::triangular {

struct Place {
  int relation;
  int problem;  ///< counted from the relation's first
  int batch;
  int head;
};

/// Without a loop over the table: what is compared are constants of the launch.
__device__ inline Place place_of(const RelationGroup& group, int problem) {
  int relation = 0;
#pragma unroll
  for (int r = 1; r < kLargestGroup; ++r)
    relation += problem >= group.first[r] ? 1 : 0;
  const int own = problem - group.first[relation];
  const int heads = group.heads[relation];
  return {relation, own, own / heads, own % heads};
}

}  // namespace linearard::cuda::triangular
