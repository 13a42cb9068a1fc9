#include "reduction.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include "operators.h"
#include "saturation.h"

namespace linearard {

namespace {

/// row_weight, 0 for padding whatever stands there; nothing where all rows count alike.
std::optional<at::Tensor> weights_of(const std::optional<at::Tensor>& row_mask,
                                     const std::optional<at::Tensor>& row_weight,
                                     at::ScalarType dtype) {
  if (!row_weight) return std::nullopt;
  const at::Tensor weight = row_weight->to(dtype);
  return row_mask ? weight.masked_fill(row_mask->logical_not(), 0) : weight;
}

}  // namespace

at::Tensor reduce_rows(const at::Tensor& kl,
                       const std::optional<at::Tensor>& row_mask,
                       const std::optional<at::Tensor>& row_weight,
                       Reduction reduction,
                       const std::optional<at::Tensor>& num_items) {
  const std::optional<at::Tensor> weight = weights_of(row_mask, row_weight, kl.scalar_type());
  at::Tensor weighted = weight ? kl * weight->unsqueeze(1) : kl;
  if (reduction == Reduction::kNone) return weighted;
  // In float64: rows saturate at the largest float32, their sum in float32 would not.
  const auto result = [&](const at::Tensor& value) { return saturating_cast(value, kl.scalar_type()); };
  // An empty batch has no tokens to average over: 0, and gradient 0.
  if (reduction == Reduction::kSum || kl.sym_numel() == 0) return result(weighted.sum(at::kDouble));
  if (!num_items && !weight && !row_mask) return call_mean_of_rows(weighted);

  const at::Tensor count = num_items ? num_items->reshape({}) : weight ? weight->sum() : row_mask->sum();
  const at::Tensor sum = weighted.mean(1, false, at::kDouble).sum();  // mean over heads
  const at::Tensor divisor = count.to(sum.device(), sum.scalar_type());
  const at::Tensor empty = divisor.eq(0);
  return result((sum / divisor.masked_fill(empty, 1)).masked_fill(empty, 0));
}

at::Tensor reduce_relations(at::TensorList kl,
                            const std::optional<at::Tensor>& row_mask,
                            const std::optional<at::Tensor>& row_weight,
                            Reduction reduction,
                            const std::optional<at::Tensor>& num_items) {
  const bool any_empty =
      std::any_of(kl.begin(), kl.end(), [](const at::Tensor& rows) { return rows.sym_numel() == 0; });
  const bool plain = reduction == Reduction::kMean && !num_items && !row_weight && !row_mask;
  if (plain && !any_empty) return std::get<0>(call_means_of_rows(kl));
  // All divide by the same number of tokens: it is counted once.
  std::optional<at::Tensor> count = num_items;
  if (reduction == Reduction::kMean && !count && (row_weight || row_mask)) {
    const bool wide = std::any_of(kl.begin(), kl.end(), [](const auto& x) { return x.scalar_type() == at::kDouble; });
    if (const auto weight = weights_of(row_mask, row_weight, wide ? at::kDouble : at::kFloat)) {
      count = weight->sum();
    } else if (row_mask) {
      count = row_mask->sum();
    }
  }
  std::vector<at::Tensor> losses;
  losses.reserve(kl.size());
  for (const at::Tensor& rows : kl)
    losses.push_back(reduce_rows(rows, row_mask, row_weight, reduction, count));
  return at::stack(losses);
}

namespace {

/// For any device; CUDA has a kernel.
at::Tensor mean_of_rows(const at::Tensor& kl) { return saturating_cast(kl.mean(at::kDouble), kl.scalar_type()); }

at::Tensor mean_of_rows_backward(const at::Tensor& grad, c10::SymInt count) {
  return grad.div(at::Scalar(std::move(count)));
}

TwoTensors means_of_rows(at::TensorList kl) {
  std::vector<at::Tensor> means;
  std::vector<double> inverse_counts;
  for (const at::Tensor& rows : kl) {
    means.push_back(mean_of_rows(rows));
    inverse_counts.push_back(1 / static_cast<double>(rows.numel()));
  }
  const at::Tensor mean = at::stack(means);
  return {mean, at::tensor(inverse_counts, mean.options())};
}

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CompositeExplicitAutograd, m) {
  m.impl("mean_of_rows", &linearard::mean_of_rows);
  m.impl("mean_of_rows_backward", &linearard::mean_of_rows_backward);
  m.impl("means_of_rows", &linearard::means_of_rows);
}
