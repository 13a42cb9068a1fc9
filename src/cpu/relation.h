#pragma once

#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <linearard/plan.h>

#include "arguments.h"
#include "cpu/operand.h"
#include "cpu/statistics.h"
#include "logit_form.h"
#include "row_sets.h"

// The relation kernels on the CPU: the triangular traversal of docs/mathematics.md, tile by tile on all threads.

namespace linearard::cpu {

/// One head of one sequence.
struct Problem {
  int64_t head;
  const RowSet* rows;
};

/// Rows (and columns) of a tile: T and delta of two tiles and the blocks that they multiply stay in the L2 cache.
int64_t tile_rows_for(int64_t longest, int64_t head_dimension);

/// Heads that are processed together: enough tiles for all threads in each round, and no more workspace than that.
/// Returns the first problem of each group, and the number of problems at the end.
std::vector<size_t> group_boundaries(const std::vector<Problem>& problems, int64_t tile_rows, int64_t bytes_per_row);

/// What a forward and a backward share.
struct RelationCall {
  /// @param grad_kl upstream gradient in the backward, null in the forward
  RelationCall(const RelationArguments& arguments, const at::Tensor* grad_kl);

  const RelationArguments& arguments;
  LogitForm form;
  std::vector<RowSet> sets;
  std::vector<Problem> problems;
  int64_t tile_rows = 0;
  std::vector<size_t> groups;
  std::vector<int64_t> causal_visibility;  ///< 1, 2, ...: keys that the rows of a diagonal tile see

  at::Tensor head_of(const at::Tensor& tensor, const Problem& problem) const {
    return tensor.select(0, problem.rows->batch).select(0, problem.head);
  }
};

/// Whether the packed rows of student or teacher are a copy, and not the input itself.
bool packs_copy(const at::Tensor& tensor, double multiplier, const RelationCall& call);

/// Packed rows, statistics, row vectors and gradient accumulators: bytes for each row of a group, at most.
int64_t workspace_bytes_per_row(const RelationCall& call, bool backward);

/// The packed heads of one group.
std::vector<Operand> pack_group(const RelationCall& call, size_t begin, size_t end);

/// Statistics pass over the tiles of a group, finished: [problem][row].
template <typename Real>
std::vector<std::vector<RowResult>> group_statistics(const RelationCall& call,
                                                     const std::vector<Operand>& operands,
                                                     const TileBuffers& buffers);

/// Sum of an expectation over every row of a group, into `sum` of the row vectors (which hold the log-sum-exps).
template <typename Real>
void group_expectation(const RelationCall& call,
                       Expectation expectation,
                       const std::vector<Operand>& operands,
                       const TileBuffers& buffers,
                       std::vector<RowVectors<Real>>& vectors);

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_forward(const RelationArguments& arguments);

at::Tensor relation_backward(const at::Tensor& grad_kl,
                             const at::Tensor& lse_student,
                             const at::Tensor& lse_teacher,
                             const RelationArguments& arguments);

/// relation_lse of arguments.teacher with arguments.scale_teacher.
at::Tensor relation_lse(const RelationArguments& arguments);

ExecutionPlan relation_plan(const RelationArguments& arguments);

}  // namespace linearard::cpu
