#pragma once

#include <cstdint>
#include <functional>
#include <optional>

namespace linearard::benchmarks {

/// Bytes by which the resident memory of this process rose while `work` ran, at its highest, above what it was before.
/// From the kernel's VmHWM, reset through /proc/self/clear_refs: it sees every allocation, also those of the matrix
/// library and of the threads. Memory that malloc keeps from earlier work is given back first, so that reusing it
/// counts. Nothing where the kernel does not offer the reset.
std::optional<int64_t> peak_resident_bytes(const std::function<void()>& work);

}  // namespace linearard::benchmarks
