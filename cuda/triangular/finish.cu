#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/half_range.cuh"
#include "../common/launch.cuh"
#include "../common/rounding.cuh"
#include "../common/visibility.cuh"
#include "launch.h"

// The steps after the triangular kernels.

namespace linearard::cuda::triangular {
namespace {

constexpr int kThreads = 256;

constexpr double kLn2Wide = 0.69314718055994530942;

/// e^x - 1 - x, nats.
__device__ double phi_of(double x) { return phi(x); }

/// KL of a distribution against the one that it becomes when each probability is multiplied by e^x and the whole is
/// normalised, from a = E[e^x - 1], c = E[phi(x)] and m = E[x]: log E[e^x] - m.
__device__ double tilted_divergence(double a, double c, double m) {
  // a - log1p(a) is small where a is, and cancels where it is not.
  return fabs(a) < 0.5 ? c - (a - log1p(a)) : log1p(a) - m;
}

struct Row {
  double kl;
  double lse_student;
  double lse_teacher;
  double error;  ///< what the rounding of the sums may have done to kl
};

/// A row whose only key with a probability is its own.
__device__ Row own_row(const OwnLogit& own) {
  const double teacher = static_cast<double>(own.teacher) * kLn2Wide;
  return {0, teacher + static_cast<double>(own.difference) * kLn2Wide, teacher, 0};
}

/// A row out of its own logit and the sums over the others. With R the probability of the others,
///   KL(P || Q) = KL of own against others + R KL of the others among themselves,
/// a sum of two non-negative terms: the own logit, which moves differently from all others, cancels nowhere.
__device__ Row row_of(double mass, double moment, double phi_sum, const OwnLogit& own, double log2_unit) {
  // One float sum of tens of thousands of terms, and the terms themselves.
  constexpr double kRounding = 1.5e-6;
  const double own_teacher = static_cast<double>(own.teacher) * kLn2Wide;
  const double own_difference = static_cast<double>(own.difference) * kLn2Wide;
  const double a = (moment + phi_sum) / mass;
  const double c = phi_sum / mass;
  const double m = moment / mass;
  const double shift = log1p(a);  // of the others' log-sum-exp
  const double rest = tilted_divergence(a, c, m);
  const double rest_error = kRounding * (fabs(a) / (1 + a) * sqrt(2 * c) + m * m + c / (1 + a));

  // Log-odds of the others against the token itself.
  const double odds_teacher = log(mass) + log2_unit * kLn2Wide - own_teacher;
  const double moved = shift - own_difference;
  const double others = 1 / (1 + exp(-odds_teacher));
  const double own_a = others * expm1(moved);
  const double binary = tilted_divergence(own_a, others * phi_of(moved), others * moved);
  const double odds_student = odds_teacher + moved;
  const auto softplus = [](double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); };
  return {binary + others * rest, own_teacher + own_difference + softplus(odds_student),
          own_teacher + softplus(odds_teacher), others * rest_error};
}

/// Half of what is promised of a row: 1e-4 of it from 1e-3 nats, 1e-2 from 1e-6 nats.
__device__ double allowed_error(double kl) {
  if (kl >= 1e-3) return 0.5e-4 * kl;
  return fmax(0.5e-2 * kl, 0.5e-8);
}

__global__ void __launch_bounds__(kThreads) finish_forward_kernel(const __grid_constant__ FinishForwardParams p) {
  const int tokens = p.visibility.rows;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.batch) * p.heads * tokens) return;
  const int problem = static_cast<int>(index / tokens);
  const int token = static_cast<int>(index % tokens);
  const int keys = is_real(p.visibility.row_mask, tokens, problem / p.heads, token)
                       ? keys_of_row(p.visibility, problem / p.heads, token).count
                       : 0;
  Row row{0, 0, 0, 0};
  bool refine = false;
  if (keys > 1) {
    const float* sums = p.sums + static_cast<int64_t>(problem) * kSums * tokens + token;
    const double mass = sums[0];
    const double moment = sums[tokens] * static_cast<double>(p.factors.student) * kLn2;
    const double phi_sum = sums[2 * static_cast<int64_t>(tokens)];
    const double log2_unit = p.token_values[index].bias - kHeadroom / 2 + static_cast<double>(p.centers[problem]);
    // All others underflowed, on both sides: the row is its own token.
    row = mass == 0 && phi_sum == 0 ? own_row(p.own[index]) : row_of(mass, moment, phi_sum, p.own[index], log2_unit);
    // Not below: NaN is refined. A student that has lost nearly all of the others' mass: 1 + a has no digits.
    refine = p.wide_heads[problem] != 0 || !(row.error < allowed_error(row.kl)) || !(moment + phi_sum >= -0.98 * mass);
  } else if (keys == 1) {
    row = own_row(p.own[index]);
  }
  refine = refine || !(fabs(row.lse_student) + fabs(row.lse_teacher) < Base<float>::kHuge);
  p.kl[index] = static_cast<float>(fmax(row.kl, 0.0));
  p.lse_student[index] = static_cast<float>(row.lse_student);
  p.lse_teacher[index] = static_cast<float>(row.lse_teacher);
  if (refine) {
    const int place = atomicAdd(p.row_counts + problem, 1);
    p.row_lists[static_cast<int64_t>(problem) * tokens + place] = token;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_backward_kernel(const __grid_constant__ FinishBackwardParams p) {
  const int64_t per_head = static_cast<int64_t>(p.tokens) * p.dim;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.batch) * p.heads * per_head) return;
  const int64_t problem = index / per_head;
  if (p.wide_heads[problem] != 0) return;
  const float scale = static_cast<float>(p.output_scale) / half_range_scale(p.largest_grad);
  const float x = p.sums[index] * scale;
  static_cast<T*>(p.gradient)[index] = saturated_to<T>(x);
  if (!(fabsf(x) < Base<float>::kHuge)) {
    mark_redo(p.redo, problem, static_cast<int>(index % per_head / p.dim), p.tokens);
  }
}

template <typename Params>
cudaError_t launch_elements(void (*kernel)(const Params), const Params& params, int64_t elements, cudaStream_t stream) {
  return launch_blocks(kernel, params, (elements + kThreads - 1) / kThreads, kThreads, 0, stream);
}

}  // namespace

cudaError_t finish_forward(const FinishForwardParams& params, cudaStream_t stream) {
  return launch_elements(finish_forward_kernel, params, int64_t{params.batch} * params.heads * params.visibility.rows,
                         stream);
}

cudaError_t finish_backward(const FinishBackwardParams& params, cudaStream_t stream) {
  const int64_t elements = int64_t{params.batch} * params.heads * params.tokens * params.dim;
  return launch_elements(
      params.type == Scalar::kHalf ? finish_backward_kernel<__half> : finish_backward_kernel<__nv_bfloat16>, params,
      elements, stream);
}

}  // namespace linearard::cuda::triangular
