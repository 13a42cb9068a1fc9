#pragma once

#include "../common/half_range.cuh"
#include "../common/rounding.cuh"
#include "../common/visibility.cuh"
#include "pairs.cuh"
#include "rows.h"

namespace linearard::cuda::sm90 {

/// Writes the gradient of the thread's two owners, complete.
/// @param gradient accumulators of all dimensions, @param first_row the first owner
template <typename T, int kDim>
__device__ void write_gradient(const RowsBackwardParams& p, const float* gradient, int problem, int first_row) {
  const int dim = p.own_student.dim;
  const float scale = static_cast<float>(p.output_scale) / half_range_scale(p.largest_grad);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = first_row + 8 * r;
    if (token >= p.owners) continue;
    T* to = static_cast<T*>(p.gradient) + (static_cast<int64_t>(problem) * p.owners + token) * dim;
    bool finite = true;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int d = 8 * n + column_of_thread();
      if (d >= dim) continue;
      const float x = gradient[4 * n + 2 * r] * scale;
      const float y = gradient[4 * n + 2 * r + 1] * scale;
      finite = finite && fmaxf(fabsf(x), fabsf(y)) < Base<float>::kHuge && x == x && y == y;
      const T pair[2] = {saturated_to<T>(x), saturated_to<T>(y)};
      *reinterpret_cast<uint32_t*>(to + d) = *reinterpret_cast<const uint32_t*>(pair);
    }
    if (!finite) mark_redo(p.redo, problem, token, p.owners);
  }
}

}  // namespace linearard::cuda::sm90
