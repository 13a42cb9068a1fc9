#include "shared_memory.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <vector>

namespace linearard::emulation {
namespace {

constexpr size_t kLargest = 227 * 1024;  ///< of a block of sm_90
constexpr uint32_t kBase = 1024;         ///< address of the first byte
constexpr size_t kGranule = 8;           ///< bytes that copies move together, the smallest copy
constexpr int kPoison = 0xff;            ///< a byte of a NaN, whatever the type

struct Memory {
  alignas(1024) char bytes[kLargest];
  size_t size = 0;
  std::bitset<kLargest / kGranule> in_flight;
  std::array<int, kLargest / kGranule> unfenced;  ///< the thread that has written and not fenced, or -1
  std::vector<std::vector<size_t>> written;       ///< by each thread since its last fence
};

struct Granules {
  size_t first;
  size_t end;
};

Memory& memory() {
  static Memory instance;
  return instance;
}

std::string range_of(uint32_t address, size_t bytes) {
  return std::to_string(bytes) + " bytes at offset " + std::to_string(offset_of(address)) + " of shared memory";
}

void begin_block(size_t bytes) {
  if (bytes > kLargest) throw Error("a block has at most 232448 bytes of shared memory, got " + std::to_string(bytes));
  Memory& m = memory();
  m.size = bytes;
  std::fill_n(m.bytes, kLargest, static_cast<char>(kPoison));
  m.in_flight.reset();
  m.unfenced.fill(-1);
  m.written.assign(thread_count(), {});
}

[[maybe_unused]] const bool kHooked = [] {
  add_hooks({begin_block, nullptr, nullptr});
  return true;
}();

char* checked(uint32_t address, size_t bytes, size_t alignment, const Location& at) {
  Memory& m = memory();
  if (address < kBase || address - kBase + bytes > m.size) {
    fail(range_of(address, bytes) + " of " + std::to_string(m.size), at);
  }
  if (address % alignment != 0) {
    fail(range_of(address, bytes) + ": not aligned to " + std::to_string(alignment), at);
  }
  return m.bytes + (address - kBase);
}

Granules granules_of(const char* from, size_t bytes) {
  const size_t offset = from - memory().bytes;
  return {offset / kGranule, (offset + bytes + kGranule - 1) / kGranule};
}

}  // namespace

char* dynamic_shared_memory() { return memory().bytes; }

uint32_t shared_address_of(const void* pointer, const Location& at) {
  const auto offset = static_cast<const char*>(pointer) - memory().bytes;
  if (offset < 0 || static_cast<size_t>(offset) > memory().size) {
    fail("the address of something that does not lie in dynamic shared memory", at);
  }
  return kBase + static_cast<uint32_t>(offset);
}

int64_t offset_of(uint32_t address) { return static_cast<int64_t>(address) - kBase; }

char* shared_access(uint32_t address, size_t bytes, size_t alignment, const Location& at) {
  char* const pointer = checked(address, bytes, alignment, at);
  const Granules granules = granules_of(pointer, bytes);
  for (size_t i = granules.first; i < granules.end; ++i) {
    if (memory().in_flight[i]) fail(range_of(address, bytes) + " wait for an asynchronous copy to land", at);
  }
  return pointer;
}

char* matrix_write(uint32_t address, size_t bytes, int thread, const Location& at) {
  char* const pointer = shared_access(address, bytes, bytes, at);
  const Granules granules = granules_of(pointer, bytes);
  for (size_t i = granules.first; i < granules.end; ++i) {
    memory().unfenced[i] = thread;
    memory().written[thread].push_back(i);
  }
  return pointer;
}

void fence_async_proxy() {
  Memory& m = memory();
  const int thread = this_thread();
  for (const size_t i : m.written[thread])
    if (m.unfenced[i] == thread) m.unfenced[i] = -1;
  m.written[thread].clear();
}

const char* async_read(uint32_t address, size_t bytes, size_t alignment, const Location& at) {
  const char* const pointer = shared_access(address, bytes, alignment, at);
  const Granules granules = granules_of(pointer, bytes);
  for (size_t i = granules.first; i < granules.end; ++i) {
    if (memory().unfenced[i] >= 0) {
      fail(range_of(address, bytes) + ": no fence.proxy.async since thread " + std::to_string(memory().unfenced[i]) +
               " wrote them",
           at);
    }
  }
  return pointer;
}

void copy_begins(uint32_t address, size_t bytes, const Location& at) {
  constexpr size_t kLargestPiece = 16;
  char* const pointer = shared_access(address, bytes, std::min(bytes, kLargestPiece), at);
  std::memset(pointer, kPoison, bytes);
  const Granules granules = granules_of(pointer, bytes);
  for (size_t i = granules.first; i < granules.end; ++i) {
    memory().in_flight[i] = true;
    memory().unfenced[i] = -1;
  }
}

char* copy_lands(uint32_t address, size_t bytes) {
  char* const pointer = memory().bytes + offset_of(address);
  const Granules granules = granules_of(pointer, bytes);
  for (size_t i = granules.first; i < granules.end; ++i)
    memory().in_flight[i] = false;
  return pointer;
}

}  // namespace linearard::emulation
