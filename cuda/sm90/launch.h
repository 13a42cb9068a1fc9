#pragma once

#include <cuda_runtime_api.h>

#include "../triangular/params.h"

// The triangular relation on Hopper GPUs (sm_90a): wgmma, and the copy engine for loads and additions.

namespace linearard::cuda {

/// Whether the kernels take a call on the current device: a GPU of compute capability 9.0 that they were compiled for,
/// no mask, one 16-bit type, one dimension, a multiple of 8 of at most 256 (triangular backward: 128), one scale, and
/// strides of whole pieces of 16 bytes.
bool sm90_takes(const TriangularForwardParams& params);
bool sm90_takes(const TriangularBackwardParams& params);

/// Errors of the launch; cudaErrorInvalidValue or cudaErrorNotSupported where the driver refuses a tensor map.
cudaError_t launch_triangular_forward_sm90(const TriangularForwardParams& params, cudaStream_t stream);
cudaError_t launch_triangular_backward_sm90(const TriangularBackwardParams& params, cudaStream_t stream);

}  // namespace linearard::cuda
