#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include <c10/core/Device.h>

namespace linearard::benchmarks {

/// Bytes by which memory rose while `work` ran, at its highest, above what it was before.
///
/// On the CPU the resident memory of this process, from the kernel's VmHWM, reset through /proc/self/clear_refs: it
/// sees every allocation, also those of the matrix library and of the threads. Memory that malloc keeps from earlier
/// work is given back first, so that reusing it counts. Nothing where the kernel does not offer the reset.
///
/// On other devices the statistics of torch's caching allocator, through which all of a call's memory comes.
std::optional<int64_t> peak_bytes(const c10::Device& device, const std::function<void()>& work);

/// Bytes that can still be allocated on a device other than the CPU.
double free_bytes(const c10::Device& device);

}  // namespace linearard::benchmarks
