#include "mbarrier.h"

#include <map>
#include <vector>

#include "shared_memory.h"

namespace linearard::emulation {
namespace {

struct Mbarrier {
  uint32_t arrivals;  ///< of a phase
  uint32_t missing;   ///< of this phase
  int64_t bytes = 0;  ///< expected and not yet landed
  uint32_t phase = 0;
  std::vector<int> threads;  ///< that wait
};

std::map<uint32_t, Mbarrier>& mbarriers() {
  static std::map<uint32_t, Mbarrier> instance;
  return instance;
}

std::string waited_for() {
  std::string text;
  for (const auto& [address, m] : mbarriers()) {
    if (m.threads.empty()) continue;
    text += "\n  mbarrier at offset " + std::to_string(offset_of(address)) + " in phase " + std::to_string(m.phase) +
            " misses " + std::to_string(m.missing) + " arrivals and " + std::to_string(m.bytes) + " bytes";
  }
  return text;
}

[[maybe_unused]] const bool kHooked = [] {
  add_hooks({[](size_t) { mbarriers().clear(); }, nullptr, waited_for});
  return true;
}();

Mbarrier& find(uint32_t barrier, const Location& at) {
  const auto found = mbarriers().find(barrier);
  if (found == mbarriers().end()) fail("an mbarrier that has not been initialised", at);
  return found->second;
}

void end_phase_if_complete(Mbarrier& m) {
  if (m.missing > 0 || m.bytes != 0) return;
  ++m.phase;
  m.missing = m.arrivals;
  for (const int thread : m.threads)
    wake(thread);
  m.threads.clear();
}

}  // namespace

void mbarrier_init(uint32_t barrier, uint32_t arrivals, const Location& at) {
  shared_access(barrier, 8, 8, at);
  if (arrivals == 0) fail("an mbarrier of no arrivals", at);
  if (mbarriers().contains(barrier)) fail("an mbarrier that is initialised already", at);
  mbarriers()[barrier] = {arrivals, arrivals, 0, 0, {}};
}

void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, const Location& at) {
  Mbarrier& m = find(barrier, at);
  if (m.missing == 0) {
    fail("more than the " + std::to_string(m.arrivals) + " arrivals of an mbarrier's phase", at);
  }
  m.bytes += expected_bytes;
  --m.missing;
  end_phase_if_complete(m);
}

void mbarrier_complete(uint32_t barrier, uint32_t bytes, const Location& at) {
  Mbarrier& m = find(barrier, at);
  m.bytes -= bytes;
  end_phase_if_complete(m);
}

void mbarrier_wait(uint32_t barrier, uint32_t parity, const Location& at) {
  if (parity > 1) fail("a parity is 0 or 1, got " + std::to_string(parity), at);
  while (find(barrier, at).phase % 2 == parity) {
    mbarriers()[barrier].threads.push_back(this_thread());
    wait(parity == 0 ? "an mbarrier's phase of parity 0" : "an mbarrier's phase of parity 1", at);
  }
}

}  // namespace linearard::emulation
