#pragma once

#include <climits>

#include "../triangular/divergence.cuh"
#include "pairs.cuh"
#include "rows.h"
#include "schedule.cuh"

// The sums of rows over the columns of their tiles, for the row-wise forward. With e = 2^(t_ij + shift_i) and d the
// difference of the logits / student, less a mean of the row: sum e, sum e d, sum e phi(d).

namespace linearard::cuda::sm90 {

/// Sums of a thread's two rows.
struct RowPairSums {
  float mass[2] = {0, 0};
  float moment[2] = {0, 0};
  float phi[2] = {0, 0};

  __device__ void add(const RowPairSums& other) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mass[r] += other.mass[r];
      moment[r] += other.moment[r];
      phi[r] += other.phi[r];
    }
  }
};

/// Which pairs of a tile count: columns before `end`, and not beyond `last` for the first of the thread's rows, 8 more
/// for the second.
struct RowWindow {
  int column;    ///< the thread's first one
  int end;       ///< of the columns
  int last;      ///< of the first row
  int excluded;  ///< likewise: not this one

  __device__ bool counts(int fragment, int c) const {
    const int j = column + 8 * fragment + c % 2 - c / 2 * 8;
    return column + 8 * fragment + c % 2 < end && j <= last && j != excluded;
  }
};
inline constexpr int kNoColumn = INT_MIN / 2;
inline constexpr int kAllColumns = INT_MAX / 2;

template <bool kPartial, bool kAllNear, int kElements>
__device__ void add_row_fragments(const float (&difference)[kElements],
                                  const float (&teacher)[kElements],
                                  int first,
                                  const ElementFactors& f,
                                  const float (&shift)[2],
                                  const RowWindow& window,
                                  RowPairSums& sums) {
#pragma unroll
  for (int n = first; n < first + kVoteFragments; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int r = c / 2;
      const float d = difference[4 * n + c];
      const float exponent = fmaf(teacher[4 * n + c], f.teacher, shift[r]);
      float e = exp2_approximate(exponent);
      const float phi = d * d * f.phi_over_square(d);
      if constexpr (kAllNear) {
        sums.mass[r] += e;
        sums.moment[r] = fmaf(e, d, sums.moment[r]);
        sums.phi[r] = fmaf(e, phi, sums.phi[r]);
      } else {
        const float other = f.of_student(d, exponent);
        float moment = e * d;
        float term = fabsf(d) < f.near ? e * phi : fmaf(-f.nats, moment, other - e);
        if (kPartial && !window.counts(n, c)) e = moment = term = 0;
        sums.mass[r] += e;
        sums.moment[r] += moment;
        sums.phi[r] += term;
      }
    }
  }
}

/// The sums of all pairs of a tile. Overwrites the student's products by differences, less the rows' means.
template <bool kPartial, int kElements>
__device__ RowPairSums sum_row_pairs(float (&student)[kElements],
                                     const float (&teacher)[kElements],
                                     const ElementFactors& factors,
                                     const float (&shift)[2],
                                     const float (&mean)[2],
                                     const RowWindow& window) {
  static_assert(kElements % (4 * kVoteFragments) == 0);
  RowPairSums of_tile;
#pragma unroll
  for (int first = 0; first < kElements / 4; first += kVoteFragments) {
    const float farthest = subtract_teacher(student, teacher, first, mean);
    if (!kPartial && __all_sync(0xffffffffu, farthest < factors.near)) {
      add_row_fragments<false, true>(student, teacher, first, factors, shift, window, of_tile);
    } else {
      add_row_fragments<kPartial, false>(student, teacher, first, factors, shift, window, of_tile);
    }
  }
  return of_tile;
}

/// Rows of a relation, without their own columns: the diagonal serves as the reference, so that what a pair weighs in
/// its row depends on no other value of its column, E_ij weight_j = 2^(t_ij - bias_i + kHeadroom / 2 - center).
class RelationRows {
 public:
  static constexpr int kRegisterSteps = 6;  ///< all of the teacher's owners would spill

  /// @param first of the warpgroup's rows
  __device__ void begin(const RowsForwardParams& p, int head, int first) {
    const float center = __ldg(p.centers + head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + row_of_thread() + 8 * r;
      const float bias = row < p.owners ? p.token_values[static_cast<int64_t>(head) * p.owners + row].bias : 0.f;
      shift_[r] = kHeadroom / 2 - center - bias;
    }
  }

  /// @param column first of the tile's
  template <int kElements>
  __device__ void add(const RowsForwardParams& p,
                      float (&student)[kElements],
                      const float (&teacher)[kElements],
                      const ElementFactors& factors,
                      int head,
                      int first,
                      int column) {
    constexpr float kNoMean[2] = {0, 0};
    if (column >= p.others || (p.causal && column > first)) return;
    if (column == first || column + kTileTokens > p.others) {
      const int row = first + row_of_thread();
      const RowWindow window{column + column_of_thread(), p.others, p.causal ? row : kAllColumns, row};
      if (column == first)
        write_own(p.own + static_cast<int64_t>(head) * p.owners, p.owners, student, teacher, factors, row,
                  window.column);
      sums_.add(sum_row_pairs<true>(student, teacher, factors, shift_, kNoMean, window));
    } else {
      sums_.add(sum_row_pairs<false>(student, teacher, factors, shift_, kNoMean, RowWindow{}));
    }
  }

  __device__ void write(const RowsForwardParams& p, int head, int first) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float mass = over_columns(sums_.mass[r]);
      const float moment = over_columns(sums_.moment[r]);
      const float phi = over_columns(sums_.phi[r]);
      const int row = first + row_of_thread() + 8 * r;
      if (threadIdx.x % 4 != 0 || row >= p.owners) continue;
      float* to = p.sums + static_cast<int64_t>(head) * kSums * p.owners + row;
      to[0] = mass;
      to[p.owners] = moment;
      to[2 * static_cast<int64_t>(p.owners)] = phi;
    }
  }

 private:
  float shift_[2];
  RowPairSums sums_;

  /// @param row, column the thread's first ones
  template <int kElements>
  __device__ static void write_own(OwnLogit* own,
                                   int rows,
                                   const float (&student)[kElements],
                                   const float (&teacher)[kElements],
                                   const ElementFactors& factors,
                                   int row,
                                   int column) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int own_row = row + i % 4 / 2 * 8;
      if (column + i / 4 * 8 + i % 2 == own_row && own_row < rows) {
        own[own_row] = factors.own_logit(student[i], teacher[i]);
      }
    }
  }
};

/// Rows of queries over keys. The reference of a row is the largest of its first logits. Differences are taken from
/// their mean so far, which moves after the first tile and whenever twice as many have been seen:
///   sum e phi(d - k) = 2^-k (sum e phi(d)) + (2^-k - 1) sum e d + phi(-k) sum e
/// A tile whose logits lie so far above the reference that the sums would leave the range of float, or that outweighs
/// what has been seen, is added after both have moved to where it puts them.
class AttentionRows {
 public:
  static constexpr int kRegisterSteps = 4;

  __device__ void begin(const RowsForwardParams& /*p*/, int /*head*/, int /*first*/) {}

  template <int kElements>
  __device__ void add(const RowsForwardParams& p,
                      float (&student)[kElements],
                      const float (&teacher)[kElements],
                      const ElementFactors& factors,
                      int /*head*/,
                      int first,
                      int column) {
    if (column >= p.others || (p.causal && column > first + kTileTokens - 1 + p.offset)) return;
    const int last = column + kTileTokens - 1;
    const bool partial = column == 0 || last >= p.others || (p.causal && last > first + p.offset);
    if (!partial) {
      const RowPairSums of_tile = sum_row_pairs<false>(student, teacher, factors, shift_, mean_, RowWindow{});
      // NaN is much as well.
      const bool little = of_tile.mass[0] < fminf(kLargestMass, kLargestGrowth * sums_.mass[0]) &&
                          of_tile.mass[1] < fminf(kLargestMass, kLargestGrowth * sums_.mass[1]);
      if (__all_sync(0xffffffffu, little)) {
        sums_.add(of_tile);
        const int tile = column / kTileTokens;
        if ((tile & (tile + 1)) == 0) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float mass = over_columns(sums_.mass[r]);
            recenter(r, over_columns(sums_.moment[r]) / mass, mass, factors);
          }
        }
        return;
      }
    }
    add_much(p, student, teacher, factors, first, column, !partial);
  }

  __device__ void write(const RowsForwardParams& p, int head, int first) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float mass = over_columns(sums_.mass[r]);
      const float moment = over_columns(sums_.moment[r]);
      const float phi = over_columns(sums_.phi[r]);
      const int row = first + row_of_thread() + 8 * r;
      if (threadIdx.x % 4 == 0 && row < p.owners) {
        write_row(p, head, row, {mass, moment, phi, -shift_[r], mean_[r], moved_[r]});
      }
    }
  }

 private:
  static constexpr float kLargestMass = 0x1p40f;
  static constexpr float kLargestGrowth = 64.f;  ///< then at most 2e-7 x this of the divergence are lost
  static constexpr float kLargestStep = 16.f;    ///< of a mean, nats

  float shift_[2] = {0, 0};  ///< -reference of the teacher's logits
  float mean_[2] = {0, 0};
  float moved_[2] = {0, 0};  ///< sum of the row's mass x (step of its mean in nats)^2, at each step
  RowPairSums sums_;

  /// @param shifted whether the student's products are differences already
  template <int kElements>
  __device__ void add_much(const RowsForwardParams& p,
                           float (&student)[kElements],
                           const float (&teacher)[kElements],
                           const ElementFactors& f,
                           int first,
                           int column,
                           bool shifted) {
    const RowWindow window{column + column_of_thread(), p.others,
                           p.causal ? first + row_of_thread() + p.offset : kAllColumns, kNoColumn};
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int r = i / 2 % 2;
      if (!shifted) student[i] = student[i] - teacher[i] - mean_[r];
      if (window.counts(i / 4, i % 4)) top[r] = fmaxf(top[r], teacher[i] * f.teacher);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      if (column == 0) {
        shift_[r] = top[r] == -INFINITY ? 0.f : -top[r];
      } else if (top[r] > -shift_[r]) {
        const float shrink = exp2_approximate(-shift_[r] - top[r]);
        sums_.mass[r] *= shrink;
        sums_.moment[r] *= shrink;
        sums_.phi[r] *= shrink;
        moved_[r] *= shrink;
        shift_[r] = -top[r];
      }
    }
    float mass[2] = {0, 0};
    float moment[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int r = i / 2 % 2;
      const float e = exp2_approximate(fmaf(teacher[i], f.teacher, shift_[r]));
      if (!window.counts(i / 4, i % 4)) continue;
      mass[r] += e;
      moment[r] = fmaf(e, student[i], moment[r]);
    }
    float step[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = over_columns(sums_.mass[r]);
      const float all = before + over_columns(mass[r]);
      step[r] = over_columns(sums_.moment[r] + moment[r]) / all;
      if (column == 0) {
        if (all > 0)
          mean_[r] = step[r];
        else
          step[r] = 0;
      } else if (!recenter(r, step[r], before, f)) {
        step[r] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      student[i] -= step[i / 2 % 2];
#pragma unroll
    for (int n = 0; n < kElements / 4; n += kVoteFragments)
      add_row_fragments<true, false>(student, teacher, n, f, shift_, window, sums_);
  }

  /// The mean moves by `step`; @param mass of the row. False where it stays: too far, or no mass yet.
  __device__ bool recenter(int r, float step, float mass, const ElementFactors& f) {
    const float nats = step * f.nats;
    if (!(fabsf(nats) < kLargestStep)) return false;
    const float shrink = expm1f(-nats);
    // phi(-k) by its series where shrink + nats would cancel.
    const float square = nats * nats;
    const float less = fabsf(nats) < 0.1f ? square * (0.5f - nats * (1.f / 6 - nats * (1.f / 24 - nats * (1.f / 120))))
                                          : shrink + nats;
    sums_.phi[r] += fmaf(shrink, fmaf(sums_.moment[r], f.nats, sums_.phi[r]), less * sums_.mass[r]);
    sums_.moment[r] = fmaf(-step, sums_.mass[r], sums_.moment[r]);
    mean_[r] += step;
    moved_[r] = fmaf(square, mass, moved_[r]);
    return true;
  }

  struct Row {
    float mass;
    float moment;
    float phi;
    float reference;  ///< of the logits, in units of log 2
    float mean;       ///< of the differences / student
    float moved;
  };

  __device__ static void write_row(const RowsForwardParams& p, int head, int row, const Row& of) {
    const int64_t at = static_cast<int64_t>(head) * p.owners + row;
    const int keys = p.causal ? max(0, min(p.others, row + 1 + p.offset)) : p.others;
    if (keys == 0) {
      p.kl[at] = p.lse_student[at] = p.lse_teacher[at] = 0;
      if (p.ordered) p.row_lists[at] = 0;
      return;
    }
    const double nats = static_cast<double>(p.factors.student) * triangular::kLn2Wide;
    const double m = static_cast<double>(of.moment) / of.mass * nats;
    const double c = static_cast<double>(of.phi) / of.mass;
    const double a = m + c;
    const double shift = log1p(a);
    const double kl = keys > 1 ? triangular::tilted_divergence(a, c, m, shift) : 0;
    const double lse_teacher = of.reference * triangular::kLn2Wide + log(static_cast<double>(of.mass));
    const double lse_student = lse_teacher + of.mean * nats + shift;
    p.kl[at] = static_cast<float>(fmax(kl, 0.0));
    p.lse_student[at] = static_cast<float>(lse_student);
    p.lse_teacher[at] = static_cast<float>(lse_teacher);
    // What was added before a step of the mean keeps the rounding that it had.
    const double error = triangular::tilted_error(a, c, m) + 3e-7 * static_cast<double>(of.moved) / of.mass;
    // Not below: NaN is listed.
    const bool good = a >= -0.98 && fabs(lse_student) + fabs(lse_teacher) < Base<float>::kHuge &&
                      (keys == 1 || error < triangular::allowed_error(kl));
    if (p.ordered) {
      p.row_lists[at] = good ? 0 : 1;
    } else if (!good) {
      p.row_lists[static_cast<int64_t>(head) * p.owners + atomicAdd(p.row_counts + head, 1)] = row;
    }
  }
};

}  // namespace linearard::cuda::sm90
