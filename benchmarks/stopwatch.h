#pragma once

#include <chrono>
#include <optional>

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace linearard::benchmarks {

/// Seconds between start and stop, which the benchmarks report as manual time. On the CPU by the clock; on other
/// devices between two events on the current stream, through c10's device interface: no CUDA header is needed.
class Stopwatch {
 public:
  explicit Stopwatch(const c10::Device& device) {
    if (!device.is_cpu()) events_.emplace(device);
  }

  void start() {
    if (events_) {
      events_->begin.record(events_->stream());
    } else {
      start_ = std::chrono::steady_clock::now();
    }
  }

  double stop() {
    if (!events_) return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    events_->end.record(events_->stream());
    events_->end.synchronize();
    return events_->begin.elapsedTime(events_->end) * 1e-3;
  }

 private:
  struct Events {
    explicit Events(const c10::Device& on)
        : device(on), begin(on.type(), kTimed), end(on.type(), kTimed), guard(on.type()) {}
    c10::Stream stream() const { return guard.getStream(device); }

    static constexpr c10::EventFlag kTimed = c10::EventFlag::BACKEND_DEFAULT;
    c10::Device device;
    c10::Event begin;
    c10::Event end;
    c10::impl::VirtualGuardImpl guard;
  };

  std::optional<Events> events_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace linearard::benchmarks
