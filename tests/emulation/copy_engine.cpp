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
constexpr uint32_t kLineAlignment = 128;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct Addition {
  TensorMap map;
  uint32_t shared;
  int first[TensorMap::kRank];
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

uint32_t bytes_of_box(const TensorMap& map) {
  return map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.element_bytes;
}

/// Where the piece of 16 bytes at this address of a box lies.
uint32_t place_of(uint32_t address, bool swizzled) { return swizzled ? address ^ (address >> 7 & 7) << 4 : address; }

/// Calls visit(offset in the box, element of the tensor or null where there is none) for all elements of a box.
template <typename Visit>
void for_each_element(const TensorMap& map, const int (&first)[TensorMap::kRank], const Visit& visit) {
  uint32_t offset = 0;
  for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
    for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
      for (uint32_t i1 = 0; i1 < map.box[1]; ++i1) {
        for (uint32_t i0 = 0; i0 < map.box[0]; ++i0, offset += map.element_bytes) {
          const int64_t at[4] = {first[0] + int64_t{i0}, first[1] + int64_t{i1}, first[2] + int64_t{i2},
                                 first[3] + int64_t{i3}};
          bool inside = true;
          for (int d = 0; d < TensorMap::kRank; ++d)
            inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
          char* element = const_cast<char*>(map.data) + at[0] * map.element_bytes;
          for (int d = 1; d < TensorMap::kRank; ++d)
            element += at[d] * static_cast<int64_t>(map.strides[d - 1]);
          visit(offset, inside ? element : nullptr);
        }
      }
    }
  }
}

void land(uint32_t shared, const TensorMap& map, const int (&first)[TensorMap::kRank]) {
  constexpr uint32_t kPiece = 16;
  std::vector<char> box(bytes_of_box(map));
  for_each_element(map, first, [&](uint32_t offset, const char* element) {
    if (element != nullptr) std::memcpy(box.data() + offset, element, map.element_bytes);
  });
  for (uint32_t begin = 0; begin < box.size(); begin += kPiece)
    std::memcpy(copy_lands(place_of(shared + begin, map.swizzled), kPiece), box.data() + begin, kPiece);
}

void add(const Addition& addition) {
  const TensorMap& map = addition.map;
  const uint32_t bytes = bytes_of_box(map);
  const auto* const box = reinterpret_cast<const char*>(async_read(addition.shared, bytes, 16, addition.at));
  for_each_element(map, addition.first, [&](uint32_t offset, char* element) {
    if (element == nullptr) return;
    float value = 0;
    std::memcpy(&value, box + place_of(addition.shared + offset, map.swizzled) - addition.shared, sizeof(value));
    *reinterpret_cast<float*>(element) += value;
  });
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
  if (shared % kLineAlignment != 0) fail("a load of the copy engine is aligned to 128 bytes", at);
  copy_begins(shared, bytes_of_box(map), at);
  const std::vector<int> first(coordinates, coordinates + TensorMap::kRank);
  defer([=] {
    land(shared, map, {first[0], first[1], first[2], first[3]});
    mbarrier_complete(barrier, bytes_of_box(map), at);
  });
}

void tma_reduce_add(const TensorMap& map,
                    uint32_t shared,
                    const int (&coordinates)[TensorMap::kRank],
                    const Location& at) {
  if (shared % kLineAlignment != 0) fail("an addition of the copy engine is aligned to 128 bytes", at);
  if (map.element_bytes != sizeof(float)) fail("only floats are added", at);
  shared_access(shared, bytes_of_box(map), 16, at);
  const auto& c = coordinates;
  additions()[this_thread()].open.push_back({map, shared, {c[0], c[1], c[2], c[3]}, at});
}

void bulk_commit() {
  ThreadAdditions& mine = additions()[this_thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait_read(int pending) {
  ThreadAdditions& mine = additions()[this_thread()];
  while (mine.groups.size() > static_cast<size_t>(pending)) {
    for (const Addition& addition : mine.groups.front())
      add(addition);
    mine.groups.pop_front();
  }
}

}  // namespace linearard::emulation
