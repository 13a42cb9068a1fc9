#include "copy_async.h"

#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace linearard::emulation {
namespace {

struct Copy {
  uint32_t shared;
  const void* global;
  int size;
  int bytes;
};

struct ThreadCopies {
  std::vector<Copy> open;  ///< not yet committed
  std::deque<std::vector<Copy>> groups;
};

std::map<int, ThreadCopies>& copies() {
  static std::map<int, ThreadCopies> instance;
  return instance;
}

[[maybe_unused]] const bool kHooked = [] {
  add_hooks({[](size_t) { copies().clear(); }, nullptr, nullptr});
  return true;
}();

}  // namespace

void copy_async(uint32_t shared, const void* global, int size, int bytes, const Location& at) {
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % size != 0) {
    fail("cp.async: the source is not aligned to its " + std::to_string(size) + " bytes", at);
  }
  copy_begins(shared, size, at);
  copies()[this_thread()].open.push_back({shared, global, size, bytes});
}

void copy_commit() {
  ThreadCopies& mine = copies()[this_thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void copy_wait(int pending) {
  ThreadCopies& mine = copies()[this_thread()];
  while (mine.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : mine.groups.front()) {
      char* const to = copy_lands(copy.shared, copy.size);
      std::memcpy(to, copy.global, copy.bytes);
      std::memset(to + copy.bytes, 0, copy.size - copy.bytes);
    }
    mine.groups.pop_front();
  }
}

}  // namespace linearard::emulation
