#include "../triangular/launch.cuh"

LINEARARD_INSTANTIATE_TRIANGULAR_FORWARD(__half, 80)
