#include "copy_engine.h"

#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "mbarrier.h"
#include "shared_memory.h"

namespace linearard::emulation {
namespace {

constexpr uint32_t kLargestBox = 256;
constexpr uint32_t kSwizzleLine = 128;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct Addition {
  float* global;
  uint32_t shared;
  uint32_t bytes;
  Location at;
};

struct ThreadAdditions {
  std::vector<Addition> open;  ///< not yet committed
  std::deque<std::vector<Addition>> groups;
};

std::map<int, ThreadAdditions>& additions() {
  static std::map<int, ThreadAdditions> instance;
  return instance;
}

/// Shared memory goes to the next block: what still has to read it would read that one's.
void end_thread() {
  const auto found = additions().find(this_thread());
  if (found == additions().end()) return;
  for (const auto& group : found->second.groups)
    if (!group.empty()) fail("the thread ends before this addition has read shared memory", group.front().at);
  if (!found->second.open.empty())
    fail("the thread ends with additions that it has not committed", found->second.open.front().at);
}

[[maybe_unused]] const bool kHooked = [] {
  add_hooks({[](size_t) { additions().clear(); }, end_thread, nullptr});
  return true;
}();

void check(bool condition, const char* message) {
  if (!condition) throw Error(std::string("tensor map: ") + message);
}

/// One line of a box, of `bytes`, to `offset` of the destination.
void copy_line(uint32_t shared, uint32_t offset, const char* source, uint32_t bytes, bool swizzled) {
  constexpr uint32_t kPiece = 16;
  for (uint32_t begin = 0; begin < bytes; begin += kPiece) {
    uint32_t address = shared + offset + begin;
    if (swizzled) address ^= (address >> 7 & 7) << 4;
    std::memcpy(copy_lands(address, kPiece), source + begin, kPiece);
  }
}

void land(uint32_t shared, const TensorMap& map, const int (&first)[TensorMap::kRank]) {
  const uint32_t line_bytes = map.box[0] * map.element_bytes;
  std::vector<char> line(line_bytes);
  uint32_t offset = 0;
  for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
    for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
      for (uint32_t i1 = 0; i1 < map.box[1]; ++i1, offset += line_bytes) {
        const int64_t at[4] = {first[0], first[1] + int64_t{i1}, first[2] + int64_t{i2}, first[3] + int64_t{i3}};
        std::fill(line.begin(), line.end(), '\0');
        bool inside = true;
        for (int d = 1; d < TensorMap::kRank; ++d)
          inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
        for (uint32_t i0 = 0; inside && i0 < map.box[0]; ++i0) {
          const int64_t x = at[0] + i0;
          if (x < 0 || x >= map.sizes[0]) continue;
          const char* const from = map.data + x * map.element_bytes + at[1] * static_cast<int64_t>(map.strides[0]) +
                                   at[2] * static_cast<int64_t>(map.strides[1]) +
                                   at[3] * static_cast<int64_t>(map.strides[2]);
          std::memcpy(line.data() + i0 * map.element_bytes, from, map.element_bytes);
        }
        copy_line(shared, offset, line.data(), line_bytes, map.swizzled);
      }
    }
  }
}

}  // namespace

void TensorMap::check() const {
  using emulation::check;
  check(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the tensor is not aligned to 16 bytes");
  for (int d = 0; d < kRank; ++d) {
    check(sizes[d] >= 1, "a dimension of no elements");
    check(box[d] >= 1 && box[d] <= kLargestBox, "a box has 1 to 256 elements in each dimension");
  }
  for (const uint64_t stride : strides)
    check(stride % 16 == 0 && stride < uint64_t{1} << 40, "strides are multiples of 16 bytes below 2^40");
  check(box[0] * element_bytes % 16 == 0, "the lines of a box are whole pieces of 16 bytes");
  check(!swizzled || box[0] * element_bytes == kSwizzleLine, "the swizzle is emulated for lines of 128 bytes");
}

void TensorMap::store(CUtensorMap& to) const { std::memcpy(&to, this, sizeof(*this)); }

TensorMap TensorMap::load(const CUtensorMap& from) {
  TensorMap map;
  std::memcpy(&map, &from, sizeof(map));
  return map;
}

void tma_load(uint32_t shared,
              const TensorMap& map,
              uint32_t barrier,
              const int (&coordinates)[TensorMap::kRank],
              const Location& at) {
  const uint32_t bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.element_bytes;
  if (shared % 128 != 0) fail("a load of the copy engine is aligned to 128 bytes", at);
  copy_begins(shared, bytes, at);
  const std::vector<int> first(coordinates, coordinates + TensorMap::kRank);
  defer([=] {
    land(shared, map, {first[0], first[1], first[2], first[3]});
    mbarrier_complete(barrier, bytes, at);
  });
}

void reduce_add_bulk(float* global, uint32_t shared, uint32_t bytes, const Location& at) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("a bulk addition takes multiples of 16 bytes at multiples of 16", at);
  }
  shared_access(shared, bytes, 16, at);
  additions()[this_thread()].open.push_back({global, shared, bytes, at});
}

void bulk_commit() {
  ThreadAdditions& mine = additions()[this_thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait_read(int pending) {
  ThreadAdditions& mine = additions()[this_thread()];
  while (mine.groups.size() > static_cast<size_t>(pending)) {
    for (const Addition& addition : mine.groups.front()) {
      const auto* const values =
          reinterpret_cast<const float*>(async_read(addition.shared, addition.bytes, 16, addition.at));
      for (uint32_t i = 0; i < addition.bytes / sizeof(float); ++i)
        addition.global[i] += values[i];
    }
    mine.groups.pop_front();
  }
}

}  // namespace linearard::emulation
