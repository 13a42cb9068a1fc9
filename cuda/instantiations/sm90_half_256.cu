#include "../sm90/launch.cuh"

namespace linearard::cuda::sm90 {

template cudaError_t launch_forward<__half, 256>(const TriangularForwardParams&, int, cudaStream_t);

}  // namespace linearard::cuda::sm90
