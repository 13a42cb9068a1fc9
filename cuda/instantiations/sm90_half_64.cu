#include "../sm90/launch.cuh"

namespace linearard::cuda::sm90 {

template cudaError_t launch_forward<__half, 64>(const TriangularForwardParams&, int, cudaStream_t);
template cudaError_t launch_backward<__half, 64>(const TriangularBackwardParams&, int, cudaStream_t);

}  // namespace linearard::cuda::sm90
