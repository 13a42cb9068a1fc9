#pragma once

#include "arguments.h"

namespace linearard::benchmarks {

/// FLOP/s of a plain matrix product on a GPU, the yardstick of its results: G = at::mm of 8192^3 in bfloat16.
double matrix_rate(const at::Device& device);

/// Register forward, backward and both for every shape and dtype, of the library and of the N x N computation:
/// relation_kl/<linearard|naive>/<forward|backward|both>/<dtype>/B../H../N../D..; on a GPU, whose matrix rate is given,
/// with the fraction of that rate.
void register_relation_kl(const Arguments& arguments, std::optional<double> matrix_rate);

}  // namespace linearard::benchmarks
