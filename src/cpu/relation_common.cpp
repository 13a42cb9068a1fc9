#include <algorithm>
#include <numeric>

#include <ATen/Parallel.h>

#include "cpu/refine.h"
#include "cpu/relation.h"
#include "cpu/schedule.h"

namespace linearard::cpu {

int64_t tile_rows_for(int64_t longest, int64_t head_dimension) {
  const int64_t largest = head_dimension > 128 || longest < 1024 ? 128 : 256;
  const int64_t padded = (longest + kVectorPadding - 1) / kVectorPadding * kVectorPadding;
  return std::clamp<int64_t>(padded, kVectorPadding, largest);
}

std::vector<size_t> group_boundaries(const std::vector<Problem>& problems, int64_t tile_rows, int64_t bytes_per_row) {
  constexpr int64_t kWorkspaceTarget = int64_t{8} << 20;
  const int64_t tasks_wanted = 4 * static_cast<int64_t>(at::get_num_threads());
  std::vector<size_t> boundaries{0};
  int64_t bytes = 0;
  int64_t tasks = 0;
  for (size_t i = 0; i < problems.size(); ++i) {
    const int64_t problem_bytes = problems[i].rows->length * bytes_per_row;
    if (tasks >= tasks_wanted && bytes + problem_bytes > kWorkspaceTarget) {
      boundaries.push_back(i);
      bytes = tasks = 0;
    }
    bytes += problem_bytes;
    tasks += std::max<int64_t>(1, block_count(problems[i].rows->length, tile_rows) / 2);
  }
  boundaries.push_back(problems.size());
  return boundaries;
}

bool packs_copy(const at::Tensor& tensor, double multiplier, const RelationCall& call) {
  const bool holes = call.arguments.key_padding_mask.has_value();
  const bool is_matrix = tensor.stride(2) >= tensor.size(3);
  return holes || multiplier != 1 || tensor.scalar_type() != call.form.compute || !is_matrix;
}

int64_t workspace_bytes_per_row(const RelationCall& call, bool backward) {
  const LogitForm& form = call.form;
  const int64_t element = static_cast<int64_t>(c10::elementSize(form.compute));
  const int64_t student = call.arguments.student.size(-1);
  const int64_t teacher = call.arguments.teacher.size(-1);
  int64_t bytes = 0;
  if (packs_copy(call.arguments.student, form.student_multiplier, call)) bytes += element * student;
  if (packs_copy(call.arguments.teacher, form.teacher_multiplier, call)) bytes += element * teacher;
  if (!form.finite) bytes += element * std::max(student, teacher);  // of either: reverse KL exchanges them
  if (form.difference) bytes += element * student;
  if (form.difference && form.student_ratio != 1) bytes += element * student;
  const auto statistics = static_cast<int64_t>(sizeof(RowStatistics));
  const auto result = static_cast<int64_t>(sizeof(RowResult));
  const int64_t vectors = 6 * element;  // RowVectors
  if (!backward) return bytes + result + std::max(statistics, vectors);
  // The statistics are made again where the saved ones could not hold them, and are gone before the gradient comes.
  return bytes + vectors + std::max(element * student, form.wide ? statistics + result : 0);
}

RelationCall::RelationCall(const RelationArguments& relation_arguments, const at::Tensor* grad_kl)
    : arguments(relation_arguments),
      form(choose_logit_form(arguments, grad_kl)),
      sets(row_sets(
          arguments.student.size(0), arguments.student.size(2), arguments.key_padding_mask, arguments.cu_seqlens)) {
  int64_t longest = 0;
  for (const RowSet& rows : sets) {
    longest = std::max(longest, rows.length);
    if (rows.length == 0) continue;
    for (int64_t head = 0; head < arguments.student.size(1); ++head)
      problems.push_back({head, &rows});
  }
  tile_rows = tile_rows_for(longest, std::max(arguments.student.size(-1), arguments.teacher.size(-1)));
  groups = group_boundaries(problems, tile_rows, workspace_bytes_per_row(*this, grad_kl != nullptr));
  if (arguments.causal) {
    causal_visibility.resize(static_cast<size_t>(tile_rows));
    std::iota(causal_visibility.begin(), causal_visibility.end(), 1);
  }
}

std::vector<Operand> pack_group(const RelationCall& call, size_t begin, size_t end) {
  std::vector<std::optional<Operand>> packed(end - begin);
  at::parallel_for(0, static_cast<int64_t>(packed.size()), 1, [&](int64_t first, int64_t last) {
    const KernelScope scope;
    for (int64_t i = first; i < last; ++i) {
      const Problem& problem = call.problems[begin + static_cast<size_t>(i)];
      packed[static_cast<size_t>(i)].emplace(call.head_of(call.arguments.student, problem),
                                             call.head_of(call.arguments.teacher, problem), *problem.rows, call.form,
                                             call.tile_rows);
    }
  });
  std::vector<Operand> operands;
  operands.reserve(packed.size());
  for (auto& operand : packed) {
    if (operand) operands.push_back(std::move(*operand));
  }
  return operands;
}

namespace {

std::vector<int64_t> block_counts(const std::vector<Operand>& operands, int64_t tile_rows) {
  std::vector<int64_t> counts;
  counts.reserve(operands.size());
  for (const Operand& operand : operands)
    counts.push_back(block_count(operand.length, tile_rows));
  return counts;
}

}  // namespace

template <typename Real>
std::vector<std::vector<RowResult>> group_statistics(const RelationCall& call,
                                                     const std::vector<Operand>& operands,
                                                     const TileBuffers& buffers) {
  std::vector<std::vector<RowStatistics>> statistics;
  statistics.reserve(operands.size());
  for (const Operand& operand : operands)
    statistics.push_back(empty_statistics(operand.length));
  const TileKernels<Real>& kernels = tile_kernels<Real>();
  run_symmetric(block_counts(operands, call.tile_rows), [&](const TileTask& task) {
    const Operand& operand = operands[task.problem];
    LogitTile<Real> logits(call.form, operand, task.row_block, operand, task.column_block, buffers.of_this_thread());
    const bool diagonal = task.row_block == task.column_block;
    if (diagonal && call.arguments.causal) logits.tile.visible = call.causal_visibility.data();
    std::vector<RowStatistics>& rows = statistics[task.problem];
    kernels.accumulate_rows(logits.tile, &rows[task.row_block * call.tile_rows]);
    if (!diagonal && !call.arguments.causal) {
      kernels.accumulate_columns(logits.tile, &rows[task.column_block * call.tile_rows]);
    }
  });
  std::vector<std::vector<RowResult>> results;
  for (size_t i = 0; i < operands.size(); ++i) {
    std::vector<RowResult>& finished = results.emplace_back();
    finished.reserve(statistics[i].size());
    for (const RowStatistics& row : statistics[i])
      finished.push_back(finish_row(row, kUnitRoundoff<Real>));
    const bool causal = call.arguments.causal;
    const int64_t length = operands[i].length;
    refine_rows(call.form, operands[i], operands[i], [&](int64_t row) { return causal ? row + 1 : length; }, finished);
  }
  return results;
}

template <typename Real>
void group_expectation(const RelationCall& call,
                       Expectation expectation,
                       const std::vector<Operand>& operands,
                       const TileBuffers& buffers,
                       std::vector<RowVectors<Real>>& vectors) {
  const TileKernels<Real>& kernels = tile_kernels<Real>();
  const Real beta = static_cast<Real>(call.arguments.beta);
  run_symmetric(block_counts(operands, call.tile_rows), [&](const TileTask& task) {
    const Operand& operand = operands[task.problem];
    LogitTile<Real> logits(call.form, operand, task.row_block, operand, task.column_block, buffers.of_this_thread());
    const bool diagonal = task.row_block == task.column_block;
    if (diagonal && call.arguments.causal) logits.tile.visible = call.causal_visibility.data();
    const bool columns = !diagonal && !call.arguments.causal;
    RowVectors<Real>& rows = vectors[task.problem];
    kernels.accumulate_expectation(expectation, columns ? TileKind::kRowsColumns : TileKind::kRows, beta, logits.tile,
                                   rows.reference(task.row_block * call.tile_rows, false),
                                   rows.reference(task.column_block * call.tile_rows, false));
  });
}

#define LINEARARD_INSTANTIATE(Real)                                                                    \
  template std::vector<std::vector<RowResult>> group_statistics<Real>(                                 \
      const RelationCall&, const std::vector<Operand>&, const TileBuffers&);                           \
  template void group_expectation<Real>(const RelationCall&, Expectation, const std::vector<Operand>&, \
                                        const TileBuffers&, std::vector<RowVectors<Real>>&);
LINEARARD_INSTANTIATE(float)
LINEARARD_INSTANTIATE(double)
#undef LINEARARD_INSTANTIATE

}  // namespace linearard::cpu
