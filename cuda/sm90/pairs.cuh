#pragma once

#include "../mma/instructions.cuh"
#include "../triangular/elements.cuh"

// The pairs of a warpgroup's accumulators: see wgmma.cuh for which thread holds which. Rows and columns are tokens.
// Both sides have one scale, so that logits differ as the products of their vectors do.

namespace linearard::cuda::sm90 {

using triangular::ColumnPair;
using triangular::ElementFactors;
using triangular::Sums;

/// Fragments of 8 columns whose pairs are found near or far together: one vote of the warp for each.
inline constexpr int kVoteFragments = 4;

__device__ inline int warp_of_group() { return static_cast<int>(threadIdx.x) % 128 / 32; }
/// The first of the thread's two rows, the other is 8 below; and the first of its two columns of a fragment.
__device__ inline int row_of_thread() { return warp_of_group() * 16 + static_cast<int>(threadIdx.x) % 32 / 4; }
__device__ inline int column_of_thread() { return static_cast<int>(threadIdx.x) % 4 * 2; }

/// Over the four threads that share a row.
__device__ inline float over_columns(float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

/// What is added to the sums of both tokens of a pair, but for the other one's weight.
struct ForwardTerms {
  float mass;
  float moment;
  float phi;
};

/// @param d difference / student, @param exponent of E. All near: the warp's |d| are in reach of the polynomial.
template <bool kAllNear>
__device__ ForwardTerms forward_terms(const ElementFactors& f, float d, float exponent) {
  const float e = exp2_approximate(exponent);
  const float moment = e * d;
  const float phi = moment * (d * f.phi_over_square(d));
  if constexpr (kAllNear) return {e, moment, phi};
  const float other = f.of_student(d, exponent);
  return {e, moment, fabsf(d) < f.near ? phi : fmaf(-f.nats, moment, other - e)};
}

/// The rows of a thread, and its sums of them.
struct ForwardRows {
  ForwardToken values[2];
  Sums sums[2];
};

/// Where a tile meets the diagonal.
struct Diagonal {
  int distance;  ///< of the thread's first row from its first column

  /// Of accumulator c of a fragment; pairs with row > column count.
  __device__ int row_minus_column(int fragment, int c) const { return distance + 8 * (c / 2) - 8 * fragment - c % 2; }
};

/// Sums of a thread's columns over all its rows.
template <int kElements>
struct ColumnSums {
  Sums values[kElements / 2];

  template <typename... Weight>
  __device__ void add(int element, const ForwardTerms& terms, Weight... weight) {
    values[element / 4 * 2 + element % 2].add(terms.mass, terms.moment, terms.phi, weight...);
  }
};

/// Of pairs that count for their rows only.
struct NoColumnSums {
  template <typename... Weight>
  __device__ void add(int /*element*/, const ForwardTerms& /*terms*/, Weight... /*weight*/) {}
};

template <bool kPartial, bool kAllNear, int kElements, typename Columns>
__device__ void add_fragments(const float (&difference)[kElements],
                              const float (&teacher)[kElements],
                              int first,
                              const ElementFactors& factors,
                              const ColumnPair* columns,
                              const Diagonal& diagonal,
                              ForwardRows& rows,
                              Columns& column_sums) {
#pragma unroll
  for (int n = first; n < first + kVoteFragments; ++n) {
    const ColumnPair pair = columns[4 * n];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const ForwardToken& row = rows.values[c / 2];
      const ForwardToken& column = c % 2 == 0 ? pair.first : pair.second;
      const float exponent = factors.exponent(teacher[4 * n + c], row.bias, column.bias);
      ForwardTerms terms = forward_terms<kAllNear>(factors, difference[4 * n + c], exponent);
      if (kPartial && diagonal.row_minus_column(n, c) <= 0) terms = {0, 0, 0};
      rows.sums[c / 2].add(terms.mass, terms.moment, terms.phi, column.weight);
      column_sums.add(4 * n + c, terms, row.weight);
    }
  }
}

/// The same for a plain head's pairs, all near: no bias, and all weights are 1.
template <int kElements, typename Columns>
__device__ void add_plain_fragments(const float (&difference)[kElements],
                                    const float (&teacher)[kElements],
                                    int first,
                                    const ElementFactors& factors,
                                    ForwardRows& rows,
                                    Columns& column_sums) {
#pragma unroll
  for (int i = 4 * first; i < 4 * (first + kVoteFragments); ++i) {
    const ForwardTerms terms = forward_terms<true>(factors, difference[i], teacher[i] * factors.teacher);
    rows.sums[i / 2 % 2].add(terms.mass, terms.moment, terms.phi);
    column_sums.add(i, terms);
  }
}

/// Turns the student's products of kVoteFragments into differences, less `mean` of the thread's rows. Returns the
/// farthest one of the thread.
template <int kElements>
__device__ float subtract_teacher(float (&student)[kElements],
                                  const float (&teacher)[kElements],
                                  int first,
                                  const float (&mean)[2]) {
  float largest[4] = {};  // four chains, which do not wait for each other
#pragma unroll
  for (int i = 4 * first; i < 4 * (first + kVoteFragments); ++i) {
    student[i] = student[i] - teacher[i] - mean[i / 2 % 2];
    largest[i % 4] = fmaxf(largest[i % 4], fabsf(student[i]));  // NaN passes: it reaches the sums through E
  }
  return fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
}

/// Adds all pairs to the sums of their rows and columns. Overwrites the student's products.
/// @tparam kPartial whether some do not count
/// @param is_plain whether they are a plain head's: its values of tokens are what they are for all
/// @param columns values of the thread's columns of fragment 0; those of fragment n are 4 n pairs further
template <bool kPartial, int kElements, typename Columns>
__device__ void add_pairs(float (&student)[kElements],
                          const float (&teacher)[kElements],
                          const ElementFactors& factors,
                          bool is_plain,
                          const ColumnPair* columns,
                          const Diagonal& diagonal,
                          ForwardRows& rows,
                          Columns& column_sums) {
  static_assert(kElements % (4 * kVoteFragments) == 0);
  constexpr float kNoMean[2] = {0, 0};
#pragma unroll
  for (int first = 0; first < kElements / 4; first += kVoteFragments) {
    if (!__all_sync(0xffffffffu, subtract_teacher(student, teacher, first, kNoMean) < factors.near)) {
      add_fragments<kPartial, false>(student, teacher, first, factors, columns, diagonal, rows, column_sums);
    } else if (!kPartial && is_plain) {
      add_plain_fragments(student, teacher, first, factors, rows, column_sums);
    } else {
      add_fragments<kPartial, true>(student, teacher, first, factors, columns, diagonal, rows, column_sums);
    }
  }
}

/// Weights of a pair, for both its tokens.
struct PairWeights {
  triangular::PairTerms terms;

  __device__ float operator()(float difference,
                              float product_teacher,
                              const BackwardToken& i,
                              const BackwardToken& j) const {
    const auto parts = terms(difference, product_teacher, i, j);
    return parts.e * (parts.first + parts.second);
  }
};

/// Weights of a plain head's pairs: what does not depend on the pair is added up before.
/// @tparam kBothSides whether the pair is one of the column's row, too
template <bool kBothSides>
struct PlainPairWeights {
  const ElementFactors& factors;
  float reference;  ///< the bias of all pairs

  __device__ float operator()(float difference,
                              float product_teacher,
                              const BackwardToken& i,
                              const BackwardToken& j) const {
    const float w = exp2_approximate(difference * factors.student);
    const float e = exp2_approximate(fmaf(product_teacher, factors.teacher, -reference));
    const float ratio = kBothSides ? i.row_ratio + j.row_ratio : i.row_ratio;
    const float row = kBothSides ? i.row + j.row : i.row;
    return e * fmaf(w, ratio, -row);
  }
};

/// H of all pairs, rounded and packed as the operand A of a sum over the columns: 16 of them for each step.
/// @param columns values of the thread's first column; @param self what a token's pair with itself counts
template <typename T, bool kPartial, typename Terms, int kElements>
__device__ void weigh_pairs(const float (&student)[kElements],
                            const float (&teacher)[kElements],
                            const Terms& terms,
                            const BackwardToken (&rows)[2],
                            const BackwardToken* columns,
                            const Diagonal& diagonal,
                            float self,
                            uint32_t (&h)[kElements / 8][4]) {
#pragma unroll
  for (int n = 0; n < kElements / 4; ++n) {
    const BackwardToken pair[2] = {columns[8 * n], columns[8 * n + 1]};
    float weights[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      weights[c] = terms(student[4 * n + c] - teacher[4 * n + c], teacher[4 * n + c], rows[c / 2], pair[c % 2]);
      if constexpr (kPartial) {
        const int distance = diagonal.row_minus_column(n, c);
        weights[c] = distance > 0 ? weights[c] : distance == 0 ? weights[c] * self : 0.f;
      }
    }
    h[n / 2][n % 2 * 2] = pack<T>(weights[0], weights[1]);
    h[n / 2][n % 2 * 2 + 1] = pack<T>(weights[2], weights[3]);
  }
}

}  // namespace linearard::cuda::sm90
