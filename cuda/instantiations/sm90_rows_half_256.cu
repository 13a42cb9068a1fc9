#include "../sm90/instantiations.h"
#include "../sm90/rows_launch.cuh"

namespace linearard::cuda::sm90 {

template cudaError_t launch_rows_forward<__half, 256>(const TriangularForwardParams&, int, cudaStream_t);
template cudaError_t launch_rows_backward<__half, 256>(const TriangularBackwardParams&, int, cudaStream_t);

}  // namespace linearard::cuda::sm90
