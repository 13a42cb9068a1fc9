#pragma once

#include <climits>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace linearard::cuda {

/// The one place where kernels are launched: a one-dimensional grid, with as much dynamic shared memory as asked for.
template <typename Params>
cudaError_t launch_kernel(void (*kernel)(const Params),
                          const Params& params,
                          int64_t blocks,
                          int threads,
                          int shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kSharedBytesWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace linearard::cuda
