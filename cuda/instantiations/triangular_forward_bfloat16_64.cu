#include "../triangular/launch.cuh"

LINEARARD_INSTANTIATE_TRIANGULAR_FORWARD(__nv_bfloat16, 64)
