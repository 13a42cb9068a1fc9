#include <algorithm>

#include <ATen/Parallel.h>
#include <c10/core/TensorImpl.h>

#include "cpu/refine.h"
#include "cpu/relation.h"
#include "cpu/schedule.h"
#include "kernel_scope.h"

namespace linearard::cpu {
namespace {

/// What the packing of rows and the writing of results take for a while, for each row of the heads at work.
int64_t transient_bytes_per_row(const RelationCall& call, bool backward) {
  const RelationArguments& arguments = call.arguments;
  const auto element = static_cast<int64_t>(c10::elementSize(call.form.compute));
  const int64_t student = arguments.student.size(-1);
  const int64_t teacher = arguments.teacher.size(-1);
  int64_t bytes = 2 * static_cast<int64_t>(sizeof(double));  // values of one field, in double and as stored
  const bool copies = packs_copy(arguments.student, call.form.student_multiplier, call) ||
                      packs_copy(arguments.teacher, call.form.teacher_multiplier, call);
  // The rows between the holes before they are cast, or the cast ones before the multiplier.
  if (copies) bytes = std::max(bytes, 8 * std::max(student, teacher));
  // The gradient cut to the range of another dtype, and in it.
  const bool casts = arguments.student.scalar_type() != call.form.compute || call.form.compute == at::kDouble;
  if (backward && casts) bytes = std::max(bytes, 2 * element * student);
  return bytes;
}

/// The views that tiles multiply, of one row block: all operands, and the gradient.
int64_t block_bytes() {
  constexpr int64_t kMatrices = 6;
  constexpr int64_t kPointers = 8;  // to each view: of vectors that grow and are moved, and malloc's own
  return kMatrices * 2 * static_cast<int64_t>(sizeof(c10::TensorImpl) + kPointers * sizeof(void*));
}

/// Lists of sequences, of heads and of the tokens that are no padding.
int64_t list_bytes(const RelationCall& call) {
  constexpr int64_t kGrowth = 2;  // of a vector
  int64_t bytes = kGrowth * static_cast<int64_t>(call.sets.size() * sizeof(RowSet) +
                                                 call.problems.size() * (sizeof(Problem) + sizeof(size_t)));
  if (call.arguments.key_padding_mask) {
    const int64_t tokens = call.arguments.key_padding_mask->numel();
    const int64_t heads = call.arguments.student.size(1);
    constexpr int64_t kPositions = 28;   // of a token: lists that grow, indices, masks
    constexpr int64_t kMagnitudes = 24;  // of a token and head
    bytes += tokens * (kPositions + heads * kMagnitudes);
  }
  return bytes;
}

/// Upper bound on what a call allocates beyond inputs and outputs: tile buffers, lists, and the largest group.
int64_t workspace_bytes(const RelationCall& call, bool backward) {
  constexpr int64_t kProblem = 2048;  // the objects that hold a head's matrices and vectors
  const RelationArguments& arguments = call.arguments;
  const int64_t row_bytes = workspace_bytes_per_row(call, backward);
  const int64_t dimension = std::max(arguments.student.size(-1), arguments.teacher.size(-1));
  int64_t largest_group = 0;
  const std::vector<size_t> groups = group_boundaries(call.problems, call.tile_rows, row_bytes);
  for (size_t group = 0; group + 1 < groups.size(); ++group) {
    int64_t rows = 0;
    int64_t blocks = 0;
    int64_t longest = 0;
    for (size_t p = groups[group]; p < groups[group + 1]; ++p) {
      const int64_t length = call.problems[p].rows->length;
      rows += length;
      blocks += block_count(length, call.tile_rows);
      longest = std::max(longest, length);
    }
    const int64_t heads_at_once = at::get_num_threads();  // that are packed
    int64_t bytes = std::min(rows, heads_at_once * longest) * transient_bytes_per_row(call, backward) +
                    heads_at_once * scaled_difference_bytes(longest * dimension, call.form);
    if (!backward || call.form.wide) bytes = std::max(bytes, refine_bytes(call.form, longest, longest, dimension));
    bytes += rows * row_bytes + blocks * block_bytes();
    bytes += 2 * blocks * static_cast<int64_t>(sizeof(TileTask));
    bytes += static_cast<int64_t>(groups[group + 1] - groups[group]) * kProblem;
    largest_group = std::max(largest_group, bytes);
  }
  // A copy of a batch entry, to find the largest of its numbers that is finite.
  const int64_t entry = call.form.finite ? 0 : 8 * arguments.student.size(1) * arguments.student.size(2) * dimension;
  return TileBuffers::bytes(call.tile_rows, call.form.compute) + list_bytes(call) + std::max(entry, largest_group);
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
