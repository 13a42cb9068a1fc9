#include "../mma/launch.cuh"

LINEARARD_INSTANTIATE(__half, 128)
