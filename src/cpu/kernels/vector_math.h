#pragma once

#include <cstdint>
#include <cstring>

// Vectors of the instruction set that this translation unit is compiled for, by the vector extension of GCC and
// Clang, and the functions of docs/mathematics.md on them. Everything is always_inline in an instruction-set
// specific namespace: nothing of it may be shared between translation units.

#ifndef LINEARARD_ISA
#error "compile tile_kernels.cpp once per instruction set with -DLINEARARD_ISA=generic|avx2|avx512"
#endif

#define LINEARARD_INLINE static inline __attribute__((always_inline))

namespace linearard::cpu::LINEARARD_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename Real>
struct VectorOf;

template <>
struct VectorOf<float> {
  using Bits = int32_t;
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorOf<double> {
  using Bits = int64_t;
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
};

template <typename Real>
using Vector = typename VectorOf<Real>::Type;
template <typename Real>
using Integers = typename VectorOf<Real>::Integers;
template <typename Real>
inline constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(Real));

template <typename Real>
LINEARARD_INLINE Vector<Real> load(const Real* from) {
  Vector<Real> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename Real>
LINEARARD_INLINE void store(Real* to, Vector<Real> value) {
  std::memcpy(to, &value, sizeof(value));
}

template <typename Real>
LINEARARD_INLINE Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

template <typename Real>
LINEARARD_INLINE Vector<Real> maximum(Vector<Real> a, Vector<Real> b) {
  return a > b ? a : b;
}

template <typename Real>
LINEARARD_INLINE double sum_of_lanes(Vector<Real> value) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes<Real>; ++lane)
    sum += static_cast<double>(value[lane]);
  return sum;
}

template <typename Real>
LINEARARD_INLINE Real maximum_of_lanes(Vector<Real> value) {
  Real best = value[0];
  for (int64_t lane = 1; lane < kLanes<Real>; ++lane)
    best = value[lane] > best ? value[lane] : best;
  return best;
}

/// 0, 1, 2, ... + first.
template <typename Real>
LINEARARD_INLINE Integers<Real> indices_from(int64_t first) {
  Integers<Real> result{};
  for (int64_t lane = 0; lane < kLanes<Real>; ++lane) {
    result[lane] = static_cast<typename VectorOf<Real>::Bits>(first + lane);
  }
  return result;
}

template <typename Real>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  static constexpr float kRound = 12582912.0F;  // 1.5 x 2^23: adding it leaves the rounded integer in the low bits
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kOne = 0x3f800000;
  static constexpr int32_t kHalfSquareRootOffset = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float kLn2High = 0.693359375F;               // exact products with |k| < 2^12
  static constexpr float kLn2Low = -2.12194440e-4F;
  static constexpr float kExpUnderflow = -87.0F;
  static constexpr float kExpOverflow = 80.0F;
  static constexpr float kTiny = 1.17549435e-38F;
  static constexpr int kExpTerms = 6;    // phi(r) / r^2 up to r^6: 1e-7 relative for |r| <= ln(2) / 2
  static constexpr int kAtanhTerms = 4;  // up to z^9: 2e-9 for |z| <= 0.172
};

template <>
struct FloatTraits<double> {
  static constexpr double kRound = 6755399441055744.0;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr int64_t kHalfSquareRootOffset = 0x3fe6a09e667f3bcd;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpUnderflow = -708.0;
  static constexpr double kExpOverflow = 700.0;
  static constexpr double kTiny = 2.2250738585072014e-308;
  static constexpr int kExpTerms = 12;
  static constexpr int kAtanhTerms = 10;
};

/// 1/2!, 1/3!, ...: coefficients of phi(r) / r^2.
inline constexpr double kInverseFactorials[] = {
    1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,         1.0 / 5040,        1.0 / 40320,
    1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800., 1.0 / 87178291200.};

/// x = power ln 2 + remainder, and 2^power.
template <typename Real>
struct Reduced {
  Vector<Real> remainder;
  Vector<Real> power_of_two;
};

/// For kExpUnderflow <= x <= kExpOverflow, or NaN (which stays in the remainder).
template <typename Real>
LINEARARD_INLINE Reduced<Real> reduce(Vector<Real> x) {
  using Traits = FloatTraits<Real>;
  constexpr Real kLog2E = static_cast<Real>(1.44269504088896340736);
  const Vector<Real> rounded = x * kLog2E + Traits::kRound;
  const Vector<Real> power = rounded - Traits::kRound;
  const Vector<Real> remainder = (x - power * Traits::kLn2High) - power * Traits::kLn2Low;
  Integers<Real> bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits << Traits::kMantissaBits) + Traits::kOne;
  Vector<Real> power_of_two;
  std::memcpy(&power_of_two, &bits, sizeof(bits));
  return {remainder, power_of_two};
}

/// phi(r) = expm1(r) - r for |r| <= ln(2) / 2, to full relative precision.
template <typename Real>
LINEARARD_INLINE Vector<Real> phi_of_remainder(Vector<Real> r) {
  constexpr int kTerms = FloatTraits<Real>::kExpTerms;
  Vector<Real> polynomial = broadcast(static_cast<Real>(kInverseFactorials[kTerms]));
#pragma GCC unroll 16
  for (int term = kTerms - 1; term >= 0; --term) {
    polynomial = polynomial * r + static_cast<Real>(kInverseFactorials[term]);
  }
  return r * r * polynomial;
}

/// exp(x) for x <= kExpOverflow; 0 below kExpUnderflow (no denormal results).
template <typename Real>
LINEARARD_INLINE Vector<Real> exponential(Vector<Real> x) {
  constexpr Real kLow = FloatTraits<Real>::kExpUnderflow;
  const Vector<Real> clamped = x < kLow ? broadcast(kLow) : x;
  const Reduced<Real> reduced = reduce<Real>(clamped);
  const Vector<Real> expm1_remainder = reduced.remainder + phi_of_remainder<Real>(reduced.remainder);
  const Vector<Real> result = reduced.power_of_two + reduced.power_of_two * expm1_remainder;
  return x < kLow ? Vector<Real>{} : result;
}

template <typename Real>
struct ExpFamily {
  Vector<Real> expm1;
  Vector<Real> phi;  ///< expm1(x) - x
};

/// expm1 and phi with full relative precision near 0; x is clamped to kExpOverflow from above. Below
/// kExpUnderflow expm1 is -1 to the last bit.
template <typename Real>
LINEARARD_INLINE ExpFamily<Real> exponential_family(Vector<Real> x) {
  using Traits = FloatTraits<Real>;
  const Vector<Real> upper = x > Traits::kExpOverflow ? broadcast(Traits::kExpOverflow) : x;
  const Vector<Real> clamped = upper < Traits::kExpUnderflow ? broadcast(Traits::kExpUnderflow) : upper;
  const Reduced<Real> reduced = reduce<Real>(clamped);
  const Vector<Real> phi_remainder = phi_of_remainder<Real>(reduced.remainder);
  const Vector<Real> expm1_remainder = reduced.remainder + phi_remainder;
  const Vector<Real> expm1_scaled = reduced.power_of_two * expm1_remainder + (reduced.power_of_two - Real(1));
  const auto unscaled = reduced.power_of_two == Real(1);
  return {unscaled ? expm1_remainder : expm1_scaled, unscaled ? phi_remainder : expm1_scaled - upper};
}

template <typename Real>
struct LogFamily {
  Vector<Real> log1p;
  Vector<Real> entropy;  ///< (1 + v) log1p(v) - v, >= 0
};

/// For -1 <= v <= 0, with full relative precision near 0. By atanh: with z = v / (2 + v), log1p(v) = 2 atanh(z) and
/// (1 + v) log1p(v) - v = 2 / (1 - z) (z atanh(z) + (atanh(z) - z)), where nothing cancels.
template <typename Real>
LINEARARD_INLINE LogFamily<Real> logarithm_family(Vector<Real> v) {
  using Traits = FloatTraits<Real>;
  const Vector<Real> unclamped = v + Real(1);
  const Vector<Real> sum = unclamped < Traits::kTiny ? broadcast(Traits::kTiny) : unclamped;  // NaN stays NaN
  Integers<Real> bits;
  std::memcpy(&bits, &sum, sizeof(bits));
  const Integers<Real> exponent = (bits - Traits::kHalfSquareRootOffset) >> Traits::kMantissaBits;
  bits -= exponent << Traits::kMantissaBits;
  Vector<Real> mantissa;  // in [sqrt(1/2), sqrt(2))
  std::memcpy(&mantissa, &bits, sizeof(bits));
  const auto near_zero = exponent == 0;
  const Vector<Real> numerator = near_zero ? v : mantissa - Real(1);
  const Vector<Real> z = numerator / (near_zero ? v + Real(2) : mantissa + Real(1));
  const Vector<Real> square = z * z;
  Vector<Real> polynomial = broadcast(static_cast<Real>(1.0 / (2 * Traits::kAtanhTerms + 1)));
#pragma GCC unroll 16
  for (int term = Traits::kAtanhTerms - 1; term >= 1; --term) {
    polynomial = polynomial * square + static_cast<Real>(1.0 / (2 * term + 1));
  }
  const Vector<Real> cubic = z * square * polynomial;  // atanh(z) - z
  const Vector<Real> atanh = z + cubic;
  const Vector<Real> power = __builtin_convertvector(exponent, Vector<Real>);
  const Vector<Real> log1p = Real(2) * atanh + power * Real(0.69314718055994530942);
  const Vector<Real> entropy_near = Real(2) / (Real(1) - z) * (z * atanh + cubic);
  return {log1p, near_zero ? entropy_near : sum * log1p - v};
}

}  // namespace linearard::cpu::LINEARARD_ISA
