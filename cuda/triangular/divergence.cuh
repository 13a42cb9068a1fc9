#pragma once

#include "../common/device_math.cuh"

// The divergence of a row out of its sums in float, in double.

namespace linearard::cuda::triangular {

inline constexpr double kLn2Wide = 0.69314718055994530942;

/// e^x - 1 - x, nats.
__device__ inline double phi_of(double x) { return phi(x); }

/// KL of a distribution against the one that it becomes when each probability is multiplied by e^x and the whole is
/// normalised, from a = E[e^x - 1], c = E[phi(x)] and m = E[x]: log E[e^x] - m.
__device__ inline double tilted_divergence(double a, double c, double m) {
  // a - log1p(a) is small where a is, and cancels where it is not.
  return fabs(a) < 0.5 ? c - (a - log1p(a)) : log1p(a) - m;
}

/// What the rounding of the sums may have done to it.
__device__ inline double tilted_error(double a, double c, double m) {
  // One float sum of tens of thousands of terms, and the terms themselves.
  constexpr double kRounding = 1.5e-6;
  return kRounding * (fabs(a) / (1 + a) * sqrt(2 * c) + m * m + c / (1 + a));
}

/// Half of what is promised of a row: 1e-4 of it from 1e-3 nats, 1e-2 from 1e-6 nats.
__device__ inline double allowed_error(double kl) {
  if (kl >= 1e-3) return 0.5e-4 * kl;
  return fmax(0.5e-2 * kl, 0.5e-8);
}

}  // namespace linearard::cuda::triangular
