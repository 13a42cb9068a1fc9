#pragma once

#include "block.h"

// Twin of cuda/common/launch.cuh.

namespace linearard::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...),
                          dim3 grid,
                          int threads,
                          int shared_bytes,
                          cudaStream_t /*stream*/,
                          const Arguments&... arguments) {
  emulation::run_grid(grid, dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared_bytes),
                      [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...),
                               dim3 grid,
                               int threads,
                               int shared_bytes,
                               cudaStream_t stream,
                               const Arguments&... arguments) {
  return launch_kernel(kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace linearard::cuda
