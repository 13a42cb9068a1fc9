#include <emulation/cuda_runtime_shim.h>

#include <algorithm>
#include <functional>
#include <queue>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include <sm90/schedule.cuh>

// Which block of threads of the Hopper kernels does what, and how evenly the multiprocessors are filled.

namespace linearard::cuda::sm90 {
namespace {

constexpr int kMultiprocessors = 132;

struct Shape {
  int heads;
  int tokens;
  int owners;
  int dim = 128;
};

std::string name_of(const Shape& s) {
  return std::to_string(s.heads) + "x" + std::to_string(s.tokens) + "x" + std::to_string(s.dim) + ", " +
         std::to_string(s.owners) + " owners";
}

int tiles_of(const Shape& s) { return (s.tokens + kTileTokens - 1) / kTileTokens; }
int step_of(const Shape& s) { return s.owners / kTileTokens; }

Schedule schedule_of(const Shape& s) {
  return Schedule::make(s.heads, (s.tokens + s.owners - 1) / s.owners, tiles_of(s), step_of(s),
                        int64_t{4} * s.tokens * s.dim, kMultiprocessors);
}

TEST(HopperSchedule, EachPartOfEachWalkIsTakenOnce) {
  for (const Shape& shape : {Shape{1, 64, 192}, Shape{3, 1000, 128}, Shape{32, 1024, 192}, Shape{9, 2048, 192, 64},
                             Shape{32, 4096, 192}, Shape{32, 4096, 128}, Shape{17, 8192, 128}, Shape{3, 131072, 192}}) {
    const Schedule schedule = schedule_of(shape);
    std::set<std::tuple<int, int, int>> taken;
    for (int block = 0; block < schedule.blocks(); ++block) {
      const Walk walk = Walk::of_block(schedule, block);
      EXPECT_TRUE(walk.head >= 0 && walk.head < shape.heads && walk.token_block >= 0 &&
                  walk.token_block < schedule.token_blocks && walk.part >= 0 && walk.part < schedule.parts)
          << name_of(shape);
      EXPECT_TRUE(taken.emplace(walk.head, walk.token_block, walk.part).second) << name_of(shape);
    }
  }
}

/// The last multiprocessor's time over the mean, when blocks go to whichever is free.
double unevenness(const Shape& shape) {
  constexpr double kTilesToBegin = 1;
  const Schedule schedule = schedule_of(shape);
  std::priority_queue<double, std::vector<double>, std::greater<>> free_at;
  for (int i = 0; i < kMultiprocessors; ++i)
    free_at.push(0);
  double all = 0;
  double last = 0;
  for (int block = 0; block < schedule.blocks(); ++block) {
    const Walk walk = Walk::of_block(schedule, block);
    const int tiles = tiles_of(shape) - walk.token_block * step_of(shape);
    const int part = Walk::part_begin(schedule, walk.part + 1, tiles) - Walk::part_begin(schedule, walk.part, tiles);
    const double end = free_at.top() + kTilesToBegin + part;
    free_at.pop();
    free_at.push(end);
    last = std::max(last, end);
    all += kTilesToBegin + part;
  }
  return last / (all / kMultiprocessors);
}

TEST(HopperSchedule, FillsTheMultiprocessors) {
  for (const int owners : {128, 192}) {
    for (const int tokens : {1024, 2048, 4096, 8192, 16384})
      EXPECT_LT(unevenness({32, tokens, owners}), tokens < 4096 ? 1.09 : 1.03) << name_of({32, tokens, owners});
    EXPECT_LT(unevenness({8, 16384, owners}), 1.03) << owners;
    EXPECT_LT(unevenness({96, 4096, owners}), 1.02) << owners;
  }
}

}  // namespace
}  // namespace linearard::cuda::sm90
