#pragma once

#include <array>
#include <atomic>
#include <climits>
#include <cstddef>
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

/// Whether the current device runs the code that waits by itself: it is compiled for sm_90a, and for no other device
/// that could.
inline bool kernels_can_overlap() {
#ifdef LINEARARD_WITH_SM90A
  constexpr int kDevices = 64;
  static std::array<std::atomic<int8_t>, kDevices> known{};  // 0: not asked yet; every launch comes here
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  std::atomic<int8_t>& answer = known[static_cast<size_t>(device)];
  if (answer == 0) {
    int major = 0;
    int minor = 0;
    const bool is_hopper = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                           major == 9 && minor == 0;
    answer = is_hopper ? 1 : -1;
  }
  return answer == 1;
#else
  return false;
#endif
}

/// The same for a kernel all of whose threads call wait_for_kernels_ahead: on Hopper its blocks begin while the kernel
/// ahead of it in the stream still runs, or ends (programmatic dependent launch).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...),
                               dim3 grid,
                               int threads,
                               int shared_bytes,
                               cudaStream_t stream,
                               const Arguments&... arguments) {
  if (!kernels_can_overlap()) return launch_kernel(kernel, grid, threads, shared_bytes, stream, arguments...);
  if (shared_bytes > 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
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

/// Likewise, with launch_overlapping.
template <typename Params>
cudaError_t launch_overlapping_blocks(void (*kernel)(const Params),
                                      const Params& params,
                                      int64_t blocks,
                                      int threads,
                                      int shared_bytes,
                                      cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream, params);
}

}  // namespace linearard::cuda
