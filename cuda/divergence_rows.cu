#include "divergence_rows.h"

// Row-wise kernels on logits that a matrix product has written: each reads its row once or a few times through the
// cache and keeps everything else in registers. Formulas: docs/mathematics.md.

namespace linearard::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kLargeRatio = 20.0F;  // beyond it P phi(r) and P expm1(r) are Q to the last bit of float

struct Sum {
  __device__ static float combine(float a, float b) { return a + b; }
  static constexpr float kIdentity = 0.0F;
};

struct Maximum {
  __device__ static float combine(float a, float b) { return fmaxf(a, b); }
  static constexpr float kIdentity = -3.402823466e38F;
};

/// The combination of all threads' values, in every thread.
template <typename Operation>
__device__ float reduce(float value, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = Operation::combine(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  __syncthreads();  // the previous reduction's values have been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float result = Operation::kIdentity;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp)
    result = Operation::combine(result, shared[warp]);
  return result;
}

/// expm1(x) - x to full relative precision near 0.
__device__ float phi(float x) {
  if (fabsf(x) > 0.35F) return expm1f(x) - x;
  float polynomial = 1.0F / 40320;
  polynomial = fmaf(polynomial, x, 1.0F / 5040);
  polynomial = fmaf(polynomial, x, 1.0F / 720);
  polynomial = fmaf(polynomial, x, 1.0F / 120);
  polynomial = fmaf(polynomial, x, 1.0F / 24);
  polynomial = fmaf(polynomial, x, 1.0F / 6);
  polynomial = fmaf(polynomial, x, 1.0F / 2);
  return x * x * polynomial;
}

__global__ void __launch_bounds__(kThreads) forward_kl_kernel(LogitRows logits, RowOutputs outputs) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  const float* teacher = logits.teacher + row * logits.keys;
  const float* delta = logits.delta + row * logits.keys;

  float max_teacher = Maximum::kIdentity;
  float max_student = Maximum::kIdentity;
  for (int64_t j = threadIdx.x; j < logits.keys; j += kThreads) {
    max_teacher = fmaxf(max_teacher, teacher[j]);
    max_student = fmaxf(max_student, teacher[j] + delta[j]);
  }
  max_teacher = reduce<Maximum>(max_teacher, shared);
  max_student = reduce<Maximum>(max_student, shared);

  float sum_teacher = 0;
  float sum_student = 0;
  for (int64_t j = threadIdx.x; j < logits.keys; j += kThreads) {
    sum_teacher += expf(teacher[j] - max_teacher);
    sum_student += expf(teacher[j] + delta[j] - max_student);
  }
  const float lse_teacher = max_teacher + logf(reduce<Sum>(sum_teacher, shared));
  const float lse_student = max_student + logf(reduce<Sum>(sum_student, shared));
  const float shift = lse_student - lse_teacher;

  // E_T[expm1(r)] is 0 but for the rounding of the shift, against which the divergence is corrected to second order.
  float mean_phi = 0;
  float mean_ratio = 0;
  for (int64_t j = threadIdx.x; j < logits.keys; j += kThreads) {
    const float log_teacher = teacher[j] - lse_teacher;
    const float ratio = delta[j] - shift;
    const float probability = expf(log_teacher);
    // Where the student has mass but the teacher's probability underflows.
    mean_phi += ratio > kLargeRatio ? expf(fminf(log_teacher + ratio, 0.0F)) : probability * phi(ratio);
    mean_ratio += probability * ratio;
  }
  mean_phi = reduce<Sum>(mean_phi, shared);
  mean_ratio = reduce<Sum>(mean_ratio, shared);
  if (threadIdx.x != 0) return;
  const float a = mean_phi + mean_ratio;
  // a - log1p(a) = a^2 / 2 - a^3 / 3 + ...; a large a comes of logits too large for float: then the direct sum.
  const float correction = a * a * (0.5F - a * (1.0F / 3));
  const float direct = mean_ratio > 0 ? 0.0F : -mean_ratio;
  outputs.kl[row] = fabsf(a) < 1e-2F ? mean_phi - correction : direct + (a - a);  // NaN stays
  outputs.lse_student[row] = lse_student;
  outputs.lse_teacher[row] = lse_teacher;
}

__global__ void __launch_bounds__(kThreads) forward_kl_gradient_kernel(LogitRows logits, GradientRows gradient) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  const float* teacher = logits.teacher + row * logits.keys;
  const float* delta = logits.delta + row * logits.keys;
  float* output = gradient.gradient + row * logits.keys;
  const float lse_teacher = gradient.lse_teacher[row];
  const float shift = gradient.lse_difference[row];
  const float weight = gradient.weight[row];
  const int64_t own = gradient.diagonal < 0 ? -1 : gradient.diagonal + row % gradient.rows_of_head;

  float sum = 0;
  for (int64_t j = threadIdx.x; j < logits.keys; j += kThreads) {
    const float ratio = delta[j] - shift;
    // The larger of P and Q, which rounding of huge logits could make larger than 1, times a bounded function of |r|.
    const float larger = expf(fminf(teacher[j] - lse_teacher + fmaxf(ratio, 0.0F), 0.0F));
    const float value = copysignf(weight * larger * -expm1f(-fabsf(ratio)), weight * ratio);
    if (j == own) continue;
    output[j] = value;
    sum += value;
  }
  if (own < 0) return;
  // A row of the gradient sums to zero: exact where Q - P of a saturated row is not.
  sum = reduce<Sum>(sum, shared);
  if (threadIdx.x == 0) output[own] = -sum;
}

}  // namespace

cudaError_t forward_kl_rows(const LogitRows& logits, const RowOutputs& outputs, cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  forward_kl_kernel<<<static_cast<unsigned>(logits.rows), kThreads, 0, stream>>>(logits, outputs);
  return cudaGetLastError();
}

cudaError_t forward_kl_gradient_rows(const LogitRows& logits, const GradientRows& gradient, cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  forward_kl_gradient_kernel<<<static_cast<unsigned>(logits.rows), kThreads, 0, stream>>>(logits, gradient);
  return cudaGetLastError();
}

}  // namespace linearard::cuda
