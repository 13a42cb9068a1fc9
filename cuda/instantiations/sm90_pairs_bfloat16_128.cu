#include "../sm90/instantiations.h"
#include "../sm90/rows_launch.cuh"

namespace linearard::cuda::sm90 {

template cudaError_t launch_pairs_forward<__nv_bfloat16, 128>(const RowsForwardParams&, int, cudaStream_t);
template cudaError_t launch_pairs_backward<__nv_bfloat16, 128>(const RowsBackwardParams&, Pairs, int, cudaStream_t);

}  // namespace linearard::cuda::sm90
