#pragma once

#include <cmath>

#include "instructions.cuh"

// Functions of one logit, in base 2 for float (the exponential unit computes 2^x) and in base e for double. A logit l
// in nats is l * unit<Real>() here.

namespace linearard::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

template <typename Real>
struct Base;

template <>
struct Base<float> {
  static constexpr double kUnit = 1.4426950408889634;  ///< logits per nat
  static constexpr float kNats = 0.6931471805599453f;  ///< nats per logit unit
  static constexpr float kHuge = 1e30f;                ///< beyond it a result is not trusted
  static constexpr float kLargestExponent = 90.f;
  __device__ static float exp(float x) { return exp2_approximate(x); }
  __device__ static float log(float x) { return log2f(x); }
  /// To 2 units in the last place, without the slow path of IEEE division; 0 for divisors beyond 2^126.
  __device__ static float divide(float x, float y) { return __fdividef(x, y); }

  /// phi(x) / x^2 by its series, phi(x) = e^x - 1 - x in nats; |x| < kSeries.
  static constexpr float kSeries = 0.36f;
  __device__ static float phi_series(float x) {
    constexpr float c2 = 0.24022650695910072f, c3 = 0.05550410866482158f, c4 = 0.009618129107628477f,
                    c5 = 0.0013333558146428443f, c6 = 0.00015403530393381608f;
    return x * x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * c6))));
  }
  /// e^x - 1, |x| < kSeries
  __device__ static float expm1_series(float x) {
    constexpr float c1 = 0.6931471805599453f, c2 = 0.24022650695910072f, c3 = 0.05550410866482158f,
                    c4 = 0.009618129107628477f, c5 = 0.0013333558146428443f;
    return x * (c1 + x * (c2 + x * (c3 + x * (c4 + x * c5))));
  }
  /// 1 - e^-a, 0 <= a < kSeries
  __device__ static float decay_series(float a) { return -expm1_series(-a); }
};

template <>
struct Base<double> {
  static constexpr double kUnit = 1;
  static constexpr double kNats = 1;
  static constexpr double kHuge = 1e300;
  static constexpr double kLargestExponent = 600;
  __device__ static double exp(double x) { return ::exp(x); }
  __device__ static double log(double x) { return ::log(x); }
  __device__ static double divide(double x, double y) { return x / y; }

  static constexpr double kSeries = 0.03125;
  __device__ static double phi_series(double x) {
    double sum = 1.0 / 3628800;  // x^10 / 10!: the next term is below 1e-20 of the first
    sum = sum * x + 1.0 / 362880;
    sum = sum * x + 1.0 / 40320;
    sum = sum * x + 1.0 / 5040;
    sum = sum * x + 1.0 / 720;
    sum = sum * x + 1.0 / 120;
    sum = sum * x + 1.0 / 24;
    sum = sum * x + 1.0 / 6;
    sum = sum * x + 0.5;
    return x * x * sum;
  }
  __device__ static double decay_series(double a) { return -::expm1(-a); }
};

/// phi(x) = e^x - 1 - x, nats, for a shift of a row's reference.
template <typename Real>
__device__ Real phi(Real x) {
  using B = Base<Real>;
  return fabs(x) < B::kSeries ? B::phi_series(x) : B::exp(x) - 1 - x * B::kNats;
}

/// 1 - e^-a, a >= 0.
template <typename Real>
__device__ Real one_minus_exp(Real a) {
  using B = Base<Real>;
  return a < B::kSeries ? B::decay_series(a) : 1 - B::exp(-a);
}

/// Q - P out of log P and r = log Q / P: the larger of the two probabilities times 1 - e^-|r|, so that a small
/// difference keeps its digits and nothing overflows. A probability is at most 1, also where huge logits are rounded.
template <typename Real>
__device__ Real probability_difference(Real log_teacher, Real r) {
  const Real larger = Base<Real>::exp(fmin(log_teacher + fmax(r, Real(0)), Real(0)));
  return copysign(larger * one_minus_exp(fabs(r)), r);
}

/// The same where |r| < kSeries.
__device__ inline float near_probability_difference(float log_teacher, float r) {
  return Base<float>::exp(fminf(log_teacher, 0.f)) * Base<float>::expm1_series(r);
}

/// The running sums of a row over its keys: log-sum-exps of both sides, and the divergence KL(P || Q) without
/// cancellation. With h = E_P[s - t], the mean over the keys seen so far, E_P[s - t - h] = 0 and
///   KL = log E_P[exp(s - t - h)] = log1p(E_P[phi(s - t - h)]),   phi(x) = e^x - 1 - x >= 0:
/// a sum of positive terms that are small when the divergence is. Later keys move h by k, and
///   E_P[phi(x - k)] = e^-k E_P[phi(x)] + phi(-k)       (E_P[x] = 0)
/// is again a sum of positive terms. Where k is large, or the student has mass where the teacher has none (the gap
/// between their largest logits), that sum would overflow on the way; there it follows from the student's own sum, and
/// a divergence that stays that large is the plain difference lse_s - lse_t - h, which has digits enough.
template <typename Real>
struct RowSums {
  using B = Base<Real>;
  static constexpr Real kFarDivergence = 1;                              ///< nats
  static constexpr Real kFarGap = static_cast<Real>(20 * B::kUnit);      ///< of the largest logits, centered
  static constexpr Real kLargeShift = static_cast<Real>(4 * B::kUnit);   ///< of the mean
  static constexpr Real kLargeRatio = static_cast<Real>(16 * B::kUnit);  ///< of one key

  Real max_teacher = -INFINITY;
  Real sum_teacher = 0;  ///< of exp(t - max_teacher)
  Real max_student = -INFINITY;
  Real sum_student = 0;  ///< of exp(s - max_student), of this thread's keys
  Real mean = 0;         ///< h
  Real sum_phi = 0;      ///< of exp(t - max_teacher) phi(s - t - h), of this thread's keys
  bool far = false;      ///< the last tile left a gap: sum_phi is not to be used

  __device__ static Real reference(Real maximum) { return maximum == -INFINITY ? Real(0) : maximum; }
  __device__ Real gap() const { return reference(max_student) - reference(max_teacher) - mean; }

  /// A tile's keys come, with these maxima of the row.
  __device__ void raise(Real teacher, Real student) {
    far = gap() > kFarGap;
    const Real new_teacher = fmax(max_teacher, teacher);
    const Real shrink = B::exp(max_teacher - reference(new_teacher));
    sum_teacher *= shrink;
    sum_phi *= shrink;
    max_teacher = new_teacher;
    const Real new_student = fmax(max_student, student);
    sum_student *= B::exp(max_student - reference(new_student));
    max_student = new_student;
  }

  /// @param tile_sum sum of exp(t - max) over the tile's keys, @param tile_moment the same times s - t - h, both of the
  /// whole row; @param first whether this thread is the first of the row's. Returns k.
  __device__ Real recenter(Real tile_sum, Real tile_moment, bool first) {
    const Real total = sum_teacher + tile_sum;
    const Real shift = total > 0 ? B::divide(tile_moment, total) : Real(0);
    mean += shift;
    if (far || fabs(shift) > kLargeShift) {
      sum_phi = sum_student * student_factor();
      if (first) sum_phi -= sum_teacher * (1 - shift * B::kNats);
    } else {
      sum_phi *= B::exp(-shift);
      if (first) sum_phi += sum_teacher * phi(-shift);
    }
    sum_teacher = total;
    return shift;
  }

  /// exp(s - max_student) times this is exp(t - max_teacher) exp(s - t - h).
  __device__ Real student_factor() const { return B::exp(fmin(gap(), B::kLargestExponent)); }

  /// One key's part of sum_phi where |x| < kSeries; x = s - t - h.
  __device__ static Real near_term(Real exp_teacher, Real x) { return exp_teacher * B::phi_series(x); }
  /// The same for any x; the student's side counts where the teacher's has underflowed.
  __device__ static Real phi_term(Real exp_teacher, Real exp_student, Real x, Real factor) {
    if (fabs(x) < B::kSeries) return near_term(exp_teacher, x);
    if (x < kLargeRatio) return exp_teacher * (B::exp(x) - 1 - x * B::kNats);
    return fmax(exp_student * factor - exp_teacher * (1 + x * B::kNats), Real(0));
  }

  __device__ Real lse_teacher() const { return (max_teacher + B::log(sum_teacher)) * B::kNats; }
  __device__ Real lse_student() const { return (max_student + B::log(sum_student)) * B::kNats; }
  /// After the threads' sums of the row have been added up.
  __device__ Real divergence() const {
    const Real c = sum_phi / sum_teacher;
    // Negative: logits so large that the gap itself is lost in rounding.
    if (c >= 0 && c < kFarDivergence && !(gap() > kFarGap)) return log1p(c);
    return lse_student() - lse_teacher() - mean * B::kNats;
  }
};

}  // namespace linearard::cuda
