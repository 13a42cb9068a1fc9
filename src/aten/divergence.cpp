#include "aten/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace linearard::aten {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Rows of a block, so that one matrix of its logits has at most so many elements.
int64_t rows_of_block(const Vectors& rows, const Vectors& keys, int64_t elements) {
  const int64_t elements_per_row = std::max<int64_t>(1, rows.student.size(0) * keys.student.size(1));
  return std::max<int64_t>(1, elements / elements_per_row);
}

/// Logits of a block of rows against all keys, [G, block, keys].
struct Block {
  at::Tensor teacher;    ///< t, -infinity where a key is not visible
  at::Tensor delta;      ///< s - t, 0 where a key is not visible
  at::Tensor invisible;  ///< [block, keys] bool; undefined: all are visible
};

at::Tensor scaled(at::Tensor product, double scale, const LogitForm& form) {
  product.mul_(scale);
  if (form.compute != at::kDouble) return product;
  constexpr double kLogitLimit = 1e150;  // as in the CPU kernels
  return form.finite ? product.clamp_(-kLogitLimit, kLogitLimit) : product;
}

at::Tensor invisible_keys(const Visibility& visibility, int64_t begin, int64_t count, int64_t keys) {
  if (!visibility.visible.defined()) return {};
  const at::Tensor limit = visibility.visible.narrow(0, begin, count).unsqueeze(1);
  return at::arange(keys, limit.options()).unsqueeze(0).ge(limit);
}

at::Tensor teacher_logits(
    const LogitForm& form, const Vectors& rows, const Vectors& keys, int64_t begin, int64_t count) {
  const at::Tensor y = rows.teacher.narrow(1, begin, count);
  return scaled(at::bmm(y, keys.teacher.mT()), form.scale_teacher, form);
}

Block logits_of_block(const LogitForm& form,
                      const Vectors& rows,
                      const Vectors& keys,
                      const Visibility& visibility,
                      int64_t begin,
                      int64_t count) {
  Block block;
  block.teacher = teacher_logits(form, rows, keys, begin, count);
  if (rows.difference.defined() && keys.difference.defined()) {
    const at::Tensor first = at::bmm(rows.difference.narrow(1, begin, count), keys.scaled_student.mT());
    const at::Tensor y = rows.teacher.narrow(1, begin, count);
    block.delta = at::baddbmm(first, y, keys.difference.mT()).mul_(form.scale_teacher);
  } else {
    const at::Tensor x = rows.student.narrow(1, begin, count);
    block.delta = scaled(at::bmm(x, keys.student.mT()), form.scale_student, form).sub_(block.teacher);
  }
  block.invisible = invisible_keys(visibility, begin, count, keys.student.size(1));
  if (block.invisible.defined()) {
    block.teacher.masked_fill_(block.invisible, -kInfinity);
    block.delta.masked_fill_(block.invisible, 0);
  }
  return block;
}

/// The larger of the two probabilities; log_teacher = log P, ratio = log(Q / P).
at::Tensor larger_probability(const at::Tensor& log_teacher, const at::Tensor& ratio) {
  return (log_teacher + ratio.clamp_min(0)).clamp_max_(0).exp_();
}

at::Tensor student_probability(const at::Tensor& log_teacher, const at::Tensor& ratio) {
  return (log_teacher + ratio).clamp_max_(0).exp_();
}

/// docs/mathematics.md, "Precision": the sum of P phi(r), phi(r) = expm1(r) - r, with r shifted by lse_student -
/// lse_teacher, so that a = E_T[expm1(r)] is 0 but for rounding; the direct sum where the logits are too large for
/// that.
at::Tensor kl_of_rows(const at::Tensor& log_teacher, const at::Tensor& ratio) {
  const at::Tensor teacher = log_teacher.exp();
  // Beyond it P phi(r) and P expm1(r) are Q to the last bit.
  const double large_ratio = ratio.scalar_type() == at::kDouble ? 40 : 20;
  const at::Tensor expm1 = at::expm1(ratio.clamp_max(large_ratio));
  // Where the student has mass but the teacher's probability underflows.
  const at::Tensor large = ratio > large_ratio;
  const at::Tensor student = student_probability(log_teacher, ratio);
  const at::Tensor a = at::where(large, student, teacher * expm1).sum(-1);
  const at::Tensor phi = at::where(large, student, teacher * (expm1 - ratio)).sum(-1);
  const at::Tensor direct = (teacher * ratio).sum(-1).neg_().clamp_min_(0);
  return at::where(a.abs() < 1e-2, phi - (a - a.log1p()), direct);
}

/// The mixture's weight of the smaller of the two probabilities.
at::Tensor weight_of_smaller(const at::Tensor& ratio, double beta) {
  return at::full_like(ratio, 1 - beta).masked_fill_(ratio > 0, beta);
}

at::Tensor jsd_of_rows(const at::Tensor& log_teacher, const at::Tensor& ratio, double beta) {
  // Beyond -45 rho e^rho is below rounding; without the bound the two terms that remain would cancel.
  const at::Tensor rho = ratio.abs().neg_().clamp_min_(-45);
  const at::Tensor expm1 = rho.expm1();
  const at::Tensor weight = weight_of_smaller(ratio, beta);
  const at::Tensor v = weight * expm1;
  const at::Tensor first = weight * (rho * expm1 - (expm1 - rho));
  const at::Tensor second = (v + 1) * v.log1p() - v;
  const double entropy = -beta * std::log(beta) - (1 - beta) * std::log1p(-beta);
  return (larger_probability(log_teacher, ratio) * (first - second)).sum(-1).clamp_(0, entropy);
}

/// log(Q / M) of the mixture M = beta P + (1 - beta) Q.
at::Tensor log_student_to_mixture(const at::Tensor& ratio, double beta) {
  const at::Tensor weight = weight_of_smaller(ratio, beta);
  return ratio.clamp_max(0) - (weight * (-ratio.abs()).expm1()).log1p();
}

/// G / g.
at::Tensor logit_gradient(const DivergenceOptions& options, const at::Tensor& log_teacher, const at::Tensor& ratio) {
  if (options.divergence == Divergence::kForwardKL) {
    return larger_probability(log_teacher, ratio) * (-ratio.abs()).expm1() * ratio.sign().neg_();
  }
  const at::Tensor student = student_probability(log_teacher, ratio);
  const bool jsd = options.divergence == Divergence::kJSD;
  const at::Tensor value = jsd ? log_student_to_mixture(ratio, options.beta) : ratio;
  // Invisible keys have Q = 0 and a finite value. The rounding of the log-sum-exps leaves sum_j Q_ij beside 1, which
  // would shift the mean by as much of itself.
  at::Tensor mass = student.sum(-1, true);
  mass.masked_fill_(mass.eq(0), 1);
  const at::Tensor mean = (student * value).sum(-1, true).div_(mass);
  return student * (value - mean) * (jsd ? 1 - options.beta : 1.0);
}

/// Rows that see fewer than `least` keys of a block: without a key there is no distribution (statistics are 0), with
/// one key no divergence (and no gradient).
at::Tensor zero_below(
    int64_t least, const at::Tensor& values, const Visibility& visibility, int64_t begin, int64_t keys) {
  if (!visibility.visible.defined()) return keys < least ? at::zeros_like(values) : values;
  return values.masked_fill(visibility.visible.narrow(0, begin, values.size(1)).lt(least), 0);
}

}  // namespace

Vectors pack_vectors(const at::Tensor& student, const at::Tensor& teacher, const LogitForm& form) {
  Vectors packed{student.to(form.compute), teacher.to(form.compute), {}, {}};
  if (form.student_multiplier != 1) packed.student = packed.student * form.student_multiplier;
  if (form.teacher_multiplier != 1) packed.teacher = packed.teacher * form.teacher_multiplier;
  const ScaledDifference scaled = scaled_difference(packed.student, packed.teacher, form);
  packed.scaled_student = scaled.scaled_student;
  packed.difference = scaled.difference;
  return packed;
}

namespace {

RowValues values_of_block(const DivergenceOptions& options, const Block& block) {
  const bool jsd = options.divergence == Divergence::kJSD;
  const at::Tensor teacher = block.teacher.logsumexp(-1);
  const at::Tensor student = (block.teacher + block.delta).logsumexp(-1);
  const at::Tensor log_teacher = block.teacher - teacher.unsqueeze(-1);
  const at::Tensor ratio = block.delta - (student - teacher).unsqueeze(-1);
  return {jsd ? jsd_of_rows(log_teacher, ratio, options.beta) : kl_of_rows(log_teacher, ratio), student, teacher};
}

/// weight x (gradient on the logits) of a block; `diagonal` is the column of the first row's own key, -1: none.
at::Tensor gradient_of_block(const DivergenceOptions& options,
                             const Block& block,
                             const at::Tensor& lse_teacher,
                             const at::Tensor& lse_difference,
                             const at::Tensor& weight,
                             int64_t diagonal) {
  at::Tensor gradient =
      logit_gradient(options, block.teacher - lse_teacher.unsqueeze(-1), block.delta - lse_difference.unsqueeze(-1));
  if (block.invisible.defined()) gradient.masked_fill_(block.invisible, 0);
  // A row sums to zero. The own key of a relation, and a key that has most of its row, is minus the sum of the others:
  // a difference of the log-sum-exps' roundings would otherwise stand there, and in a saturated row it is larger than
  // the gradient.
  if (diagonal < 0 && options.divergence == Divergence::kForwardKL) {
    const auto [largest, key] = block.teacher.max(-1, true);
    const at::Tensor dominant = largest - lse_teacher.unsqueeze(-1) > -0.6;  // P above 0.55: no other one beside it
    const at::Tensor rest = gradient.sum(-1, true).masked_fill_(dominant.logical_not(), 0);
    gradient.scatter_(-1, key, gradient.gather(-1, key).sub_(rest));
  }
  if (diagonal >= 0) {
    at::Tensor own = gradient.diagonal(diagonal, -2, -1);
    own.zero_();
    own.copy_(gradient.sum(-1).neg_());
  }
  return gradient.mul_(weight.unsqueeze(-1));
}

}  // namespace

RowValues divergence_forward(const LogitForm& form,
                             const DivergenceOptions& options,
                             const Vectors& rows,
                             const Vectors& keys,
                             const Visibility& visibility) {
  std::vector<at::Tensor> kl;
  std::vector<at::Tensor> lse_student;
  std::vector<at::Tensor> lse_teacher;
  const int64_t length = rows.student.size(1);
  const int64_t step = rows_of_block(rows, keys, options.block_elements);
  for (int64_t begin = 0; begin < length; begin += step) {
    const Block block = logits_of_block(form, rows, keys, visibility, begin, std::min(step, length - begin));
    const auto [value, student, teacher] = values_of_block(options, block);
    const int64_t key_count = keys.student.size(1);
    kl.push_back(zero_below(2, value, visibility, begin, key_count));
    lse_student.push_back(zero_below(1, student, visibility, begin, key_count));
    lse_teacher.push_back(zero_below(1, teacher, visibility, begin, key_count));
  }
  return {at::cat(kl, 1), at::cat(lse_student, 1), at::cat(lse_teacher, 1)};
}

Gradients divergence_backward(const LogitForm& form,
                              const DivergenceOptions& options,
                              const Vectors& rows,
                              const Vectors& keys,
                              const Visibility& visibility,
                              const RowValues& statistics,
                              const at::Tensor& weight) {
  Gradients gradients{at::zeros_like(rows.student), at::zeros_like(keys.student)};
  const auto finite = [&](const at::Tensor& x) { return form.finite ? x : at::nan_to_num(x, 0, 0, 0); };
  const at::Tensor key_vectors = finite(keys.student);
  const at::Tensor row_vectors = finite(rows.student);
  const int64_t length = rows.student.size(1);
  const int64_t step = rows_of_block(rows, keys, options.block_elements);
  for (int64_t begin = 0; begin < length; begin += step) {
    const int64_t count = std::min(step, length - begin);
    const Block block = logits_of_block(form, rows, keys, visibility, begin, count);
    const at::Tensor lse_teacher = statistics.lse_teacher.narrow(1, begin, count);
    const at::Tensor lse_difference = statistics.lse_student.narrow(1, begin, count) - lse_teacher;
    const at::Tensor block_weight = zero_below(2, weight.narrow(1, begin, count) * form.gradient_multiplier, visibility,
                                               begin, keys.student.size(1));
    const at::Tensor gradient =
        gradient_of_block(options, block, lse_teacher, lse_difference, block_weight, visibility.relation ? begin : -1);
    gradients.rows.narrow(1, begin, count).baddbmm_(gradient, key_vectors);
    gradients.keys.baddbmm_(gradient.mT(), row_vectors.narrow(1, begin, count));
  }
  return gradients;
}

at::Tensor lse_forward(const LogitForm& form, const Vectors& vectors, const Visibility& visibility) {
  std::vector<at::Tensor> lse;
  const int64_t length = vectors.teacher.size(1);
  const int64_t step = rows_of_block(vectors, vectors, DivergenceOptions{}.block_elements);
  for (int64_t begin = 0; begin < length; begin += step) {
    const int64_t count = std::min(step, length - begin);
    at::Tensor teacher = teacher_logits(form, vectors, vectors, begin, count);
    const at::Tensor invisible = invisible_keys(visibility, begin, count, length);
    if (invisible.defined()) teacher.masked_fill_(invisible, -kInfinity);
    lse.push_back(teacher.logsumexp(-1));
  }
  return at::cat(lse, 1);
}

}  // namespace linearard::aten
