#include "saturation.h"

#include <limits>

#include <ATen/Dispatch.h>

namespace linearard {

double largest_finite(at::ScalarType dtype) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "largest_finite",
                                         [] { return static_cast<double>(std::numeric_limits<scalar_t>::max()); });
}

at::Tensor saturating_cast(const at::Tensor& values, at::ScalarType dtype) {
  if (values.scalar_type() == dtype && dtype != at::kDouble) return values;
  const double limit = largest_finite(dtype);
  return values.clamp(-limit, limit).to(dtype);
}

}  // namespace linearard
