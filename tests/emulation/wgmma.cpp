#include "wgmma.h"

#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include "elements.h"
#include "shared_memory.h"

namespace linearard::emulation {
namespace {

constexpr int kDepth = 16;  ///< elements that a product sums over
constexpr int kRows = 16;   ///< of the 64 that a warp has
constexpr int kAtom = 64;   ///< elements of a line of 128 bytes
constexpr int kLineBytes = 128;

/// One warp's part of a product.
struct Product {
  WgmmaProduct of;
  std::vector<float*> d;                         ///< of each lane
  std::vector<std::vector<uint32_t>> registers;  ///< of each lane, where A is in registers
  int warp_of_group;
  Location at;
};

/// What accumulators hold while their registers hold NaN, [lane][register].
using Accumulators = std::vector<std::vector<float>>;

struct WarpProducts {
  std::vector<Product> open;  ///< not yet committed
  std::deque<std::vector<Product>> groups;
  std::map<const float*, Accumulators> accumulators;  ///< by the first lane's registers

  bool uses(const float* d) const {
    const auto into_d = [d](const Product& product) { return product.d[0] == d; };
    return std::any_of(open.begin(), open.end(), into_d) ||
           std::any_of(groups.begin(), groups.end(), [&](const std::vector<Product>& group) {
             return std::any_of(group.begin(), group.end(), into_d);
           });
  }
};

std::map<int, WarpProducts>& products() {
  static std::map<int, WarpProducts> instance;
  return instance;
}

void end_thread() {
  const auto found = products().find(this_warp());
  if (found == products().end()) return;
  const WarpProducts& mine = found->second;
  for (const auto& group : mine.groups)
    if (!group.empty()) fail("the thread ends before this product is done", group.front().at);
  if (!mine.open.empty()) fail("the thread ends with a product that is not committed", mine.open.front().at);
}

[[maybe_unused]] const bool kHooked = [] {
  add_hooks({[](size_t) { products().clear(); }, end_thread, nullptr});
  return true;
}();

/// The fields of a matrix descriptor, in bytes.
struct Descriptor {
  uint32_t address;
  uint32_t leading;
  uint32_t stride;

  Descriptor(uint64_t bits, const Location& at)
      : address(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("wgmma is emulated for matrices with the 128-byte swizzle", at);
    if ((bits >> 49 & 7) != 0) fail("wgmma is emulated for matrices whose swizzle begins at multiples of 1024", at);
  }

  /// Where element (i, k) lies, k of the 16 that are summed over, in the canonical layouts: lines of 128 bytes along k,
  /// eight of them for each eight i and `stride` to the next; or, transposed, lines along i, eight for each eight k,
  /// `stride` to the next and `leading` to the next 64 i. Bits 7-9 of the address exchange bits 4-6.
  uint32_t element(int i, int k, bool transposed) const {
    const int outer = transposed ? k : i;
    const int inner = transposed ? i : k;
    const uint32_t linear = address + static_cast<uint32_t>(outer % 8 * kLineBytes + inner % kAtom * 2) +
                            static_cast<uint32_t>(outer / 8) * stride + static_cast<uint32_t>(inner / kAtom) * leading;
    return linear ^ (linear >> 7 & 7) << 4;
  }
};

float read_element(uint32_t address, Element element, const Location& at) {
  uint16_t bits;
  __builtin_memcpy(&bits, async_read(address, 2, 2, at), 2);
  return element == Element::kHalf ? to_float<__half>(bits) : to_float<__nv_bfloat16>(bits);
}

float half_of(uint32_t pair, int which, Element element) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * which);
  return element == Element::kHalf ? to_float<__half>(bits) : to_float<__nv_bfloat16>(bits);
}

using Rows = std::vector<std::array<float, kDepth>>;

Rows read_matrix(uint64_t descriptor, int first, int count, bool transposed, const Product& product) {
  const Descriptor matrix(descriptor, product.at);
  Rows rows(count);
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < kDepth; ++k)
      rows[i][k] = read_element(matrix.element(first + i, k, transposed), product.of.element, product.at);
  return rows;
}

Rows rows_of_registers(const Product& product) {
  Rows rows(kRows);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int which = 0; which < 2; ++which) {
        rows[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + which] =
            half_of(product.registers[lane][r], which, product.of.element);
      }
    }
  }
  return rows;
}

/// Sums are formed in double and rounded once; a GPU rounds less well.
void compute(const Product& product, Accumulators& accumulators) {
  const WgmmaProduct& p = product.of;
  const Rows a = product.registers.empty()
                     ? read_matrix(p.a, product.warp_of_group * kRows, kRows, p.transpose_a, product)
                     : rows_of_registers(product);
  const Rows b = read_matrix(p.b, 0, p.columns, p.transpose_b, product);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int r = 0; r < p.columns / 2; ++r) {
      const auto& row = a[lane / 4 + r / 2 % 2 * 8];
      const auto& column = b[r / 4 * 8 + lane % 4 * 2 + r % 2];
      double sum = p.accumulate ? accumulators[lane][r] : 0;
      for (int k = 0; k < kDepth; ++k)
        sum += static_cast<double>(row[k]) * column[k];
      accumulators[lane][r] = static_cast<float>(sum);
    }
  }
}

void retire(WarpProducts& mine) {
  const std::vector<Product> group = std::move(mine.groups.front());
  mine.groups.pop_front();
  for (const Product& product : group)
    compute(product, mine.accumulators.at(product.d[0]));
  for (const Product& product : group) {
    const auto found = mine.accumulators.find(product.d[0]);
    if (found == mine.accumulators.end() || mine.uses(product.d[0])) continue;
    for (int lane = 0; lane < kWarpSize; ++lane)
      std::copy(found->second[lane].begin(), found->second[lane].end(), product.d[lane]);
    mine.accumulators.erase(found);
  }
}

struct Call {
  float* d;
  const WgmmaProduct* product;
};

void issue(Call* const* threads, int warp_of_group, const Location& at) {
  Call* const* lanes = threads + warp_of_group * kWarpSize;
  const WgmmaProduct& product = *threads[0]->product;
  WarpProducts& mine = products()[this_thread() / kWarpgroupSize * (kWarpgroupSize / kWarpSize) + warp_of_group];
  Product part{product, {}, {}, warp_of_group, at};
  Accumulators held;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const WgmmaProduct& own = *lanes[lane]->product;
    if (own.a != product.a || own.b != product.b || own.accumulate != product.accumulate) {
      fail("wgmma: the threads of a warpgroup name different matrices", at);
    }
    float* const d = lanes[lane]->d;
    part.d.push_back(d);
    if (own.registers != nullptr) part.registers.emplace_back(own.registers, own.registers + 4);
    held.emplace_back(d, d + product.columns / 2);
    std::fill_n(d, product.columns / 2, std::numeric_limits<float>::quiet_NaN());
  }
  mine.accumulators.try_emplace(part.d[0], std::move(held));
  mine.open.push_back(std::move(part));
}

}  // namespace

void wgmma(float* d, const WgmmaProduct& product, const Location& at) {
  Call call{d, &product};
  warpgroup_collective("wgmma", call, at, [&](Call* const* threads) {
    for (int warp = 0; warp < kWarpgroupSize / kWarpSize; ++warp)
      issue(threads, warp, at);
  });
}

void wgmma_commit(const Location& at) {
  int unused = 0;
  warp_collective("wgmma.commit_group", ~0u, true, unused, at, [](auto) {
    WarpProducts& mine = products()[this_warp()];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  });
}

void wgmma_wait(int pending, const Location& at) {
  int unused = 0;
  warp_collective("wgmma.wait_group", ~0u, true, unused, at, [pending](auto) {
    WarpProducts& mine = products()[this_warp()];
    while (mine.groups.size() > static_cast<size_t>(pending))
      retire(mine);
  });
}

void check_done(const float* d, const Location& at) {
  for (const auto& [warp, mine] : products()) {
    const auto into_d = [d](const Product& product) {
      return std::find(product.d.begin(), product.d.end(), d) != product.d.end();
    };
    if (warp != this_warp()) continue;
    for (const auto& group : mine.groups)
      if (std::any_of(group.begin(), group.end(), into_d)) fail("a product into these registers is not done", at);
  }
}

}  // namespace linearard::emulation
