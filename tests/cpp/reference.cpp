#include "reference.h"

#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

namespace linearard::testing {
namespace {

double default_scale(const std::optional<double>& scale, const at::Tensor& x) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(x.size(3)));
}

at::Tensor logits(const at::Tensor& query, const at::Tensor& key, double scale) {
  const at::Tensor keys = key.repeat_interleave(query.size(1) / key.size(1), 1);
  return scale * at::matmul(query.to(at::kDouble), keys.to(at::kDouble).transpose(-1, -2));
}

/// Query i sees keys j <= i + keys - queries.
at::Tensor causal_visibility(int64_t queries, int64_t keys) {
  return at::ones({1, 1, queries, keys}, at::kBool).tril(keys - queries);
}

/// The same inside every packed sequence.
at::Tensor packed_visibility(int64_t queries, int64_t keys, const AttentionOptions& options) {
  const at::Tensor visible = at::zeros({1, 1, queries, keys}, at::kBool);
  const at::Tensor& rows = *options.cu_seqlens();
  const at::Tensor& columns = options.cu_seqlens_key().value_or(rows);
  for (int64_t s = 0; s + 1 < rows.size(0); ++s) {
    const auto [row, row_end] = std::pair(rows[s].item<int64_t>(), rows[s + 1].item<int64_t>());
    const auto [column, column_end] = std::pair(columns[s].item<int64_t>(), columns[s + 1].item<int64_t>());
    const at::Tensor seen = causal_visibility(row_end - row, column_end - column);
    visible.slice(2, row, row_end).slice(3, column, column_end).copy_(options.causal() ? seen : at::ones_like(seen));
  }
  return visible;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> reference_rows(const at::Tensor& student_logits,
                                                              const at::Tensor& teacher_logits,
                                                              const at::Tensor& visible,
                                                              Divergence divergence,
                                                              double beta) {
  constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
  const at::Tensor sees_a_key = visible.any(-1);
  const at::Tensor hidden = (visible | sees_a_key.logical_not().unsqueeze(-1)).logical_not();
  const at::Tensor s = student_logits.masked_fill(hidden, kMinusInfinity);
  const at::Tensor t = teacher_logits.masked_fill(hidden, kMinusInfinity);
  const at::Tensor log_q = s.log_softmax(-1).masked_fill(hidden, 0.0);
  const at::Tensor log_p = t.log_softmax(-1).masked_fill(hidden, 0.0);
  const at::Tensor p = log_p.exp().masked_fill(hidden, 0.0);
  const at::Tensor q = log_q.exp().masked_fill(hidden, 0.0);
  at::Tensor rows;
  switch (divergence) {
    case Divergence::kForwardKL:
      rows = (p * (log_p - log_q)).sum(-1);
      break;
    case Divergence::kReverseKL:
      rows = (q * (log_q - log_p)).sum(-1);
      break;
    case Divergence::kJSD: {
      const at::Tensor log_m = at::logaddexp(log_p + std::log(beta), log_q + std::log1p(-beta));
      rows = beta * (p * (log_p - log_m)).sum(-1) + (1.0 - beta) * (q * (log_q - log_m)).sum(-1);
      break;
    }
  }
  const at::Tensor zero = at::zeros({}, at::kDouble);
  return {at::where(sees_a_key, rows, zero), at::where(sees_a_key, s.logsumexp(-1), zero),
          at::where(sees_a_key, t.logsumexp(-1), zero)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> reference_relation(const at::Tensor& student,
                                                                  const at::Tensor& teacher,
                                                                  const RelationOptions& options) {
  const int64_t tokens = student.size(2);
  at::Tensor visible =
      options.causal() ? causal_visibility(tokens, tokens) : at::ones({1, 1, tokens, tokens}, at::kBool);
  if (const auto& mask = options.key_padding_mask()) {
    visible = visible & mask->unsqueeze(1).unsqueeze(2) & mask->unsqueeze(1).unsqueeze(3);
  }
  const at::Tensor s = logits(student, student, default_scale(options.scale_student(), student));
  const at::Tensor t = logits(teacher, teacher, default_scale(options.scale_teacher(), teacher));
  return reference_rows(s, t, visible.expand_as(s), options.divergence(), options.beta());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> reference_attention(const at::Tensor& query_student,
                                                                   const at::Tensor& key_student,
                                                                   const at::Tensor& query_teacher,
                                                                   const at::Tensor& key_teacher,
                                                                   const AttentionOptions& options) {
  const int64_t queries = query_student.size(2);
  const int64_t keys = key_student.size(2);
  const at::Tensor visible = options.cu_seqlens() ? packed_visibility(queries, keys, options)
                             : options.causal()   ? causal_visibility(queries, keys)
                                                  : at::ones({1, 1, queries, keys}, at::kBool);
  const at::Tensor s = logits(query_student, key_student, default_scale(options.scale_student(), query_student));
  const at::Tensor t = logits(query_teacher, key_teacher, default_scale(options.scale_teacher(), query_teacher));
  return reference_rows(s, t, visible.expand_as(s), options.divergence(), options.beta());
}

at::Tensor gaussian(int64_t batch, int64_t heads, int64_t tokens, int64_t dimension, uint64_t seed) {
  return at::randn({batch, heads, tokens, dimension}, at::detail::createCPUGenerator(seed), at::kDouble);
}

std::tuple<at::Tensor, at::Tensor> student_and_teacher(
    int64_t batch, int64_t heads, int64_t tokens, int64_t dimension, at::ScalarType dtype) {
  const at::Tensor teacher = gaussian(batch, heads, tokens, dimension, 1);
  const at::Tensor noise = gaussian(batch, heads, tokens, dimension, 2);
  return {(teacher + 0.2 * noise).to(dtype), teacher.to(dtype)};
}

double row_excess(const at::Tensor& value, const at::Tensor& exact) {
  if (value.numel() == 0) return 0.0;
  // A NaN would compare as no excess.
  if (!at::isfinite(value).all().item<bool>()) return std::numeric_limits<double>::infinity();
  const at::Tensor allowed = 1e-4 * exact.abs() + 1e-7;
  return ((value.to(at::kDouble) - exact).abs() - allowed).max().item<double>();
}

double relative_error(const at::Tensor& value, const at::Tensor& exact) {
  if (!at::isfinite(value).all().item<bool>()) return std::numeric_limits<double>::infinity();
  const double size = exact.norm().item<double>();
  const double error = (value.to(at::kDouble) - exact).norm().item<double>();
  return size == 0.0 ? error : error / size;
}

double gradient_promise(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-9;
    case at::kBFloat16:
      return 4e-3;
    case at::kHalf:
      return 1e-3;
    default:
      return 2e-4;
  }
}

}  // namespace linearard::testing
