#include "memory.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <fstream>
#include <string>

#include <c10/core/CachingDeviceAllocator.h>

namespace linearard::benchmarks {
namespace {

/// A field of /proc/self/status, given in kB there, in bytes.
std::optional<int64_t> status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  std::string key;
  while (status >> key) {
    int64_t kilobytes = 0;
    if (key == field + ":" && status >> kilobytes) return kilobytes * 1024;
    status.ignore(1024, '\n');
  }
  return std::nullopt;
}

bool reset_high_water_mark() {
  std::ofstream clear("/proc/self/clear_refs");
  clear << "5" << std::flush;
  return clear.good();
}

std::optional<int64_t> peak_resident_bytes(const std::function<void()>& work) {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
  const bool measured = reset_high_water_mark();
  const auto before = status_bytes("VmRSS");
  work();
  const auto peak = status_bytes("VmHWM");
  if (!measured || !before || !peak) return std::nullopt;
  return *peak - *before;
}

int64_t peak_allocated_bytes(const c10::Device& device, const std::function<void()>& work) {
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  c10::DeviceAllocator* allocator = c10::getDeviceAllocator(device.type());
  allocator->resetPeakStats(device.index());
  const int64_t before = allocator->getDeviceStats(device.index()).allocated_bytes[kAll].current;
  work();
  return allocator->getDeviceStats(device.index()).allocated_bytes[kAll].peak - before;
}

}  // namespace

std::optional<int64_t> peak_bytes(const c10::Device& device, const std::function<void()>& work) {
  if (device.is_cpu()) return peak_resident_bytes(work);
  return peak_allocated_bytes(device, work);
}

double free_bytes(const c10::Device& device) {
  c10::DeviceAllocator* allocator = c10::getDeviceAllocator(device.type());
  allocator->emptyCache();
  return static_cast<double>(allocator->getMemoryInfo(device.index()).first);
}

}  // namespace linearard::benchmarks
