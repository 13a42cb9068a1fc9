#include "../mma/launch.cuh"

LINEARARD_INSTANTIATE(__nv_bfloat16, 80)
