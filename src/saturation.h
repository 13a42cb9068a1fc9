#pragma once

#include <ATen/core/Tensor.h>

namespace linearard {

/// Largest finite value of a dtype: results saturate there, so that finite inputs never give an infinity.
double largest_finite(at::ScalarType dtype);

/// `values` in another dtype, with what that cannot hold cut to its largest finite value; NaN stays.
at::Tensor saturating_cast(const at::Tensor& values, at::ScalarType dtype);

}  // namespace linearard
