#include <algorithm>

#include <ATen/Parallel.h>

#include "cpu/relation.h"
#include "cpu/schedule.h"
#include "kernel_scope.h"

namespace linearard::cpu {
namespace {

/// Upper bound on what a call allocates beyond inputs and outputs: tile buffers and the largest group.
int64_t workspace_bytes(const RelationCall& call, bool backward) {
  const int64_t row_bytes = workspace_bytes_per_row(call.form, call.arguments, backward);
  int64_t largest_group = 0;
  const std::vector<size_t> groups = group_boundaries(call.problems, call.tile_rows, row_bytes);
  for (size_t group = 0; group + 1 < groups.size(); ++group) {
    int64_t rows = 0;
    for (size_t p = groups[group]; p < groups[group + 1]; ++p)
      rows += call.problems[p].rows->length;
    largest_group = std::max(largest_group, rows * row_bytes);
  }
  return TileBuffers::bytes(call.tile_rows, call.form.compute) + largest_group;
}

}  // namespace

ExecutionPlan relation_plan(const RelationArguments& arguments) {
  const KernelScope scope;
  const RelationCall call(arguments, nullptr);
  ExecutionPlan plan;
  plan.backend = "cpu";
  plan.instruction_set = instruction_set();
  plan.traversal = "triangular";
  plan.compute_dtype = call.form.compute == at::kFloat ? "float32" : "float64";
  plan.tile_rows = plan.tile_columns = call.tile_rows;
  for (const Problem& problem : call.problems) {
    const int64_t blocks = block_count(problem.rows->length, call.tile_rows);
    plan.tile_count += blocks * (blocks + 1) / 2;
  }
  plan.threads = at::get_num_threads();
  plan.workspace_bytes_forward = workspace_bytes(call, false);
  plan.workspace_bytes_backward = workspace_bytes(call, true);
  plan.deterministic = true;
  return plan;
}

}  // namespace linearard::cpu
