#include "cpu/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/ops/empty.h>

#include "saturation.h"

namespace linearard::cpu {

std::vector<RowStatistics> empty_statistics(int64_t rows) {
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  return std::vector<RowStatistics>(static_cast<size_t>(rows), RowStatistics{kLowest, kLowest, 0, 0, 0, 0, 0, false});
}

namespace {

/// a - log1p(a), |a| < 1/2, without the cancellation: by z = a / (2 + a), log1p(a) = 2 (z + z^3 / 3 + z^5 / 5 + ...).
double minus_log1p(double a) {
  const double z = a / (2 + a);
  const double square = z * z;
  double power = z * square;
  double sum = 0;
  // |z| < 1/3: the last term is below 1e-17 of the first.
  for (int k = 3; k <= 33; k += 2) {
    sum += power / k;
    power *= square;
  }
  return 2 * (square / (1 - z) - sum);
}

/// Error that the project promises of a row, by the precision of its tiles; less near zero, where that is 1e-7.
double promised_error(double kl, double unit_roundoff) {
  if (unit_roundoff < kUnitRoundoff<float>) return 1e-9 * kl;
  return kl >= 1e-3 ? 1e-4 * kl : std::max(1e-2 * kl, 1e-9);
}

/// Whether a divergence that was formed out of larger numbers may have lost more than half of what is promised.
/// @param roundings of numbers of that size
bool loses_digits(double kl, double size, double roundings, double unit_roundoff) {
  return roundings * unit_roundoff * size > promised_error(kl, unit_roundoff) / 2;
}

}  // namespace

RowResult finish_row(const RowStatistics& row, double unit_roundoff) {
  if (!row.started) return {0, 0, 0, 0, false};
  const double lse_teacher = row.max_teacher + std::log(row.sum_teacher);
  const double lse_student = row.max_student + std::log(row.sum_student);
  const double direct_difference = lse_student - lse_teacher;
  const double mean_delta = row.sum_delta / row.sum_teacher;
  const double mean_phi = row.sum_phi / row.sum_teacher;
  const double a = mean_phi + mean_delta;  // E_T[expm1(delta - shift)]
  const double difference = row.shift + std::log1p(a);
  // The two agree but for rounding, unless the shift was so far off that a factor of the sums had to be bounded.
  const double tolerance = 1e-3 + 1e-6 * (std::abs(lse_student) + std::abs(lse_teacher));
  if (std::abs(a) < 0.5 && std::abs(difference - direct_difference) <= tolerance) {
    const double kl = mean_phi - minus_log1p(a);
    // Little left of the sum: the shift was not close enough for so small a divergence. A term of the sum is a weight
    // times phi, each good to about three units, and the sum to two more; 4 have been measured of what is left.
    constexpr double kRoundings = 8;
    return {kl, lse_teacher, lse_teacher + difference, difference,
            loses_digits(kl, mean_phi, kRoundings, unit_roundoff)};
  }
  // A divergence is not negative; the rounding of large logits can say otherwise. NaN stays.
  const double kl = direct_difference - row.shift - mean_delta;
  // The student's sum is of exp(t + delta), whose argument is rounded, and so are both maxima and the mean of delta:
  // a rounding of a number of each size.
  constexpr double kRoundings = 4;
  const double size = 1 + std::abs(lse_teacher) + std::abs(lse_student);
  return {kl < 0 ? 0 : kl, lse_teacher, lse_student, direct_difference,
          loses_digits(kl, size, kRoundings, unit_roundoff)};
}

double bounded_jsd(double value, double beta) {
  const double entropy = -beta * std::log(beta) - (1 - beta) * std::log1p(-beta);
  return value < 0 ? 0 : value > entropy ? entropy : value;
}

namespace {

constexpr size_t padded(int64_t rows) { return static_cast<size_t>(rows + kVectorPadding); }

}  // namespace

template <typename Real>
RowVectors<Real>::RowVectors(int64_t rows)
    : lse_teacher(padded(rows)),
      lse_difference(padded(rows)),
      weight(padded(rows)),
      mean(padded(rows)),
      sum(padded(rows)),
      probability(padded(rows)) {}

template <typename Real>
RowReference<Real> RowVectors<Real>::reference(int64_t row, bool with_gradient) {
  return {lse_teacher.data() + row,
          lse_difference.data() + row,
          with_gradient ? weight.data() + row : nullptr,
          with_gradient ? mean.data() + row : nullptr,
          sum.data() + row,
          probability.data() + row,
          nullptr,
          0};
}

template <typename Real>
void RowVectors<Real>::scale_weight(double factor) {
  if (factor == 1) return;
  for (Real& value : weight)
    value *= static_cast<Real>(factor);
}

template <typename Real>
void RowVectors<Real>::sums_become_means(Divergence divergence, double beta) {
  // The rounding of the log-sum-exps leaves sum_j Q_ij beside 1, which would shift a mean by as much of itself: by more
  // than the gradient where the mean is large. No mass at all: no keys, or logits that are nothing but rounding.
  for (size_t i = 0; i < mean.size(); ++i)
    mean[i] = probability[i] == 0 ? Real(0) : sum[i] / probability[i];
  std::fill(sum.begin(), sum.end(), Real(0));
  if (divergence != Divergence::kJSD) return;
  for (Real& value : weight)
    value *= static_cast<Real>(1 - beta);
}

void write_rows(const at::Tensor& head,
                const RowSet& rows,
                const std::vector<RowResult>& results,
                double RowResult::* field) {
  const double limit = largest_finite(head.scalar_type());
  at::Tensor values = at::empty({static_cast<int64_t>(results.size())}, at::kDouble);
  double* data = values.mutable_data_ptr<double>();
  for (size_t i = 0; i < results.size(); ++i) {
    const double value = results[i].*field;
    data[i] = value > limit ? limit : value < -limit ? -limit : value;  // NaN stays
  }
  put_rows(head, rows, values);
}

template <typename Real>
void load_rows(const at::Tensor& head, const RowSet& rows, std::vector<Real>& into) {
  const at::Tensor values = take_rows(head, rows).to(c10::CppTypeToScalarType<Real>::value).contiguous();
  std::copy_n(values.template const_data_ptr<Real>(), values.numel(), into.begin());
}

template <typename Real>
std::vector<RowVectors<Real>> vectors_of(const std::vector<std::vector<RowResult>>& results) {
  std::vector<RowVectors<Real>> vectors;
  for (const std::vector<RowResult>& rows : results) {
    RowVectors<Real>& vector = vectors.emplace_back(static_cast<int64_t>(rows.size()));
    for (size_t i = 0; i < rows.size(); ++i) {
      vector.lse_teacher[i] = static_cast<Real>(rows[i].lse_teacher);
      vector.lse_difference[i] = static_cast<Real>(rows[i].lse_difference);
    }
  }
  return vectors;
}

template struct RowVectors<float>;
template struct RowVectors<double>;
template void load_rows<float>(const at::Tensor&, const RowSet&, std::vector<float>&);
template void load_rows<double>(const at::Tensor&, const RowSet&, std::vector<double>&);
template std::vector<RowVectors<float>> vectors_of<float>(const std::vector<std::vector<RowResult>>&);
template std::vector<RowVectors<double>> vectors_of<double>(const std::vector<std::vector<RowResult>>&);

Gradient gradient_kind(Divergence divergence) {
  switch (divergence) {
    case Divergence::kReverseKL:
      return Gradient::kReverseKL;
    case Divergence::kJSD:
      return Gradient::kJSD;
    case Divergence::kForwardKL:
      break;
  }
  return Gradient::kForwardKL;
}

Expectation mean_kind(Divergence divergence) {
  return divergence == Divergence::kJSD ? Expectation::kJsdMean : Expectation::kReverseMean;
}

}  // namespace linearard::cpu
