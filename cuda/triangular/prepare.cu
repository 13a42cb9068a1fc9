#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/device_math.cuh"
#include "../common/half_range.cuh"
#include "../common/launch.cuh"
#include "../common/visibility.cuh"
#include "launch.h"

// The steps before the triangular kernels: what a token contributes to all its pairs. It depends on extremes of the
// head.

namespace linearard::cuda::triangular {
namespace {

constexpr int kThreads = 512;
constexpr int kWarpsOfBlock = kThreads / 32;

/// The largest `x` of the block's threads; NaN does not count.
__device__ float largest_of_block(float x, float* scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < kWarpsOfBlock; ++w)
    x = fmaxf(x, scratch[w]);
  return x;
}

/// |x|^2 of one vector by a warp, exact but for the last rounding: it cancels against other logits.
template <typename T>
__device__ double square(const T* x, int dim) {
  double sum = 0;
  for (int d = static_cast<int>(threadIdx.x) % 32; d < dim; d += 32) {
    const auto value = static_cast<float>(x[d]);
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  return sum;
}

/// Logits of the tokens with themselves, a warp for each, and the largest of each head.
template <typename T>
__global__ void __launch_bounds__(kThreads) own_logits_kernel(const __grid_constant__ PrepareForwardParams p) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= static_cast<int64_t>(p.batch) * p.heads * p.tokens) return;
  const int problem = static_cast<int>(index / p.tokens);
  const int token = static_cast<int>(index % p.tokens);
  const int batch = problem / p.heads;
  OwnLogit own{0, 0};
  if (is_real(p.mask, p.tokens, batch, token)) {
    constexpr double kUnit = Base<float>::kUnit;
    const T* student = head_of<T>(p.student, batch, problem % p.heads) + token * p.student.token_stride;
    const T* teacher = head_of<T>(p.teacher, batch, problem % p.heads) + token * p.teacher.token_stride;
    const double t = p.scale_teacher * kUnit * square(teacher, p.teacher.dim);
    const double s = p.scale_student * kUnit * square(student, p.student.dim);
    own = {static_cast<float>(t), static_cast<float>(s - t)};
  }
  if (threadIdx.x % 32 != 0) return;
  p.own[index] = own;
  // Floats that are not negative are ordered as integers are; NaN is above all of them.
  atomicMax(p.largest + problem, __float_as_int(fabsf(own.teacher)));
}

__global__ void __launch_bounds__(kThreads) forward_tokens_kernel(const __grid_constant__ PrepareForwardParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.batch) * p.heads * p.tokens) return;
  const int problem = static_cast<int>(index / p.tokens);
  const int token = static_cast<int>(index % p.tokens);
  const float largest = __int_as_float(p.largest[problem]);
  // Mid-range of t_ii / 2: both ends of 2^(t_ii / 2 - center) are as far from float's.
  const float center = largest / 4;
  const float half = p.own[index].teacher / 2;
  const bool real = is_real(p.mask, p.tokens, problem / p.heads, token);
  p.token_values[index] = real ? ForwardToken{half - kHeadroom / 2, exp2f(half - center)} : ForwardToken{0, 0};
  if (token == 0) {
    p.centers[problem] = center;
    p.wide_heads[problem] = largest < kLargestSpread * kLog2E ? 0 : 1;
  }
}

/// Farthest apart that the two log-sum-exps of a row may lie, nats: 2^(s - t) must not overflow where a probability is
/// left.
constexpr float kLargestShift = 40.f;
/// Beyond them a row's weight loses digits.
constexpr float kSmallestRow = 1e-37f;
constexpr float kLargestRow = 1e37f;

/// A block of threads serves a head.
__global__ void __launch_bounds__(kThreads) prepare_backward_kernel(const __grid_constant__ PrepareBackwardParams p) {
  __shared__ float scratch[kWarpsOfBlock];
  const int problem = static_cast<int>(blockIdx.x);
  const int tokens = p.visibility.rows;
  const int64_t first = static_cast<int64_t>(problem) * tokens;
  float highest = -INFINITY;
  float negated_lowest = -INFINITY;
  float shift = 0;
  for (int token = static_cast<int>(threadIdx.x); token < tokens; token += kThreads) {
    if (!is_real(p.visibility.row_mask, tokens, problem / p.heads, token)) continue;
    const float lse = p.lse_teacher[first + token];
    highest = fmaxf(highest, lse);
    negated_lowest = fmaxf(negated_lowest, -lse);
    shift = fmaxf(shift, fabsf(p.lse_student[first + token] - lse));
  }
  highest = largest_of_block(highest, scratch);
  const float lowest = -largest_of_block(negated_lowest, scratch);
  shift = largest_of_block(shift, scratch);
  const float center = (highest + lowest) / 4 * kLog2E;
  const float scale = half_range_scale(p.largest_grad);
  float extreme = 0;
  for (int token = static_cast<int>(threadIdx.x); token < tokens; token += kThreads) {
    BackwardToken value{0, 0, 0, 0};
    if (is_real(p.visibility.row_mask, tokens, problem / p.heads, token)) {
      const float half = p.lse_teacher[first + token] / 2 * kLog2E;
      // A row that sees one key has no divergence, whatever it is.
      const bool has_gradient = keys_of_row(p.visibility, problem / p.heads, token).count > 1;
      const float weight = has_gradient ? p.grad_kl[first + token] * scale : 0.f;
      value.bias = half - kHeadroom / 2;
      value.key = exp2f(half - center - kHeadroom / 2);
      value.row = weight * exp2f(center - half - kHeadroom / 2);
      value.row_ratio = value.row * exp2f((p.lse_teacher[first + token] - p.lse_student[first + token]) * kLog2E);
      if (value.row != 0 && !(fabsf(value.row_ratio) > kSmallestRow && fabsf(value.row_ratio) < kLargestRow)) extreme = 1;
    }
    p.token_values[first + token] = value;
  }
  extreme = largest_of_block(extreme, scratch);
  if (threadIdx.x == 0) {
    p.wide_heads[problem] = highest - lowest < kLargestSpread && shift < kLargestShift && extreme == 0 ? 0 : 1;
  }
}

}  // namespace

cudaError_t prepare_forward(const PrepareForwardParams& params, cudaStream_t stream) {
  const int64_t tokens = int64_t{params.batch} * params.heads * params.tokens;
  const auto blocks_for = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  const auto kernel =
      params.teacher.type == Scalar::kHalf ? own_logits_kernel<__half> : own_logits_kernel<__nv_bfloat16>;
  const cudaError_t error = launch_blocks(kernel, params, blocks_for(32 * tokens), kThreads, 0, stream);
  if (error != cudaSuccess) return error;
  return launch_blocks(forward_tokens_kernel, params, blocks_for(tokens), kThreads, 0, stream);
}

cudaError_t prepare_backward(const PrepareBackwardParams& params, cudaStream_t stream) {
  return launch_blocks(prepare_backward_kernel, params, int64_t{params.batch} * params.heads, kThreads, 0, stream);
}

}  // namespace linearard::cuda::triangular
