#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

// The kernels' entries: parameters in, a launch on `stream` out. All return the launch's error.

namespace linearard::cuda {

cudaError_t compute_ranges(const RangeParams& params, cudaStream_t stream);

/// Whether the tensor-core kernels take a call: one 16-bit type, dimensions up to 256, the forward KL. The
/// generic kernels take all others.
bool uses_tensor_cores(const ForwardParams& params);
bool uses_tensor_cores(const BackwardParams& params);

cudaError_t forward(const ForwardParams& params, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, cudaStream_t stream);

/// The generic kernels of float, or of double: as the only pass, for all blocks, or for the marked ones.
enum class Blocks { kAll, kMarked, kAllIfAnyIsMarked };
cudaError_t forward_in_double(const ForwardParams& params, Blocks blocks, cudaStream_t stream);
cudaError_t backward_in_double(const BackwardParams& params, Blocks blocks, cudaStream_t stream);

/// Before the generic kernels of inputs that are not float64, where the scales allow the difference form.
cudaError_t measure_closeness(const ClosenessParams& params, cudaStream_t stream);

/// Tiles of a call, for the plan.
struct TileShape {
  int rows;
  int columns;
};
TileShape tiles_of(const ForwardParams& params);

}  // namespace linearard::cuda
