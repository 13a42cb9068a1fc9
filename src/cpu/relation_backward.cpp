#include <algorithm>
#include <cmath>

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include "cpu/relation.h"
#include "cpu/schedule.h"
#include "saturation.h"

namespace linearard::cpu {
namespace {

/// The row vectors of a group: saved statistics, upstream gradient and, where the gradient contains them, means.
template <typename Real>
std::vector<RowVectors<Real>> load_vectors(const RelationCall& call,
                                           const at::Tensor& grad_kl,
                                           const at::Tensor& lse_student,
                                           const at::Tensor& lse_teacher,
                                           const std::vector<Operand>& operands,
                                           size_t first_problem,
                                           const TileBuffers& buffers) {
  std::vector<RowVectors<Real>> vectors;
  if (call.form.wide) {
    // Logits beyond float's range have log-sum-exps that the saved float tensors cannot hold.
    vectors = vectors_of<Real>(group_statistics<Real>(call, operands, buffers));
  }
  for (size_t i = 0; i < operands.size(); ++i) {
    const Problem& problem = call.problems[first_problem + i];
    if (!call.form.wide) {
      RowVectors<Real>& rows = vectors.emplace_back(problem.rows->length);
      load_rows(call.head_of(lse_teacher, problem), *problem.rows, rows.lse_teacher);
      load_rows(call.head_of(lse_student, problem), *problem.rows, rows.lse_difference);
      for (size_t row = 0; row < rows.lse_difference.size(); ++row)
        rows.lse_difference[row] -= rows.lse_teacher[row];
    }
    load_rows(call.head_of(grad_kl, problem), *problem.rows, vectors[i].weight);
    vectors[i].scale_weight(call.form.gradient_multiplier);
  }
  if (call.arguments.divergence == Divergence::kForwardKL) return vectors;
  group_expectation<Real>(call, mean_kind(call.arguments.divergence), operands, buffers, vectors);
  for (RowVectors<Real>& rows : vectors)
    rows.sums_become_means(call.arguments.divergence, call.arguments.beta);
  return vectors;
}

/// dX = H X over all tiles of a group, without scale and diagonal; vectors[p].sum collects the row sums of G.
template <typename Real>
std::vector<BlockedMatrix> accumulate_gradients(const RelationCall& call,
                                                const std::vector<Operand>& operands,
                                                const TileBuffers& buffers,
                                                std::vector<RowVectors<Real>>& vectors) {
  std::vector<BlockedMatrix> gradients;
  std::vector<int64_t> blocks;
  for (const Operand& operand : operands) {
    gradients.emplace_back(at::zeros({operand.length, call.arguments.student.size(-1)}, call.form.compute),
                           call.tile_rows);
    blocks.push_back(static_cast<int64_t>(operand.student.blocks.size()));
  }
  const TileKernels<Real>& kernels = tile_kernels<Real>();
  const Gradient gradient = gradient_kind(call.arguments.divergence);
  const bool causal = call.arguments.causal;
  run_symmetric(blocks, [&](const TileTask& task) {
    const Operand& operand = operands[task.problem];
    LogitTile<Real> logits(call.form, operand, task.row_block, operand, task.column_block, buffers.of_this_thread());
    const bool diagonal = task.row_block == task.column_block;
    const TileKind kind = diagonal ? (causal ? TileKind::kDiagonalCausal : TileKind::kDiagonal)
                                   : (causal ? TileKind::kRows : TileKind::kRowsColumns);
    RowVectors<Real>& rows = vectors[task.problem];
    kernels.gradient(gradient, kind, static_cast<Real>(call.arguments.beta), logits.tile,
                     rows.reference(task.row_block * call.tile_rows, true),
                     rows.reference(task.column_block * call.tile_rows, true));
    gradients[task.problem].blocks[task.row_block].addmm_(logits.teacher, operand.gradient.blocks[task.column_block]);
    if (!diagonal) {
      gradients[task.problem].blocks[task.column_block].addmm_(logits.teacher.t(),
                                                               operand.gradient.blocks[task.row_block]);
    }
  });
  return gradients;
}

/// The diagonal: a row of G sums to zero, so G_ii is minus the sum of the others, exact where Q_ii - P_ii is not.
template <typename Real>
void add_diagonal(const at::Tensor& gradient, const at::Tensor& student, RowVectors<Real>& rows) {
  const at::Tensor sums = at::from_blob(rows.sum.data(), {gradient.size(0), 1}, gradient.options());
  gradient.addcmul_(student, sums, -2);
}

template <typename Real>
void backward_groups(const RelationCall& call,
                     const at::Tensor& grad_kl,
                     const at::Tensor& lse_student,
                     const at::Tensor& lse_teacher,
                     const at::Tensor& grad_student) {
  const TileBuffers buffers(call.tile_rows, call.form.compute);
  const double scale = call.form.gradient_scale(call.arguments.scale_student);
  for (size_t group = 0; group + 1 < call.groups.size(); ++group) {
    const size_t begin = call.groups[group];
    const std::vector<Operand> operands = pack_group(call, begin, call.groups[group + 1]);
    auto vectors = load_vectors<Real>(call, grad_kl, lse_student, lse_teacher, operands, begin, buffers);
    const auto gradients = accumulate_gradients<Real>(call, operands, buffers, vectors);
    for (size_t i = 0; i < gradients.size(); ++i) {
      const at::Tensor& gradient = gradients[i].whole;
      add_diagonal<Real>(gradient, operands[i].student.whole, vectors[i]);
      gradient.mul_(scale).div_(call.form.gradient_multiplier);
      const Problem& problem = call.problems[begin + i];
      put_rows(call.head_of(grad_student, problem), *problem.rows,
               saturating_cast(gradient, grad_student.scalar_type()));
    }
  }
}

}  // namespace

at::Tensor relation_backward(const at::Tensor& grad_kl,
                             const at::Tensor& lse_student,
                             const at::Tensor& lse_teacher,
                             const RelationArguments& arguments) {
  const KernelScope scope;
  at::Tensor grad_student = at::zeros(arguments.student.sizes(), arguments.student.options());
  const RelationCall call(arguments, &grad_kl);
  if (call.form.compute == at::kFloat) {
    backward_groups<float>(call, grad_kl, lse_student, lse_teacher, grad_student);
  } else {
    backward_groups<double>(call, grad_kl, lse_student, lse_teacher, grad_student);
  }
  return grad_student;
}

}  // namespace linearard::cpu
