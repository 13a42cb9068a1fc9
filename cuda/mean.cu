#include <algorithm>

#include "common/instructions.cuh"
#include "common/launch.cuh"
#include "means.h"

namespace linearard::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kAtOnce = 16;                         ///< numbers of a thread in a long list
constexpr int64_t kAlone = 2 * kThreads * kAtOnce;  ///< up to so many, one block is faster than two launches

__device__ double sum_of_warp(double x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

/// The sum of the block's threads, in an order that does not change; of use to thread 0 only.
__device__ double sum_of_block(double x, double* scratch) {
  static_assert(kThreads == 32 * 32, "a sum for each lane of the first warp");
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return threadIdx.x < 32 ? sum_of_warp(scratch[threadIdx.x]) : 0;
}

__device__ double cut(double x, double limit) { return x > limit ? limit : (x < -limit ? -limit : x); }  // NaN stays

constexpr double kLargestDouble = 1.7976931348623157e308;
constexpr double kLargestFloat = 3.4028234663852886e38;

/// Numbers that a thread reads together: 16 bytes.
template <typename Real>
struct alignas(16) Chunk {
  static constexpr int kNumbers = 16 / static_cast<int>(sizeof(Real));
  Real x[kNumbers];
};

/// Of the numbers that a grid of `blocks` blocks leaves to this thread. The order of the additions does not depend on
/// the list's address: only how it is read does.
template <typename Real>
__device__ double sum_of_thread(const Real* values, int64_t terms, int block, int blocks) {
  constexpr int kNumbers = Chunk<Real>::kNumbers;
  constexpr int kChunksAtOnce = 8;
  const bool aligned = reinterpret_cast<uintptr_t>(values) % sizeof(Chunk<Real>) == 0;
  const int64_t chunks = terms / kNumbers;
  const int64_t first = static_cast<int64_t>(block) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(blocks) * kThreads;
  double sum = 0;
#pragma unroll 1
  for (int64_t chunk = first; chunk < chunks; chunk += kChunksAtOnce * stride) {
    Chunk<Real> numbers[kChunksAtOnce];
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
      const int64_t at = chunk + i * stride;
      numbers[i] = {};
      if (at >= chunks) continue;
      if (aligned) {
        numbers[i] = reinterpret_cast<const Chunk<Real>*>(values)[at];
      } else {
#pragma unroll
        for (int e = 0; e < kNumbers; ++e)
          numbers[i].x[e] = values[at * kNumbers + e];
      }
    }
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
#pragma unroll
      for (int e = 0; e < kNumbers; ++e)
        sum += static_cast<double>(numbers[i].x[e]);
    }
  }
  const int64_t last = chunks * kNumbers + first;
  if (last < terms) sum += static_cast<double>(values[last]);
  return sum;
}

/// Sums of the blocks' shares of a list, the grid's second dimension; or, by one block for each list, its mean.
/// @tparam kOfPartials whether the sums of `blocks` shares are added up, instead of the numbers themselves
template <typename Real, bool kOfPartials>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ MeansParams p, int blocks) {
  __shared__ double scratch[kThreads / 32];
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  const int list = static_cast<int>(blockIdx.y);
  const Real* values = static_cast<const Real*>(p.values[list]);
  int64_t terms = p.counts[list];
  if constexpr (kOfPartials) {
    values = p.partial + static_cast<int64_t>(list) * kMeanPartials;
    terms = blocks;
  }
  const double sum =
      sum_of_block(sum_of_thread(values, terms, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)), scratch);
  if (threadIdx.x != 0) return;
  const double count = static_cast<double>(p.counts[list]);
  if (gridDim.x > 1) {
    p.partial[static_cast<int64_t>(list) * kMeanPartials + blockIdx.x] = sum;
  } else if (p.type == Scalar::kDouble) {
    static_cast<double*>(p.means)[list] = cut(sum / count, kLargestDouble);
    if (p.inverse_counts != nullptr) static_cast<double*>(p.inverse_counts)[list] = 1 / count;
  } else {
    static_cast<float*>(p.means)[list] = static_cast<float>(cut(sum / count, kLargestFloat));
    if (p.inverse_counts != nullptr) static_cast<float*>(p.inverse_counts)[list] = static_cast<float>(1 / count);
  }
}

__global__ void __launch_bounds__(32) quotient_kernel(const __grid_constant__ QuotientParams p) {
  wait_for_kernels_ahead();
  let_next_kernel_begin();
  if (threadIdx.x != 0) return;
  if (p.type == Scalar::kDouble) {
    *static_cast<double*>(p.result) = *static_cast<const double*>(p.number) / p.divisor;
  } else {
    *static_cast<float*>(p.result) = static_cast<float>(*static_cast<const float*>(p.number) / p.divisor);
  }
}

template <typename Real>
cudaError_t launch_means(const MeansParams& p, cudaStream_t stream) {
  const auto lists = static_cast<unsigned>(p.lists);
  const int64_t longest = *std::max_element(p.counts, p.counts + p.lists);
  if (longest <= kAlone) return launch_overlapping(sum_kernel<Real, false>, dim3(1, lists), kThreads, 0, stream, p, 1);
  const int blocks =
      static_cast<int>(std::min<int64_t>(kMeanPartials, (longest + kThreads * kAtOnce - 1) / (kThreads * kAtOnce)));
  const cudaError_t error = launch_overlapping(sum_kernel<Real, false>, dim3(static_cast<unsigned>(blocks), lists),
                                               kThreads, 0, stream, p, blocks);
  if (error != cudaSuccess) return error;
  return launch_overlapping(sum_kernel<double, true>, dim3(1, lists), kThreads, 0, stream, p, blocks);
}

}  // namespace

cudaError_t means(const MeansParams& params, cudaStream_t stream) {
  return params.type == Scalar::kDouble ? launch_means<double>(params, stream) : launch_means<float>(params, stream);
}

cudaError_t quotient(const QuotientParams& params, cudaStream_t stream) {
  return launch_overlapping(quotient_kernel, dim3(1), 32, 0, stream, params);
}

}  // namespace linearard::cuda
