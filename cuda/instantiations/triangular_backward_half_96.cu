#include "../triangular/launch.cuh"

LINEARARD_INSTANTIATE_TRIANGULAR_BACKWARD(__half, 96)
