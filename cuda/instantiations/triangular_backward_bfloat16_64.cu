#include "../triangular/launch.cuh"

LINEARARD_INSTANTIATE_TRIANGULAR_BACKWARD(__nv_bfloat16, 64)
