#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

// The steps of a call on a self-relation. All return the launch's error.

namespace linearard::cuda::triangular {

/// Whether the kernels take a call: one 16-bit type, one dimension of at most 256 (backward: 128), aligned vectors,
/// positive scales, and the shared memory of the current device.
bool takes(const TriangularForwardParams& params);
bool takes(const TriangularBackwardParams& params);

cudaError_t prepare_forward(const PrepareForwardParams& params, cudaStream_t stream);
cudaError_t forward(const TriangularForwardParams& params, cudaStream_t stream);
cudaError_t finish_forward(const FinishForwardParams& params, cudaStream_t stream);
cudaError_t order_rows(const OrderRowsParams& params, cudaStream_t stream);

cudaError_t prepare_backward(const PrepareBackwardParams& params, cudaStream_t stream);
cudaError_t backward(const TriangularBackwardParams& params, cudaStream_t stream);
cudaError_t finish_backward(const FinishBackwardParams& params, cudaStream_t stream);

}  // namespace linearard::cuda::triangular
