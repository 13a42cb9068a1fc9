#pragma once

#include <climits>

#include "../mma/instructions.cuh"
#include "pairs.cuh"
#include "rows.h"
#include "schedule.cuh"

// What the pairs of a row-wise walk weigh in the gradient of their owner. Both sides have one scale, so that logits
// differ as the products of their vectors do.

namespace linearard::cuda::sm90 {

/// H or G of the pairs of a thread's two owners, for one tile.
template <Pairs kPairs>
class RowTerms;

template <>
class RowTerms<Pairs::kRelation> {
 public:
  using Value = BackwardToken;
  static constexpr bool kReadsRows = true;
  static constexpr bool kReadsColumns = true;

  /// All walks are equally long.
  __device__ static int first_of(int token_block, int /*blocks*/) { return token_block; }

  /// @param own values of the thread's rows; @param row the first one's token
  __device__ RowTerms(const RowsBackwardParams& p, const Value (&own)[2], int row)
      : factors_(p.factors), row_(row), rows_{own[0], own[1]} {}

  /// A tile comes. Causal, a pair is in the row of its later token only. Returns whether that differs within the tile.
  __device__ bool enter(const RowsBackwardParams& p, int first_row, int first_column) {
    if (!p.causal) return false;
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

  /// @param sum of the row: its pairs' G is added
  template <bool kPartial>
  __device__ float operator()(
      float student, float teacher, int r, const Value& column, int column_token, float& sum) const {
    const float w = exp2_approximate((student - teacher) * factors_.student);
    const float e = exp2_approximate(fmaf(teacher, factors_.teacher, -column.bias) - rows_[r].bias);
    if constexpr (kPartial) {
      // The later token's row only, and of a token's pair with itself e is 0. One term out of chosen values: two terms
      // would take more registers.
      const bool is_row = row_ + 8 * r > column_token;
      const float ratio = is_row ? rows_[r].row_ratio : column.row_ratio;
      const float row = is_row ? rows_[r].row : column.row;
      const float key = is_row ? column.key : rows_[r].key;
      const float g = e * (fmaf(w, ratio, -row) * key);
      if (is_row) sum += g;
      return g;
    }
    const float as_row = fmaf(w, rows_[r].row_ratio, -rows_[r].row) * column.key;
    const float as_key = fmaf(w, column.row_ratio, -column.row);
    sum = fmaf(e, as_row, sum);
    return e * fmaf(as_key, rows_[r].key, as_row);
  }

 private:
  const LogitFactors& factors_;
  const int row_;
  BackwardToken rows_[2];
};

/// G of a pair in its row.
__device__ inline float row_weight(const LogitFactors& f, float student, float teacher, const RowToken& row) {
  const float w = exp2_approximate(fmaf(student - teacher, f.student, -row.shift));
  const float e = exp2_approximate(fmaf(teacher, f.teacher, -row.bias));
  return fmaf(e, w, -e) * row.weight;
}

template <>
class RowTerms<Pairs::kQueries> {
 public:
  using Value = RowToken;
  static constexpr bool kReadsRows = true;
  static constexpr bool kReadsColumns = false;

  /// Causal, the last rows have the longest walks.
  __device__ static int first_of(int token_block, int blocks) { return blocks - 1 - token_block; }

  __device__ RowTerms(const RowsBackwardParams& p, const Value (&own)[2], int row)
      : factors_(p.factors), end_(p.others), last_(p.causal ? row + p.offset : INT_MAX - 8), rows_{own[0], own[1]} {}

  __device__ bool enter(const RowsBackwardParams& p, int first_row, int first_column) const {
    const int last = first_column + kTileTokens - 1;
    return last >= p.others || (p.causal && last > first_row + p.offset);
  }

  template <bool kPartial>
  __device__ float operator()(
      float student, float teacher, int r, const Value& /*column*/, int column_token, float& /*sum*/) const {
    const float g = row_weight(factors_, student, teacher, rows_[r]);
    return !kPartial || (column_token < end_ && column_token <= last_ + 8 * r) ? g : 0.f;
  }

 private:
  const LogitFactors& factors_;
  const int end_;
  const int last_;
  RowToken rows_[2];
};

template <>
class RowTerms<Pairs::kKeys> {
 public:
  using Value = RowToken;
  static constexpr bool kReadsRows = false;
  static constexpr bool kReadsColumns = true;

  /// Causal, the first keys have the longest walks.
  __device__ static int first_of(int token_block, int /*blocks*/) { return token_block; }

  __device__ RowTerms(const RowsBackwardParams& p, const Value (& /*own*/)[2], int row)
      : factors_(p.factors), first_row_(row - p.offset) {}

  __device__ bool enter(const RowsBackwardParams& p, int first_row, int first_column) const {
    return p.causal && first_column < first_row + kTileTokens - 1 - p.offset;
  }

  template <bool kPartial>
  __device__ float operator()(
      float student, float teacher, int r, const Value& column, int column_token, float& /*sum*/) const {
    const float g = row_weight(factors_, student, teacher, column);
    return !kPartial || column_token >= first_row_ + 8 * r ? g : 0.f;
  }

 private:
  const LogitFactors& factors_;
  const int first_row_;  ///< that sees the thread's first key
};

/// The weights of all pairs, rounded and packed as the operand A of a sum over the columns: 16 of them for each step.
/// @param columns values of the thread's first column; @param first_column its token; @param sums
/// of the thread's rows
template <typename T, bool kPartial, typename Terms, int kElements>
__device__ void weigh_row_pairs(const float (&student)[kElements],
                                const float (&teacher)[kElements],
                                const Terms& terms,
                                const typename Terms::Value* columns,
                                int first_column,
                                uint32_t (&h)[kElements / 8][4],
                                float (&sums)[2]) {
#pragma unroll
  for (int n = 0; n < kElements / 4; ++n) {
    const int column = first_column + 8 * n;
    typename Terms::Value pair[2] = {};
    if constexpr (Terms::kReadsColumns) {
      pair[0] = columns[8 * n];
      pair[1] = columns[8 * n + 1];
    }
    float weights[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      weights[c] = terms.template operator()<kPartial>(student[4 * n + c], teacher[4 * n + c], c / 2, pair[c % 2],
                                                       column + c % 2, sums[c / 2]);
    }
    h[n / 2][n % 2 * 2] = pack<T>(weights[0], weights[1]);
    h[n / 2][n % 2 * 2 + 1] = pack<T>(weights[2], weights[3]);
  }
}

}  // namespace linearard::cuda::sm90
