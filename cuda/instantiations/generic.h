#pragma once

#include "../launch.h"

namespace linearard::cuda::generic {

template <typename Real>
cudaError_t launch_forward(const ForwardParams& params, Blocks blocks, cudaStream_t stream);
template <typename Real>
cudaError_t launch_backward(const BackwardParams& params, Blocks blocks, cudaStream_t stream);

}  // namespace linearard::cuda::generic
