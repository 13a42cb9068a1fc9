#include <emulation/cuda_runtime_shim.h>

#include <algorithm>
#include <climits>
#include <functional>
#include <queue>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sm90/rows_arguments.cuh>
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
/// @param tiles of a whole walk
double unevenness(const Schedule& schedule, const std::function<int(const Walk&)>& tiles_of_walk) {
  constexpr double kTilesToBegin = 1;
  std::priority_queue<double, std::vector<double>, std::greater<>> free_at;
  for (int i = 0; i < kMultiprocessors; ++i)
    free_at.push(0);
  double all = 0;
  double last = 0;
  for (int block = 0; block < schedule.blocks(); ++block) {
    const Walk walk = Walk::of_block(schedule, block);
    const int tiles = tiles_of_walk(walk);
    const int part = Walk::part_begin(schedule, walk.part + 1, tiles) - Walk::part_begin(schedule, walk.part, tiles);
    const double end = free_at.top() + kTilesToBegin + part;
    free_at.pop();
    free_at.push(end);
    last = std::max(last, end);
    all += kTilesToBegin + part;
  }
  return last / (all / kMultiprocessors);
}
double unevenness(const Shape& shape) {
  return unevenness(schedule_of(shape),
                    [&](const Walk& walk) { return tiles_of(shape) - walk.token_block * step_of(shape); });
}

TEST(HopperSchedule, FillsTheMultiprocessors) {
  for (const int owners : {128, 192}) {
    for (const int tokens : {1024, 2048, 4096, 8192, 16384})
      EXPECT_LT(unevenness({32, tokens, owners}), tokens < 4096 ? 1.09 : 1.03) << name_of({32, tokens, owners});
    EXPECT_LT(unevenness({8, 16384, owners}), 1.03) << owners;
    EXPECT_LT(unevenness({96, 4096, owners}), 1.02) << owners;
  }
}

/// Of causal rows, `group` heads of which share one of the keys, and of the keys of the same sets.
struct Sets {
  int heads;
  int rows;
  int keys;
  int group = 1;
};

constexpr int kRowOwners = 128;

int tiles_of_rows(const Sets& s, int first) {
  const int end = std::max(0, std::min(s.keys, first + kRowOwners + s.keys - s.rows));
  return (end + kTileTokens - 1) / kTileTokens;
}
int tiles_of_keys(const Sets& s, int first) {
  const int begin = std::min(s.rows, std::max(0, first - (s.keys - s.rows)));
  return (s.rows + kTileTokens - 1) / kTileTokens - begin / kTileTokens;
}

Schedule schedule_of_queries(const Sets& s) {
  return schedule_of_rows(s.heads, s.rows, kRowOwners, RowWalks::of_queries(s.keys - s.rows, s.keys),
                          int64_t{4} * s.keys * 128 / s.group, kMultiprocessors);
}
Schedule schedule_of_keys(const Sets& s) {
  return schedule_of_rows(s.heads, s.keys, kRowOwners, RowWalks::of_keys(s.keys, s.rows), int64_t{4} * s.rows * 128,
                          kMultiprocessors);
}

void expect_shorter_walks_later(const Schedule& schedule, const std::function<int(const Walk&)>& tiles_of_walk) {
  std::set<std::pair<int, int>> taken;
  const int first_of_last = schedule.heads * (schedule.token_blocks - schedule.last_blocks);
  int last = INT_MAX;
  for (int block = 0; block < schedule.blocks(); ++block) {
    const Walk walk = Walk::of_block(schedule, block);
    EXPECT_EQ(walk.part, 0);
    taken.emplace(walk.head, walk.token_block);
    if (block < first_of_last) continue;
    EXPECT_LE(tiles_of_walk(walk), last);
    last = tiles_of_walk(walk);
  }
  EXPECT_EQ(static_cast<int>(taken.size()), schedule.heads * schedule.token_blocks);
}

TEST(HopperSchedule, ShortWalksOfRowsComeLast) {
  for (const Sets& sets :
       {Sets{32, 4096, 4096}, Sets{32, 4096, 4096, 4}, Sets{32, 8192, 8192, 8}, Sets{8, 16384, 16384},
        Sets{32, 4096, 8192}, Sets{64, 8192, 4096}, Sets{32, 512, 65536}, Sets{32, 8192, 100}}) {
    const Schedule of_rows = schedule_of_queries(sets);
    const auto row_tiles = [&](const Walk& walk) {
      return tiles_of_rows(sets, (of_rows.token_blocks - 1 - walk.token_block) * kRowOwners);
    };
    const Schedule of_keys = schedule_of_keys(sets);
    const auto key_tiles = [&](const Walk& walk) { return tiles_of_keys(sets, walk.token_block * kRowOwners); };
    const std::string name = std::to_string(sets.rows) + "x" + std::to_string(sets.keys);
    expect_shorter_walks_later(of_rows, row_tiles);
    expect_shorter_walks_later(of_keys, key_tiles);
    if (sets.rows < 1000 || sets.keys < 1000) continue;
    EXPECT_LT(unevenness(of_rows, row_tiles), 1.06) << name;
    EXPECT_LT(unevenness(of_keys, key_tiles), 1.01) << name;
  }
}

}  // namespace
}  // namespace linearard::cuda::sm90
