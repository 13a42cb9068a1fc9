#pragma once

#include "../mma/instructions.cuh"
#include "pairs.cuh"
#include "schedule.cuh"

// What the pairs of the row-wise backward weigh in the gradient of their owner. Both sides have one scale, so that
// logits differ as the products of their vectors do.

namespace linearard::cuda::sm90 {

/// H of the pairs of a thread's two owners, for one tile.
class RowTerms {
 public:
  /// @param own value of the thread's first row, the other one is 8 further; @param row the first one's token
  __device__ RowTerms(const LogitFactors& factors, const BackwardToken* own, int row)
      : factors_(factors), row_(row), rows_{own[0], own[8]} {}

  /// A tile of a causal relation comes: a pair is in the row of its later token only. Returns whether that differs
  /// within the tile.
  __device__ bool enter(int first_row, int first_column) {
    if (first_column + kTileTokens > first_row && first_column < first_row + kTileTokens) return true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (first_column < first_row) {
        rows_[r].key = 0;
      } else {
        rows_[r].row = rows_[r].row_ratio = 0;
      }
    }
    return false;
  }

  template <bool kPartial>
  __device__ float operator()(
      float student, float teacher, int r, const BackwardToken& column, int column_token) const {
    const float w = exp2_approximate((student - teacher) * factors_.student);
    const float e = exp2_approximate(fmaf(teacher, factors_.teacher, -column.bias) - rows_[r].bias);
    const float as_row = fmaf(w, rows_[r].row_ratio, -rows_[r].row);
    const float as_key = fmaf(w, column.row_ratio, -column.row);
    if constexpr (kPartial) {
      const int distance = row_ + 8 * r - column_token;
      const float first = distance >= 0 ? as_row * column.key : 0.f;
      return e * (distance <= 0 ? fmaf(as_key, rows_[r].key, first) : first);
    }
    return e * fmaf(as_key, rows_[r].key, as_row * column.key);
  }

 private:
  const LogitFactors& factors_;
  const int row_;
  BackwardToken rows_[2];
};

/// The weights of all pairs, rounded and packed as the operand A of a sum over the columns: 16 of them for each step.
/// @param columns values of the thread's first column; @param first_column its token
template <typename T, bool kPartial, int kElements>
__device__ void weigh_row_pairs(const float (&student)[kElements],
                                const float (&teacher)[kElements],
                                const RowTerms& terms,
                                const BackwardToken* columns,
                                int first_column,
                                uint32_t (&h)[kElements / 8][4]) {
#pragma unroll
  for (int n = 0; n < kElements / 4; ++n) {
    const BackwardToken pair[2] = {columns[8 * n], columns[8 * n + 1]};
    float weights[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      weights[c] = terms.template operator()<kPartial>(student[4 * n + c], teacher[4 * n + c], c / 2, pair[c % 2],
                                                       first_column + 8 * n + c % 2);
    }
    h[n / 2][n % 2 * 2] = pack<T>(weights[0], weights[1]);
    h[n / 2][n % 2 * 2 + 1] = pack<T>(weights[2], weights[3]);
  }
}

}  // namespace linearard::cuda::sm90
