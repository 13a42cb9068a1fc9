#pragma once

#include <climits>
#include <cstdint>

#include <cuda_runtime_api.h>

// The one place where a kernel is launched.

#ifdef LINEARARD_EMULATION

#include <emulation/launch.h>

#else

namespace linearard::cuda {

/// @param shared_bytes of dynamic shared memory. Returns the launch's error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...),
                          dim3 grid,
                          int threads,
                          int shared_bytes,
                          cudaStream_t stream,
                          const Arguments&... arguments) {
  if (shared_bytes > 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace linearard::cuda

#endif

namespace linearard::cuda {

/// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0;
  int count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known && count > 0 ? count : 128;
}

/// The same for a grid of one dimension that may be too large, or empty.
template <typename Params>
cudaError_t launch_blocks(void (*kernel)(const Params),
                          const Params& params,
                          int64_t blocks,
                          int threads,
                          int shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream, params);
}

}  // namespace linearard::cuda
