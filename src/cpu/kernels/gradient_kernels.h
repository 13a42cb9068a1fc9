#pragma once

#include "tile_kernels.h"
#include "vector_math.h"

// The passes over tiles that need both log-sum-exps: expectations of one row, and the gradient on the logits.
// With r_ij = log(Q_ij / P_ij) = delta_ij - (lse_student_i - lse_teacher_i), every quantity is written as
// max(P, Q) times a bounded function of |r|: nothing overflows, and a tiny Q - P keeps its relative precision.

namespace linearard::cpu::LINEARARD_ISA {

/// One entry of a row: log P and r.
template <typename Real>
struct Entry {
  Vector<Real> log_teacher;
  Vector<Real> ratio;
};

template <typename Real>
LINEARARD_INLINE Vector<Real> absolute(Vector<Real> x) {
  return x < Real(0) ? -x : x;
}

/// A probability out of its logarithm, which the rounding of huge logits can make positive.
template <typename Real>
LINEARARD_INLINE Vector<Real> probability(Vector<Real> logarithm) {
  return exponential<Real>(logarithm > Real(0) ? Vector<Real>{} : logarithm);
}

template <typename Real>
LINEARARD_INLINE Vector<Real> larger_probability(const Entry<Real>& entry) {
  return probability<Real>(entry.log_teacher + (entry.ratio > Real(0) ? entry.ratio : Vector<Real>{}));
}

template <typename Real>
LINEARARD_INLINE Vector<Real> student_probability(const Entry<Real>& entry) {
  return probability<Real>(entry.log_teacher + entry.ratio);
}

/// log(Q / M) of the mixture M = beta P + (1 - beta) Q.
template <typename Real>
LINEARARD_INLINE Vector<Real> log_student_to_mixture(Vector<Real> ratio, Real beta) {
  const auto student_larger = ratio > Real(0);
  const Vector<Real> other_weight = student_larger ? broadcast(beta) : broadcast(Real(1) - beta);
  const Vector<Real> log1p =
      logarithm_family<Real>(other_weight * exponential_family<Real>(-absolute<Real>(ratio)).expm1).log1p;
  return (student_larger ? Vector<Real>{} : ratio) - log1p;
}

/// An entry's contribution to the Jensen-Shannon divergence, (1 - beta) Q r - M log(M / P). With p the larger of P and
/// Q, rho = -|r| and b the mixture's weight of the smaller one, it is p (b (rho e^rho - expm1 rho) - h(b expm1 rho)),
/// h(v) = (1 + v) log1p(v) - v: both terms are of second order in rho.
template <typename Real>
LINEARARD_INLINE Vector<Real> jsd_value(const Entry<Real>& entry, Real beta) {
  const Vector<Real> unbounded = -absolute<Real>(entry.ratio);
  // Beyond this rho e^rho is below rounding; without the bound the two terms that remain would cancel.
  constexpr Real kBound = sizeof(Real) == sizeof(float) ? -25 : -45;
  const Vector<Real> rho = unbounded < kBound ? broadcast(kBound) : unbounded;
  const Vector<Real> weight = entry.ratio > Real(0) ? broadcast(beta) : broadcast(Real(1) - beta);
  const ExpFamily<Real> family = exponential_family<Real>(rho);
  const Vector<Real> first = weight * (rho * family.expm1 - family.phi);
  return larger_probability<Real>(entry) * (first - logarithm_family<Real>(weight * family.expm1).entropy);
}

/// What an entry adds to an expectation and, of a mean under the student, to the sum that divides it.
template <typename Real>
struct ExpectationTerm {
  Vector<Real> value;
  Vector<Real> probability;
};

template <typename Real, Expectation kExpectation>
LINEARARD_INLINE ExpectationTerm<Real> expectation_term(const Entry<Real>& entry, Real beta) {
  if constexpr (kExpectation == Expectation::kJsdValue) return {jsd_value<Real>(entry, beta), Vector<Real>{}};
  const Vector<Real> student = student_probability<Real>(entry);
  if constexpr (kExpectation == Expectation::kReverseMean) return {student * entry.ratio, student};
  return {student * log_student_to_mixture<Real>(entry.ratio, beta), student};
}

/// G_ij / g_i (JSD: / (1 - beta) as well, which the caller folds into g).
template <typename Real, Gradient kGradient>
LINEARARD_INLINE Vector<Real> gradient_term(const Entry<Real>& entry, Vector<Real> mean, Real beta) {
  if constexpr (kGradient == Gradient::kForwardKL) {
    const Vector<Real> magnitude =
        larger_probability<Real>(entry) * exponential_family<Real>(-absolute<Real>(entry.ratio)).expm1;
    return entry.ratio > Real(0) ? -magnitude : magnitude;
  } else {
    const Vector<Real> student = student_probability<Real>(entry);
    if constexpr (kGradient == Gradient::kReverseKL) return student * (entry.ratio - mean);
    return student * (log_student_to_mixture<Real>(entry.ratio, beta) - mean);
  }
}

/// References of a row, broadcast, or of a vector of columns.
template <typename Real>
struct ReferenceVector {
  Vector<Real> lse_teacher;
  Vector<Real> lse_difference;
  Vector<Real> weight;
  Vector<Real> mean;

  LINEARARD_INLINE Vector<Real> load_or_zero(const Real* from) { return from == nullptr ? Vector<Real>{} : load(from); }
  LINEARARD_INLINE Vector<Real> broadcast_or_zero(const Real* from) {
    return from == nullptr ? Vector<Real>{} : broadcast(*from);
  }
  LINEARARD_INLINE const Real* at(const Real* array, int64_t index) {
    return array == nullptr ? nullptr : array + index;
  }
  LINEARARD_INLINE ReferenceVector of_row(const RowReference<Real>& rows, int64_t i) {
    return {broadcast(rows.lse_teacher[i]), broadcast(rows.lse_difference[i]), broadcast_or_zero(at(rows.weight, i)),
            broadcast_or_zero(at(rows.mean, i))};
  }
  LINEARARD_INLINE ReferenceVector of_columns(const RowReference<Real>& columns, int64_t j) {
    return {load(columns.lse_teacher + j), load(columns.lse_difference + j), load_or_zero(at(columns.weight, j)),
            load_or_zero(at(columns.mean, j))};
  }
  LINEARARD_INLINE Entry<Real> entry(const ReferenceVector& reference, Vector<Real> t, Vector<Real> delta) {
    return {t - reference.lse_teacher, delta - reference.lse_difference};
  }
};

/// Which entries of a vector of columns count for row i and which, mirrored, for the columns as rows.
template <typename Real>
struct Visibility {
  Integers<Real> row;
  Integers<Real> column;

  LINEARARD_INLINE Visibility of(TileKind kind, int64_t i, int64_t j, int64_t columns) {
    using Bits = typename VectorOf<Real>::Bits;
    const Integers<Real> index = indices_from<Real>(j);
    const Integers<Real> diagonal = Integers<Real>{} + static_cast<Bits>(i);
    const Integers<Real> inside = index < (Integers<Real>{} + static_cast<Bits>(columns));
    if (kind == TileKind::kDiagonal) return {inside & (index != diagonal), inside & (index != diagonal)};
    if (kind == TileKind::kDiagonalCausal) return {inside & (index < diagonal), inside & (index > diagonal)};
    return {inside, inside};
  }
};

/// The column that has most of a row's probability; one tile at most has it.
template <typename Real>
struct DominantColumn {
  /// P above 0.55, so that rounding does not find a second one.
  static constexpr Real kLogProbability = Real(-0.6);

  Vector<Real> log_teacher = broadcast(kLogProbability);
  Integers<Real> column{};

  LINEARARD_INLINE void add(DominantColumn& found, Vector<Real> log_teacher, int64_t j, Integers<Real> visible) {
    const Integers<Real> larger = (log_teacher > found.log_teacher) & visible;
    found.log_teacher = larger ? log_teacher : found.log_teacher;
    found.column = larger ? indices_from<Real>(j) : found.column;
  }
  LINEARARD_INLINE void write(const DominantColumn& found, int64_t first_key, int64_t& to) {
    for (int64_t lane = 0; lane < kLanes<Real>; ++lane) {
      if (found.log_teacher[lane] > kLogProbability) to = first_key + found.column[lane];
    }
  }
};

template <typename Real, Gradient kGradient, bool kColumns, bool kDiagonal>
void gradient_of_kind(TileKind kind,
                      Real beta,
                      const Tile<Real>& tile,
                      const RowReference<Real>& rows,
                      const RowReference<Real>& columns) {
  using Reference = ReferenceVector<Real>;
  for (int64_t i = 0; i < tile.rows; ++i) {
    Real* t = tile.teacher + i * tile.stride;
    const Real* delta = tile.difference + i * tile.stride;
    const Reference row = Reference::of_row(rows, i);
    const int64_t count = tile.visible == nullptr ? tile.columns : tile.visible[i];
    Vector<Real> row_sum{};
    DominantColumn<Real> dominant;
    const auto visit = [&](int64_t j, const Visibility<Real>& visible, bool masked) {
      const Vector<Real> t_j = load(t + j);
      const Vector<Real> delta_j = load(delta + j);
      Vector<Real> value =
          row.weight * gradient_term<Real, kGradient>(Reference::entry(row, t_j, delta_j), row.mean, beta);
      if (masked) value = visible.row ? value : Vector<Real>{};
      row_sum += value;
      if constexpr (!kColumns && kGradient == Gradient::kForwardKL) {
        DominantColumn<Real>::add(dominant, t_j - row.lse_teacher, j, masked ? visible.row : ~Integers<Real>{});
      }
      if constexpr (kColumns) {
        const Reference column = Reference::of_columns(columns, j);
        Vector<Real> mirrored =
            column.weight * gradient_term<Real, kGradient>(Reference::entry(column, t_j, delta_j), column.mean, beta);
        if (masked) mirrored = visible.column ? mirrored : Vector<Real>{};
        if constexpr (!kDiagonal) store<Real>(columns.sum + j, load(columns.sum + j) + mirrored);
        value += mirrored;
      }
      store<Real>(t + j, value);
    };
    int64_t j = 0;
    if constexpr (!kDiagonal) {
      for (; j + kLanes<Real> <= count; j += kLanes<Real>)
        visit(j, Visibility<Real>{}, false);
    }
    for (; j < count; j += kLanes<Real>)
      visit(j, Visibility<Real>::of(kind, i, j, count), true);
    for (; j < tile.columns; j += kLanes<Real>)
      store<Real>(t + j, Vector<Real>{});
    if (rows.sum != nullptr) rows.sum[i] += static_cast<Real>(sum_of_lanes<Real>(row_sum));
    if constexpr (!kColumns && kGradient == Gradient::kForwardKL) {
      if (rows.dominant != nullptr) DominantColumn<Real>::write(dominant, rows.first_key, rows.dominant[i]);
    }
  }
}

template <typename Real, Gradient kGradient>
void gradient_of(TileKind kind,
                 Real beta,
                 const Tile<Real>& tile,
                 const RowReference<Real>& rows,
                 const RowReference<Real>& columns) {
  switch (kind) {
    case TileKind::kRows:
      return gradient_of_kind<Real, kGradient, false, false>(kind, beta, tile, rows, columns);
    case TileKind::kRowsColumns:
      return gradient_of_kind<Real, kGradient, true, false>(kind, beta, tile, rows, columns);
    case TileKind::kDiagonal:
    case TileKind::kDiagonalCausal:
      return gradient_of_kind<Real, kGradient, true, true>(kind, beta, tile, rows, columns);
  }
}

template <typename Real>
void gradient(Gradient gradient,
              TileKind kind,
              Real beta,
              const Tile<Real>& tile,
              const RowReference<Real>& rows,
              const RowReference<Real>& columns) {
  switch (gradient) {
    case Gradient::kForwardKL:
      return gradient_of<Real, Gradient::kForwardKL>(kind, beta, tile, rows, columns);
    case Gradient::kReverseKL:
      return gradient_of<Real, Gradient::kReverseKL>(kind, beta, tile, rows, columns);
    case Gradient::kJSD:
      return gradient_of<Real, Gradient::kJSD>(kind, beta, tile, rows, columns);
  }
}

template <typename Real, Expectation kExpectation>
void expectation_of(TileKind kind,
                    Real beta,
                    const Tile<Real>& tile,
                    const RowReference<Real>& rows,
                    const RowReference<Real>& columns) {
  using Reference = ReferenceVector<Real>;
  constexpr bool kMean = kExpectation != Expectation::kJsdValue;
  const auto add = [](Real* to, Vector<Real> x, Integers<Real> inside) {
    store<Real>(to, load(to) + (inside ? x : Vector<Real>{}));
  };
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Real* t = tile.teacher + i * tile.stride;
    const Real* delta = tile.difference + i * tile.stride;
    const Reference row = Reference::of_row(rows, i);
    const int64_t count = tile.visible == nullptr ? tile.columns : tile.visible[i];
    Vector<Real> row_sum{};
    Vector<Real> row_probability{};
    for (int64_t j = 0; j < count; j += kLanes<Real>) {
      const Integers<Real> inside = Visibility<Real>::of(TileKind::kRows, i, j, count).row;
      const Vector<Real> t_j = load(t + j);
      const Vector<Real> delta_j = load(delta + j);
      const auto term = expectation_term<Real, kExpectation>(Reference::entry(row, t_j, delta_j), beta);
      row_sum += inside ? term.value : Vector<Real>{};
      if constexpr (kMean) row_probability += inside ? term.probability : Vector<Real>{};
      if (kind == TileKind::kRowsColumns) {
        const Entry<Real> entry = Reference::entry(Reference::of_columns(columns, j), t_j, delta_j);
        const auto mirrored = expectation_term<Real, kExpectation>(entry, beta);
        add(columns.sum + j, mirrored.value, inside);
        if constexpr (kMean) add(columns.probability + j, mirrored.probability, inside);
      }
    }
    rows.sum[i] += static_cast<Real>(sum_of_lanes<Real>(row_sum));
    if constexpr (kMean) rows.probability[i] += static_cast<Real>(sum_of_lanes<Real>(row_probability));
  }
}

template <typename Real>
void accumulate_expectation(Expectation expectation,
                            TileKind kind,
                            Real beta,
                            const Tile<Real>& tile,
                            const RowReference<Real>& rows,
                            const RowReference<Real>& columns) {
  switch (expectation) {
    case Expectation::kJsdValue:
      return expectation_of<Real, Expectation::kJsdValue>(kind, beta, tile, rows, columns);
    case Expectation::kReverseMean:
      return expectation_of<Real, Expectation::kReverseMean>(kind, beta, tile, rows, columns);
    case Expectation::kJsdMean:
      return expectation_of<Real, Expectation::kJsdMean>(kind, beta, tile, rows, columns);
  }
}

}  // namespace linearard::cpu::LINEARARD_ISA
