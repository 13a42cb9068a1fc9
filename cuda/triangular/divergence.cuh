#pragma once

#include "../common/device_math.cuh"

// The divergence of a row out of its sums in float, in double.

namespace linearard::cuda::triangular {

inline constexpr double kLn2Wide = 0.69314718055994530942;

/// e^x - 1 - x, nats. @param excess e^x - 1
__device__ inline double phi_of(double x, double excess) {
  return fabs(x) < Base<double>::kSeries ? Base<double>::phi_series(x) : excess - x;
}

/// KL of a distribution against the one that it becomes when each probability is multiplied by e^x and the whole is
/// normalised, from a = E[e^x - 1], c = E[phi(x)] and m = E[x]: log E[e^x] - m.
/// @param shift log(1 + a)
__device__ inline double tilted_divergence(double a, double c, double m, double shift) {
  // a - log(1 + a) is small where a is, and cancels where it is not.
  return fabs(a) < 0.5 ? c - (a - shift) : shift - m;
}

/// What the rounding of the sums may have done to it.
__device__ inline float tilted_error(double a, double c, double m) {
  // One float sum of tens of thousands of terms, and the terms themselves.
  constexpr float kRounding = 1.5e-6f;
  const auto inverse = 1 / static_cast<float>(1 + a);
  const auto of_c = static_cast<float>(c);
  const auto of_m = static_cast<float>(m);
  return kRounding * (fabsf(static_cast<float>(a)) * inverse * sqrtf(2 * of_c) + of_m * of_m + of_c * inverse);
}

/// Half of what is promised of a row: 1e-4 of it from 1e-3 nats, 1e-2 from 1e-6 nats.
__device__ inline double allowed_error(double kl) {
  if (kl >= 1e-3) return 0.5e-4 * kl;
  return fmax(0.5e-2 * kl, 0.5e-8);
}

}  // namespace linearard::cuda::triangular
