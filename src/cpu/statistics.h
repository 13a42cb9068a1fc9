#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

#include "cpu/kernels/tile_kernels.h"
#include "row_sets.h"

namespace linearard::cpu {

/// Statistics of n rows before their first tile.
std::vector<RowStatistics> empty_statistics(int64_t rows);

/// What a row's statistics amount to, in double.
struct RowResult {
  double kl;  ///< KL(teacher || student)
  double lse_teacher;
  double lse_student;
  double lse_difference;  ///< lse_student - lse_teacher, to the precision of a small difference
  bool cancels;           ///< kl is a difference of sums whose rounding may exceed what is promised: see refine_rows
};

/// A Jensen-Shannon divergence lies in [0, entropy of beta]; the rounding of huge logits can say otherwise. NaN stays.
double bounded_jsd(double value, double beta);

/// docs/mathematics.md, "Precision": the sum of phi where a = expm1(lse_difference - shift) is small, the direct sum
/// elsewhere. A row without keys gives zeros.
/// @param unit_roundoff of the tiles that the sums were made of
RowResult finish_row(const RowStatistics& row, double unit_roundoff);

/// Of float or double.
template <typename Real>
inline constexpr double kUnitRoundoff = std::numeric_limits<Real>::epsilon() / 2.0;

/// The row vectors that the passes after the statistics read; padded, because kernels load whole vectors.
template <typename Real>
struct RowVectors {
  std::vector<Real> lse_teacher;
  std::vector<Real> lse_difference;
  std::vector<Real> weight;
  std::vector<Real> mean;
  std::vector<Real> sum;
  std::vector<Real> probability;

  explicit RowVectors(int64_t rows);
  void scale_weight(double factor);
  /// After an expectation for the gradient: `sum` over `probability` becomes `mean`, and `sum` is zero again; a
  /// constant factor of the gradient goes to `weight`.
  void sums_become_means(Divergence divergence, double beta);
  /// References that start at a row. Weight and mean are null unless `with_gradient`.
  RowReference<Real> reference(int64_t row, bool with_gradient);
};

/// One field of the results of a head's rows into `head` [N].
void write_rows(const at::Tensor& head,
                const RowSet& rows,
                const std::vector<RowResult>& results,
                double RowResult::* field);

/// The values of a head's rows out of `head` [N].
template <typename Real>
void load_rows(const at::Tensor& head, const RowSet& rows, std::vector<Real>& into);

/// lse_teacher and lse_difference of the rows of some heads; the rest is zero.
template <typename Real>
std::vector<RowVectors<Real>> vectors_of(const std::vector<std::vector<RowResult>>& results);

/// The kernels' names for a divergence: its gradient, and the mean under the student that the gradient contains.
Gradient gradient_kind(Divergence divergence);
Expectation mean_kind(Divergence divergence);

}  // namespace linearard::cpu
