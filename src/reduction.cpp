#include "reduction.h"

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "operators.h"
#include "saturation.h"

namespace linearard {

at::Tensor reduce_rows(const at::Tensor& kl,
                       const std::optional<at::Tensor>& row_mask,
                       const std::optional<at::Tensor>& row_weight,
                       Reduction reduction,
                       const std::optional<at::Tensor>& num_items) {
  std::optional<at::Tensor> weight;
  if (row_weight) {
    weight = row_weight->to(kl.scalar_type());
    // Padding has no weight, whatever stands there.
    if (row_mask) weight = weight->masked_fill(row_mask->logical_not(), 0);
  }
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

namespace {

/// For any device; CUDA has a kernel.
at::Tensor mean_of_rows(const at::Tensor& kl) { return saturating_cast(kl.mean(at::kDouble), kl.scalar_type()); }

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CompositeExplicitAutograd, m) { m.impl("mean_of_rows", &linearard::mean_of_rows); }
