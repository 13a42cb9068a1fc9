#pragma once

#include <chrono>

namespace linearard::benchmarks {

/// Seconds between start and stop. The benchmarks report them as manual time: a device whose work runs apart from the
/// CPU's measures with events on its stream, behind the same two functions.
class CpuStopwatch {
 public:
  void start() { start_ = std::chrono::steady_clock::now(); }
  double stop() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_;
};

}  // namespace linearard::benchmarks
