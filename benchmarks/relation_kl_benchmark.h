#pragma once

#include "arguments.h"

namespace linearard::benchmarks {

/// Register forward, backward and both for every shape and dtype, of the library and of the N x N computation:
/// relation_kl/<linearard|naive>/<forward|backward|both>/<dtype>/B../H../N../D..
void register_relation_kl(const Arguments& arguments);

}  // namespace linearard::benchmarks
