#include "shared_memory.h"

#include <algorithm>
#include <bitset>
#include <cstring>

namespace linearard::emulation {
namespace {

constexpr size_t kLargest = 227 * 1024;  ///< of a block of sm_90
constexpr uint32_t kBase = 1024;         ///< address of the first byte
constexpr size_t kGranule = 16;          ///< bytes that copies move together
constexpr int kPoison = 0xff;            ///< a byte of a NaN, whatever the type

struct Memory {
  alignas(1024) char bytes[kLargest];
  size_t size = 0;
  std::bitset<kLargest / kGranule> in_flight;
};

Memory& memory() {
  static Memory instance;
  return instance;
}

std::string range_of(uint32_t address, size_t bytes) {
  return std::to_string(bytes) + " bytes at offset " + std::to_string(static_cast<int64_t>(address) - kBase) +
         " of shared memory";
}

void begin_block(size_t bytes) {
  if (bytes > kLargest) throw Error("a block has at most 232448 bytes of shared memory, got " + std::to_string(bytes));
  Memory& m = memory();
  m.size = bytes;
  std::fill_n(m.bytes, kLargest, static_cast<char>(kPoison));
  m.in_flight.reset();
}

[[maybe_unused]] const bool kHooked = [] {
  add_hooks({begin_block, nullptr});
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

bool any_in_flight(const char* from, size_t bytes) {
  const Memory& m = memory();
  const size_t first = (from - m.bytes) / kGranule;
  const size_t end = (from - m.bytes + bytes + kGranule - 1) / kGranule;
  for (size_t i = first; i < end; ++i)
    if (m.in_flight[i]) return true;
  return false;
}

void mark(const char* from, size_t bytes, bool in_flight) {
  Memory& m = memory();
  const size_t first = (from - m.bytes) / kGranule;
  const size_t end = (from - m.bytes + bytes + kGranule - 1) / kGranule;
  for (size_t i = first; i < end; ++i)
    m.in_flight[i] = in_flight;
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

char* shared_access(uint32_t address, size_t bytes, size_t alignment, const Location& at) {
  char* const pointer = checked(address, bytes, alignment, at);
  if (any_in_flight(pointer, bytes)) fail(range_of(address, bytes) + " wait for an asynchronous copy to land", at);
  return pointer;
}

void copy_begins(uint32_t address, size_t bytes, const Location& at) {
  char* const pointer = shared_access(address, bytes, kGranule, at);
  std::memset(pointer, kPoison, bytes);
  mark(pointer, bytes, true);
}

char* copy_lands(uint32_t address, size_t bytes) {
  char* const pointer = memory().bytes + (address - kBase);
  mark(pointer, bytes, false);
  return pointer;
}

}  // namespace linearard::emulation
