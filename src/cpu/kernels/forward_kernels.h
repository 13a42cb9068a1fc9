#pragma once

#include <cmath>
#include <limits>

#include "tile_kernels.h"
#include "vector_math.h"

// Scaling of a tile and the running statistics of its rows and columns. Formulas: docs/mathematics.md.

namespace linearard::cpu::LINEARARD_ISA {

/// Logits beyond this are cut, in double only: float tiles are never given inputs that reach it (logit_form.cpp). Its
/// square is finite, so that no product of two logits, or of a logit and a gradient, overflows.
inline constexpr double kLogitLimit = 1e150;

template <typename Real>
LINEARARD_INLINE Vector<Real> scaled(Vector<Real> product, Real scale) {
  Vector<Real> value = product * scale;
  if constexpr (sizeof(Real) == sizeof(double)) {
    const Real limit = kLogitLimit;
    value = value > limit ? broadcast(limit) : value;
    value = value < -limit ? broadcast(-limit) : value;
    // A product is only infinite where an input was: product * 0 turns that into NaN and is 0 otherwise.
    value += product * Real(0);
  }
  return value;
}

template <typename Real>
void scale_tile(const Tile<Real>& tile, const TileScale<Real>& scale) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    Real* teacher = tile.teacher + i * tile.stride;
    Real* difference = tile.difference + i * tile.stride;
    for (int64_t j = 0; j < tile.columns; j += kLanes<Real>) {
      const Vector<Real> t = scaled<Real>(load(teacher + j), scale.teacher);
      const Vector<Real> second = scaled<Real>(load(difference + j), scale.second);
      store<Real>(teacher + j, t);
      store<Real>(difference + j, scale.second_is_student ? second - t : second);
    }
  }
}

template <typename Real>
void scale_one(const Tile<Real>& tile, Real scale) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    Real* row = tile.teacher + i * tile.stride;
    for (int64_t j = 0; j < tile.columns; j += kLanes<Real>)
      store<Real>(row + j, scaled<Real>(load(row + j), scale));
  }
}

/// Sums of one row or column over one tile, relative to that row's new maxima.
struct TileSums {
  double teacher = 0;
  double student = 0;
  double delta = 0;
  double phi = 0;
};

LINEARARD_INLINE double decay(double old_maximum, double new_maximum) {
  return old_maximum == new_maximum ? 1.0 : std::exp(old_maximum - new_maximum);
}

LINEARARD_INLINE void merge(RowStatistics& row, double max_teacher, double max_student, const TileSums& sums) {
  const double teacher_decay = decay(row.max_teacher, max_teacher);
  row.sum_teacher = row.sum_teacher * teacher_decay + sums.teacher;
  row.sum_delta = row.sum_delta * teacher_decay + sums.delta;
  row.sum_phi = row.sum_phi * teacher_decay + sums.phi;
  row.sum_student = row.sum_student * decay(row.max_student, max_student) + sums.student;
  row.max_teacher = max_teacher;
  row.max_student = max_student;
}

/// Of a row whose shift fits; bounded, because a row whose shift does not fit takes the direct sum anyway.
template <typename Real>
LINEARARD_INLINE Real student_factor(double max_teacher, double max_student, double shift) {
  const double exponent = max_student - max_teacher - shift;
  return static_cast<Real>(std::exp(exponent < 60 ? exponent : 60));
}

/// Vector accumulators of TileSums; `add` is the whole inner loop of the forward.
template <typename Real>
struct SumAccumulator {
  Vector<Real> teacher{};
  Vector<Real> student{};
  Vector<Real> delta{};
  Vector<Real> phi{};

  struct Reference {
    Vector<Real> max_teacher;
    Vector<Real> max_student;
    Vector<Real> shift;
    Vector<Real> student_factor;  ///< exp(max_student - max_teacher - shift)
  };

  template <bool kMasked>
  LINEARARD_INLINE void add(
      SumAccumulator& sums, Vector<Real> t, Vector<Real> delta, const Reference& reference, Integers<Real> keep) {
    Vector<Real> weight = exponential<Real>(t - reference.max_teacher);
    Vector<Real> student_weight = exponential<Real>(t + delta - reference.max_student);
    Vector<Real> shifted = delta - reference.shift;
    if constexpr (kMasked) {
      weight = keep ? weight : Vector<Real>{};
      student_weight = keep ? student_weight : Vector<Real>{};
      shifted = keep ? shifted : Vector<Real>{};
    }
    sums.teacher += weight;
    sums.student += student_weight;
    sums.delta += weight * shifted;
    // exp(t) phi(x) is exp(t + x) beyond 20, to the last bit of float: there the teacher's weight may have underflown
    // where the student has mass. (Double has three times the range of any real logits.)
    constexpr Real kLarge = sizeof(Real) == sizeof(float) ? 20 : 40;
    const Vector<Real> term = weight * exponential_family<Real>(shifted).phi;
    sums.phi += shifted > kLarge ? student_weight * reference.student_factor : term;
  }
};

/// Calls `whole(j)` for each vector of columns below `count` and `partial(j, keep)` for the last, incomplete one.
template <typename Real, typename Whole, typename Partial>
LINEARARD_INLINE void for_each_vector(int64_t count, const Whole& whole, const Partial& partial) {
  int64_t j = 0;
  for (; j + kLanes<Real> <= count; j += kLanes<Real>)
    whole(j);
  if (j < count) {
    const Integers<Real> limit = Integers<Real>{} + static_cast<typename VectorOf<Real>::Bits>(count);
    partial(j, indices_from<Real>(j) < limit);
  }
}

/// The first estimate of lse_student - lse_teacher of a row, from its first tile: with it as the shift, delta - shift
/// is small wherever the teacher has mass and the sums of phi keep the relative precision of a small divergence.
template <typename Real>
LINEARARD_INLINE double first_shift(
    const Real* t, const Real* delta, int64_t count, Real max_teacher, Real max_student) {
  Vector<Real> teacher{};
  Vector<Real> student{};
  const auto whole = [&](int64_t j) {
    teacher += exponential<Real>(load(t + j) - max_teacher);
    student += exponential<Real>(load(t + j) + load(delta + j) - max_student);
  };
  const auto partial = [&](int64_t j, Integers<Real> keep) {
    teacher += keep ? exponential<Real>(load(t + j) - max_teacher) : Vector<Real>{};
    student += keep ? exponential<Real>(load(t + j) + load(delta + j) - max_student) : Vector<Real>{};
  };
  for_each_vector<Real>(count, whole, partial);
  return static_cast<double>(max_student) - static_cast<double>(max_teacher) +
         std::log(sum_of_lanes<Real>(student) / sum_of_lanes<Real>(teacher));
}

template <typename Real>
void accumulate_rows(const Tile<Real>& tile, RowStatistics* rows) {
  const Vector<Real> lowest = broadcast(-std::numeric_limits<Real>::infinity());
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t count = tile.visible == nullptr ? tile.columns : tile.visible[i];
    if (count <= 0) continue;
    const Real* t = tile.teacher + i * tile.stride;
    const Real* delta = tile.difference + i * tile.stride;
    RowStatistics& row = rows[i];

    Vector<Real> teacher_maxima = broadcast(static_cast<Real>(row.max_teacher));
    Vector<Real> student_maxima = broadcast(static_cast<Real>(row.max_student));
    for_each_vector<Real>(
        count,
        [&](int64_t j) {
          teacher_maxima = maximum<Real>(teacher_maxima, load(t + j));
          student_maxima = maximum<Real>(student_maxima, load(t + j) + load(delta + j));
        },
        [&](int64_t j, Integers<Real> keep) {
          teacher_maxima = maximum<Real>(teacher_maxima, keep ? load(t + j) : lowest);
          student_maxima = maximum<Real>(student_maxima, keep ? load(t + j) + load(delta + j) : lowest);
        });
    const Real max_teacher = maximum_of_lanes<Real>(teacher_maxima);
    const Real max_student = maximum_of_lanes<Real>(student_maxima);
    if (!row.started) {
      // Rounded to Real here, because that is what the inner loop subtracts.
      // A row with one key has no divergence: with its delta as the shift that is exact.
      row.shift =
          count == 1 ? delta[0] : static_cast<Real>(first_shift<Real>(t, delta, count, max_teacher, max_student));
      row.started = true;
    }

    SumAccumulator<Real> sums;
    const typename SumAccumulator<Real>::Reference reference{
        broadcast(max_teacher), broadcast(max_student), broadcast(static_cast<Real>(row.shift)),
        broadcast(student_factor<Real>(max_teacher, max_student, row.shift))};
    for_each_vector<Real>(
        count,
        [&](int64_t j) {
          SumAccumulator<Real>::template add<false>(sums, load(t + j), load(delta + j), reference, Integers<Real>{});
        },
        [&](int64_t j, Integers<Real> keep) {
          SumAccumulator<Real>::template add<true>(sums, load(t + j), load(delta + j), reference, keep);
        });
    merge(row, max_teacher, max_student,
          {sum_of_lanes<Real>(sums.teacher), sum_of_lanes<Real>(sums.student), sum_of_lanes<Real>(sums.delta),
           sum_of_lanes<Real>(sums.phi)});
  }
}

/// A strip of as many columns as a vector has lanes is held in registers while the rows go by: no reduction at all.
template <typename Real>
void accumulate_columns(const Tile<Real>& tile, RowStatistics* columns) {
  for (int64_t j = 0; j < tile.columns; j += kLanes<Real>) {
    const int64_t lanes = tile.columns - j < kLanes<Real> ? tile.columns - j : kLanes<Real>;
    typename SumAccumulator<Real>::Reference reference{};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      reference.max_teacher[lane] = static_cast<Real>(columns[j + lane].max_teacher);
      reference.max_student[lane] = static_cast<Real>(columns[j + lane].max_student);
      reference.shift[lane] = static_cast<Real>(columns[j + lane].shift);
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Vector<Real> t = load(tile.teacher + i * tile.stride + j);
      const Vector<Real> delta = load(tile.difference + i * tile.stride + j);
      reference.max_teacher = maximum<Real>(reference.max_teacher, t);
      reference.max_student = maximum<Real>(reference.max_student, t + delta);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      reference.student_factor[lane] =
          student_factor<Real>(reference.max_teacher[lane], reference.max_student[lane], columns[j + lane].shift);
    }
    SumAccumulator<Real> sums;
    for (int64_t i = 0; i < tile.rows; ++i) {
      SumAccumulator<Real>::template add<false>(sums, load(tile.teacher + i * tile.stride + j),
                                                load(tile.difference + i * tile.stride + j), reference,
                                                Integers<Real>{});
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      merge(columns[j + lane], reference.max_teacher[lane], reference.max_student[lane],
            {sums.teacher[lane], sums.student[lane], sums.delta[lane], sums.phi[lane]});
    }
  }
}

/// One side only: relation_lse.
template <typename Real>
void accumulate_lse(const Tile<Real>& tile, RowStatistics* rows, RowStatistics* columns) {
  const Vector<Real> lowest = broadcast(-std::numeric_limits<Real>::infinity());
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t count = tile.visible == nullptr ? tile.columns : tile.visible[i];
    if (count <= 0) continue;
    const Real* t = tile.teacher + i * tile.stride;
    Vector<Real> maxima = broadcast(static_cast<Real>(rows[i].max_teacher));
    for_each_vector<Real>(
        count, [&](int64_t j) { maxima = maximum<Real>(maxima, load(t + j)); },
        [&](int64_t j, Integers<Real> keep) { maxima = maximum<Real>(maxima, keep ? load(t + j) : lowest); });
    const Real max_teacher = maximum_of_lanes<Real>(maxima);
    Vector<Real> sum{};
    for_each_vector<Real>(
        count, [&](int64_t j) { sum += exponential<Real>(load(t + j) - max_teacher); },
        [&](int64_t j, Integers<Real> keep) {
          sum += keep ? exponential<Real>(load(t + j) - max_teacher) : Vector<Real>{};
        });
    merge(rows[i], max_teacher, rows[i].max_student, {sum_of_lanes<Real>(sum), 0, 0, 0});
  }
  if (columns == nullptr) return;
  for (int64_t j = 0; j < tile.columns; j += kLanes<Real>) {
    const int64_t lanes = tile.columns - j < kLanes<Real> ? tile.columns - j : kLanes<Real>;
    Vector<Real> maxima{};
    for (int64_t lane = 0; lane < lanes; ++lane)
      maxima[lane] = static_cast<Real>(columns[j + lane].max_teacher);
    for (int64_t i = 0; i < tile.rows; ++i)
      maxima = maximum<Real>(maxima, load(tile.teacher + i * tile.stride + j));
    Vector<Real> sum{};
    for (int64_t i = 0; i < tile.rows; ++i) {
      sum += exponential<Real>(load(tile.teacher + i * tile.stride + j) - maxima);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      merge(columns[j + lane], maxima[lane], columns[j + lane].max_student, {sum[lane], 0, 0, 0});
    }
  }
}

}  // namespace linearard::cpu::LINEARARD_ISA
