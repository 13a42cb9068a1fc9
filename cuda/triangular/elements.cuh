#pragma once

#include "../common/device_math.cuh"
#include "params.h"

// The arithmetic of pairs, on accumulator fragments: a warp's 16 rows x 8 columns are 4 floats of each thread; [0] and
// [1] belong to row lane / 4, [2] and [3] to row lane / 4 + 8; [0] and [2] to column 2 (lane % 4), [1] and [3] to the
// next one. mma.sync and wgmma share this layout.

namespace linearard::cuda::triangular {

inline constexpr int kChunkGroups = 4;  ///< fragments side by side that are weighed together: 32 columns
inline constexpr int kChunkColumns = 8 * kChunkGroups;

/// phi(x) / x^2 = 1/2 + a x + b x^2 + c x^3 + d x^4 for |x| < kPhiReach nats, off by at most 2.7e-7 of itself: the
/// polynomial that is exact at 0 and errs least. Its reach decides how often a warp does without a second exponential.
/// Where logits move together, the divergence is a small part of the sum of phi, and its error many times this one.
inline constexpr float kPhiReach = 0.4f;
inline constexpr float kPhiA = 0.166665126f;
inline constexpr float kPhiB = 0.0416668416f;
inline constexpr float kPhiC = 0.00837271642f;
inline constexpr float kPhiD = 0.00139108745f;

/// Factors of one call, with the coefficients of phi for differences of raw products.
struct ElementFactors {
  float teacher;
  float student;
  float excess;
  float nats;  ///< student in nats
  float near;  ///< |d| below it: the polynomial serves
  float k2, k3, k4, k5, k6;

  __device__ explicit ElementFactors(const LogitFactors& f)
      : teacher(f.teacher),
        student(f.student),
        excess(f.excess),
        nats(f.student * kLn2),
        near(kPhiReach / nats),
        k2(nats * nats / 2),
        k3(nats * nats * nats * kPhiA),
        k4(nats * nats * nats * nats * kPhiB),
        k5(nats * nats * nats * nats * nats * kPhiC),
        k6(nats * nats * nats * nats * nats * nats * kPhiD) {}

  /// (s - t) / student
  __device__ float difference(float product_student, float product_teacher) const {
    return fmaf(product_teacher, excess, product_student - product_teacher);
  }
  /// phi(x) / d^2, |d| < near
  __device__ float phi_over_square(float d) const { return fmaf(d, fmaf(d, fmaf(d, fmaf(d, k6, k5), k4), k3), k2); }
  /// E of the student's side, e^x E: it counts where the teacher's has underflowed. What the sum of the exponents loses
  /// by rounding, up to 4e-6 at -64, is put back: of phi(x) = e^x - 1 - x it would be 5e-5 where x is 0.4.
  __device__ float of_student(float d, float exponent) const {
    const float sum = fmaf(d, student, exponent);
    const float e = Base<float>::exp(sum);
    return fmaf(e * kLn2, fmaf(d, student, exponent - sum), e);
  }
  __device__ OwnLogit own_logit(float product_student, float product_teacher) const {
    return {product_teacher * teacher, difference(product_student, product_teacher) * student};
  }
  /// Of E of a pair.
  __device__ float exponent(float product_teacher, float row_bias, float column_bias) const {
    return fmaf(product_teacher, teacher, -column_bias) - row_bias;
  }
};

/// Sums of one token over others.
struct Sums {
  float mass = 0;
  float moment = 0;
  float phi = 0;

  __device__ void add(float e, float moment_of_e, float phi_of_e, float weight) {
    mass = fmaf(e, weight, mass);
    moment = fmaf(moment_of_e, weight, moment);
    phi = fmaf(phi_of_e, weight, phi);
  }
  /// With weight 1.
  __device__ void add(float e, float moment_of_e, float phi_of_e) {
    mass += e;
    moment += moment_of_e;
    phi += phi_of_e;
  }
};

/// Two neighbouring columns as a thread reads them.
struct alignas(16) ColumnPair {
  ForwardToken first;
  ForwardToken second;
};

/// Replaces the products of a chunk by the differences d (student) and the exponents of E (teacher). Returns whether
/// the polynomial of phi serves for all of the warp's pairs.
template <int kSlabs, typename ColumnOf>
__device__ bool prepare_chunk(float (&student)[kSlabs][kChunkGroups][4],
                              float (&teacher)[kSlabs][kChunkGroups][4],
                              const ForwardToken (&rows)[kSlabs][2],
                              const ColumnOf& column,
                              const ElementFactors& factors) {
  float largest = 0;
#pragma unroll
  for (int n = 0; n < kChunkGroups; ++n) {
    const ColumnPair pair = column(n);
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float t = teacher[m][n][c];
        const float d = factors.difference(student[m][n][c], t);
        student[m][n][c] = d;
        teacher[m][n][c] = factors.exponent(t, rows[m][c / 2].bias, c % 2 == 0 ? pair.first.bias : pair.second.bias);
        largest = fmaxf(largest, fabsf(d));  // NaN passes: it reaches the sums through E
      }
    }
  }
  return __all_sync(0xffffffffu, largest < factors.near);
}

template <bool kColumns, bool kPartial, bool kNear, int kSlabs, typename ColumnOf>
__device__ void add_pairs(const float (&difference)[kSlabs][kChunkGroups][4],
                          const float (&exponent)[kSlabs][kChunkGroups][4],
                          const ForwardToken (&rows)[kSlabs][2],
                          const ColumnOf& column,
                          const uint8_t (&seen)[kSlabs][kChunkGroups],
                          const ElementFactors& factors,
                          Sums (&row_sums)[kSlabs][2],
                          Sums (&column_sums)[2 * kChunkGroups]) {
#pragma unroll
  for (int n = 0; n < kChunkGroups; ++n) {
    const ColumnPair pair = column(n);
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float d = difference[m][n][c];
        float e = Base<float>::exp(exponent[m][n][c]);
        float moment = e * d;
        float phi = moment * (d * factors.phi_over_square(d));
        if constexpr (!kNear) {
          const float other = factors.of_student(d, exponent[m][n][c]);
          phi = fabsf(d) < factors.near ? phi : fmaf(-factors.nats, moment, other - e);
        }
        if (kPartial && (seen[m][n] >> c & 1u) == 0) e = moment = phi = 0;
        row_sums[m][c / 2].add(e, moment, phi, c % 2 == 0 ? pair.first.weight : pair.second.weight);
        if constexpr (kColumns) column_sums[2 * n + c % 2].add(e, moment, phi, rows[m][c / 2].weight);
      }
    }
  }
}

/// Adds a chunk of pairs to the sums of its rows and, if kColumns, of its columns. Overwrites the products.
/// @param seen bit c of seen[m][n]: whether the pair counts; read only if kPartial
/// @param column (n): the tokens of the thread's two columns of fragment n
template <bool kColumns, bool kPartial, int kSlabs, typename ColumnOf>
__device__ void add_chunk(float (&student)[kSlabs][kChunkGroups][4],
                          float (&teacher)[kSlabs][kChunkGroups][4],
                          const ForwardToken (&rows)[kSlabs][2],
                          const ColumnOf& column,
                          const uint8_t (&seen)[kSlabs][kChunkGroups],
                          const ElementFactors& factors,
                          Sums (&row_sums)[kSlabs][2],
                          Sums (&column_sums)[2 * kChunkGroups]) {
  if (prepare_chunk(student, teacher, rows, column, factors)) {
    add_pairs<kColumns, kPartial, true>(student, teacher, rows, column, seen, factors, row_sums, column_sums);
  } else {
    add_pairs<kColumns, kPartial, false>(student, teacher, rows, column, seen, factors, row_sums, column_sums);
  }
}

/// Column of a chunk whose sums this thread holds after reduce_columns.
__device__ inline int reduced_column() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int local = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
  return local / 2 * 8 + 2 * (lane % 4) + local % 2;
}

/// One step of the sum over the 8 threads that share columns: a thread keeps half of its columns and gives the others
/// away, so that all three steps take 7 exchanges a sum and not 24.
template <int kKept>
__device__ void exchange_half(Sums (&sums)[2 * kChunkGroups], int lanes) {
  const bool upper = (static_cast<int>(threadIdx.x) & lanes) != 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const auto exchange = [&](float& low, float high) {
      const float kept = upper ? high : low;
      const float given = upper ? low : high;
      low = kept + __shfl_xor_sync(0xffffffffu, given, lanes);
    };
    exchange(sums[i].mass, sums[i + kKept].mass);
    exchange(sums[i].moment, sums[i + kKept].moment);
    exchange(sums[i].phi, sums[i + kKept].phi);
  }
}

/// Over the warp's rows; the result is of column reduced_column().
__device__ inline Sums reduce_columns(Sums (&sums)[2 * kChunkGroups]) {
  static_assert(kChunkGroups == 4, "three halvings leave one column");
  exchange_half<4>(sums, 16);
  exchange_half<2>(sums, 8);
  exchange_half<1>(sums, 4);
  return sums[0];
}

/// What a pair adds to H: as a row of the first token, and as a row of the second one.
struct PairTerms {
  const ElementFactors& factors;

  struct Parts {
    float e;
    float first;   ///< (w row_ratio_i - row_i) key_j
    float second;  ///< (w row_ratio_j - row_j) key_i
  };

  /// @param difference of the logits / student
  __device__ Parts operator()(float difference,
                              float product_teacher,
                              const BackwardToken& i,
                              const BackwardToken& j) const {
    const float w = Base<float>::exp(difference * factors.student);
    return {Base<float>::exp(factors.exponent(product_teacher, i.bias, j.bias)), fmaf(w, i.row_ratio, -i.row) * j.key,
            fmaf(w, j.row_ratio, -j.row) * i.key};
  }
};

}  // namespace linearard::cuda::triangular
