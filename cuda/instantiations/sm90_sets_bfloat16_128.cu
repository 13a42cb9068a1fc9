#include "../sm90/instantiations.h"
#include "../sm90/sets_launch.cuh"

namespace linearard::cuda::sm90 {

template cudaError_t launch_sets_backward<__nv_bfloat16, 128>(const RowsBackwardParams&, float*, int, cudaStream_t);

}  // namespace linearard::cuda::sm90
