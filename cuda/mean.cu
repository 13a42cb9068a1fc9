#include <algorithm>

#include "common/launch.cuh"
#include "launch.h"

namespace linearard::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kAtOnce = 16;                         ///< numbers of a thread that are on their way together
constexpr int64_t kAlone = 2 * kThreads * kAtOnce;  ///< up to so many, one block is faster than two launches

/// The sum of the block's threads, in an order that does not change; of use to thread 0 only.
__device__ double sum_of_block(double x, double* scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kThreads / 32; ++w)
    x += scratch[w];
  return x;
}

__device__ double cut(double x, double limit) { return x > limit ? limit : (x < -limit ? -limit : x); }  // NaN stays

/// Sums of the blocks' shares, or, by a grid of one block, the mean of `count` numbers whose sums these are.
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ MeanParams p, const Real* values, int64_t terms) {
  __shared__ double scratch[kThreads / 32];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  double sum = 0;
#pragma unroll kAtOnce
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < terms; i += stride)
    sum += static_cast<double>(values[i]);
  sum = sum_of_block(sum, scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1) {
    p.partial[blockIdx.x] = sum;
  } else if (p.type == Scalar::kDouble) {
    *static_cast<double*>(p.mean) = cut(sum / static_cast<double>(p.count), 1.7976931348623157e308);
  } else {
    *static_cast<float*>(p.mean) = static_cast<float>(cut(sum / static_cast<double>(p.count), 3.4028234663852886e38));
  }
}

template <typename Real>
cudaError_t launch_mean(const MeanParams& p, cudaStream_t stream) {
  const auto* values = static_cast<const Real*>(p.values);
  if (p.count <= kAlone) return launch_kernel(sum_kernel<Real>, dim3(1), kThreads, 0, stream, p, values, p.count);
  const int blocks =
      static_cast<int>(std::min<int64_t>(kMeanPartials, (p.count + kThreads * kAtOnce - 1) / (kThreads * kAtOnce)));
  const cudaError_t error =
      launch_kernel(sum_kernel<Real>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p, values, p.count);
  if (error != cudaSuccess) return error;
  const double* partial = p.partial;
  return launch_kernel(sum_kernel<double>, dim3(1), kThreads, 0, stream, p, partial, int64_t{blocks});
}

}  // namespace

cudaError_t mean(const MeanParams& params, cudaStream_t stream) {
  return params.type == Scalar::kDouble ? launch_mean<double>(params, stream) : launch_mean<float>(params, stream);
}

}  // namespace linearard::cuda
