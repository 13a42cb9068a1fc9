#include "reduction.h"

#include <ATen/TensorOperators.h>

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
  const at::Tensor weighted = weight ? kl * weight->unsqueeze(1) : kl;
  if (reduction == Reduction::kNone) return weighted;
  // An empty batch has no tokens to average over: 0, and gradient 0.
  if (reduction == Reduction::kSum || kl.sym_numel() == 0) return weighted.sum();
  if (!num_items && !weight && !row_mask) return weighted.mean();

  const at::Tensor count = num_items ? num_items->reshape({}) : weight ? weight->sum() : row_mask->sum();
  const at::Tensor sum = weighted.mean(1).sum();  // mean over heads
  const at::Tensor divisor = count.to(sum.device(), sum.scalar_type());
  return sum / divisor.masked_fill(divisor.eq(0), 1);
}

}  // namespace linearard
