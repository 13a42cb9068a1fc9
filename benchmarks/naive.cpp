#include "naive.h"

#include <cmath>
#include <limits>

#include <ATen/ATen.h>

namespace linearard::benchmarks {
namespace {

at::Tensor log_relation(const at::Tensor& x, bool causal) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(x.size(3)));
  at::Tensor logits = at::matmul(x * scale, x.transpose(-1, -2));
  if (causal) {
    const at::Tensor hidden = at::ones({x.size(2), x.size(2)}, x.options().dtype(at::kBool)).triu(1);
    logits = logits.masked_fill(hidden, -std::numeric_limits<float>::infinity());
  }
  return logits.log_softmax(-1);
}

}  // namespace

at::Tensor naive_relation_kl(const at::Tensor& student, const at::Tensor& teacher, bool causal) {
  const at::Tensor log_p = log_relation(teacher.detach(), causal);
  const at::Tensor log_q = log_relation(student, causal);
  const double rows = static_cast<double>(student.numel() / student.size(3));
  return at::kl_div(log_q, log_p, at::Reduction::Sum, /*log_target=*/true) / rows;
}

double naive_peak_bytes(const at::Tensor& student) {
  constexpr double kMatrices = 6.0;
  const double rows = static_cast<double>(student.numel() / student.size(3));
  return kMatrices * rows * static_cast<double>(student.size(2)) * static_cast<double>(student.element_size());
}

}  // namespace linearard::benchmarks
