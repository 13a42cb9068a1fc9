#include <cmath>
#include <utility>

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "cpu/relation.h"
#include "cpu/schedule.h"

namespace linearard::cpu {
namespace {

/// The Jensen-Shannon divergence needs both log-sum-exps before its value: a second pass over the tiles.
template <typename Real>
void replace_by_jsd(const RelationCall& call,
                    const std::vector<Operand>& operands,
                    const TileBuffers& buffers,
                    std::vector<std::vector<RowResult>>& results) {
  std::vector<RowVectors<Real>> vectors = vectors_of<Real>(results);
  group_expectation<Real>(call, Expectation::kJsdValue, operands, buffers, vectors);
  for (size_t p = 0; p < results.size(); ++p) {
    for (size_t i = 0; i < results[p].size(); ++i) {
      results[p][i].kl = bounded_jsd(static_cast<double>(vectors[p].sum[i]), call.arguments.beta);
    }
  }
}

template <typename Real>
void forward_groups(const RelationCall& call,
                    const at::Tensor& kl,
                    const at::Tensor& lse_student,
                    const at::Tensor& lse_teacher) {
  const TileBuffers buffers(call.tile_rows, call.form.compute);
  for (size_t group = 0; group + 1 < call.groups.size(); ++group) {
    const size_t begin = call.groups[group];
    const std::vector<Operand> operands = pack_group(call, begin, call.groups[group + 1]);
    std::vector<std::vector<RowResult>> results = group_statistics<Real>(call, operands, buffers);
    if (call.arguments.divergence == Divergence::kJSD) replace_by_jsd<Real>(call, operands, buffers, results);
    for (size_t i = 0; i < results.size(); ++i) {
      const Problem& problem = call.problems[begin + i];
      write_rows(call.head_of(kl, problem), *problem.rows, results[i], &RowResult::kl);
      write_rows(call.head_of(lse_student, problem), *problem.rows, results[i], &RowResult::lse_student);
      write_rows(call.head_of(lse_teacher, problem), *problem.rows, results[i], &RowResult::lse_teacher);
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_forward(const RelationArguments& arguments) {
  const KernelScope scope;
  RelationArguments roles = arguments;
  // KL(Q || P) is KL(P || Q) with the roles exchanged.
  const bool exchanged = arguments.divergence == Divergence::kReverseKL;
  if (exchanged) {
    std::swap(roles.student, roles.teacher);
    std::swap(roles.scale_student, roles.scale_teacher);
  }
  const auto options = arguments.student.options().dtype(statistics_dtype(arguments));
  const auto shape = arguments.student.sizes().slice(0, 3);
  at::Tensor kl = at::zeros(shape, options);
  at::Tensor lse_student = at::zeros(shape, options);
  at::Tensor lse_teacher = at::zeros(shape, options);
  const RelationCall call(roles, nullptr);
  if (call.form.compute == at::kFloat) {
    forward_groups<float>(call, kl, lse_student, lse_teacher);
  } else {
    forward_groups<double>(call, kl, lse_student, lse_teacher);
  }
  if (exchanged) std::swap(lse_student, lse_teacher);
  return {kl, lse_student, lse_teacher};
}

namespace {

template <typename Real>
void lse_of_group(const RelationCall& call,
                  const std::vector<BlockedMatrix>& matrices,
                  const TileBuffers& buffers,
                  std::vector<std::vector<RowStatistics>>& statistics) {
  const TileKernels<Real>& kernels = tile_kernels<Real>();
  std::vector<int64_t> blocks;
  blocks.reserve(matrices.size());
  for (const BlockedMatrix& matrix : matrices)
    blocks.push_back(static_cast<int64_t>(matrix.blocks.size()));
  run_symmetric(blocks, [&](const TileTask& task) {
    const BlockedMatrix& matrix = matrices[task.problem];
    const at::Tensor memory = buffers.of_this_thread().select(0, 0);
    const at::Tensor& rows = matrix.blocks[task.row_block];
    const at::Tensor& columns = matrix.transposed[task.column_block];
    at::Tensor product = memory.narrow(0, 0, rows.size(0)).narrow(1, 0, columns.size(1));
    at::mm_out(product, rows, columns);
    const bool diagonal = task.row_block == task.column_block;
    Real* data = product.mutable_data_ptr<Real>();
    const Tile<Real> tile{data,
                          data,
                          rows.size(0),
                          columns.size(1),
                          memory.stride(0),
                          diagonal && call.arguments.causal ? call.causal_visibility.data() : nullptr};
    kernels.scale_one(tile, static_cast<Real>(call.form.scale_teacher));
    std::vector<RowStatistics>& sums = statistics[task.problem];
    RowStatistics* mirrored = diagonal || call.arguments.causal ? nullptr : &sums[task.column_block * call.tile_rows];
    kernels.accumulate_lse(tile, &sums[task.row_block * call.tile_rows], mirrored);
  });
}

template <typename Real>
void lse_groups(const RelationCall& call, const at::Tensor& lse) {
  const TileBuffers buffers(call.tile_rows, call.form.compute);
  for (size_t group = 0; group + 1 < call.groups.size(); ++group) {
    std::vector<BlockedMatrix> matrices;
    std::vector<std::vector<RowStatistics>> statistics;
    for (size_t p = call.groups[group]; p < call.groups[group + 1]; ++p) {
      const Problem& problem = call.problems[p];
      matrices.emplace_back(pack_rows(call.head_of(call.arguments.teacher, problem), *problem.rows, call.form.compute,
                                      call.form.teacher_multiplier),
                            call.tile_rows);
      statistics.push_back(empty_statistics(problem.rows->length));
    }
    lse_of_group<Real>(call, matrices, buffers, statistics);
    for (size_t i = 0; i < matrices.size(); ++i) {
      std::vector<RowResult> results;
      for (const RowStatistics& row : statistics[i]) {
        results.push_back({0, row.max_teacher + std::log(row.sum_teacher), 0, 0, false});
      }
      const Problem& problem = call.problems[call.groups[group] + i];
      write_rows(call.head_of(lse, problem), *problem.rows, results, &RowResult::lse_teacher);
    }
  }
}

}  // namespace

at::Tensor relation_lse(const RelationArguments& arguments) {
  const KernelScope scope;
  at::Tensor lse =
      at::zeros(arguments.teacher.sizes().slice(0, 3), arguments.teacher.options().dtype(statistics_dtype(arguments)));
  const RelationCall call(arguments, nullptr);
  if (call.form.compute == at::kFloat) {
    lse_groups<float>(call, lse);
  } else {
    lse_groups<double>(call, lse);
  }
  return lse;
}

}  // namespace linearard::cpu
