#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <ATen/Parallel.h>

#include "kernel_scope.h"

// Order of the tiles. Work is cut into rounds; inside a round no two tasks touch the same rows, so every row block
// is updated in one fixed order: no locks, no per-thread copies, and the same bits for any number of threads.

namespace linearard::cpu {

/// One tile of one problem of a group.
struct TileTask {
  int64_t problem;
  int64_t row_block;
  int64_t column_block;
};

inline int64_t block_count(int64_t length, int64_t tile_rows) { return (length + tile_rows - 1) / tile_rows; }

/// The round-robin tournament (circle method): in each round every block meets one other block, after all rounds
/// each pair has met once. Round 0 is the diagonal. `append(row_block, column_block)` with row_block >= column_block.
template <typename Append>
void symmetric_round(int64_t blocks, int64_t round, const Append& append) {
  if (round == 0) {
    for (int64_t block = 0; block < blocks; ++block)
      append(block, block);
    return;
  }
  const int64_t seats = blocks + blocks % 2;  // an odd number of blocks leaves one out in each round
  const int64_t circle = seats - 1;
  const int64_t turn = round - 1;
  if (turn >= circle) return;
  const auto pair = [&](int64_t a, int64_t b) {
    if (a < blocks && b < blocks) append(std::max(a, b), std::min(a, b));
  };
  pair(seats - 1, turn);
  for (int64_t k = 1; k < seats / 2; ++k)
    pair((turn + k) % circle, (turn - k + circle) % circle);
}

inline int64_t symmetric_rounds(int64_t blocks) { return blocks < 2 ? 1 : blocks + blocks % 2; }

/// A Latin square: in round r, row block a meets column block (a + r) mod rounds.
template <typename Append>
void latin_round(int64_t row_blocks, int64_t column_blocks, int64_t round, const Append& append) {
  const int64_t rounds = std::max(row_blocks, column_blocks);
  for (int64_t row = 0; row < row_blocks; ++row) {
    const int64_t column = (row + round) % rounds;
    if (column < column_blocks) append(row, column);
  }
}

/// Run `task(tile_task)` for all tasks on all threads; tasks may come in any order.
template <typename Task>
void run_tasks(const std::vector<TileTask>& tasks, const Task& task) {
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    const KernelScope scope;  // dispatch state does not follow into worker threads
    for (int64_t i = begin; i < end; ++i)
      task(tasks[static_cast<size_t>(i)]);
  });
}

/// All tiles of the symmetric relations of a group of problems, given the number of row blocks of each.
template <typename Task>
void run_symmetric(const std::vector<int64_t>& blocks, const Task& task) {
  int64_t rounds = 0;
  for (const int64_t count : blocks)
    rounds = std::max(rounds, symmetric_rounds(count));
  std::vector<TileTask> tasks;
  for (int64_t round = 0; round < rounds; ++round) {
    tasks.clear();
    for (size_t problem = 0; problem < blocks.size(); ++problem) {
      symmetric_round(blocks[problem], round, [&](int64_t row, int64_t column) {
        tasks.push_back({static_cast<int64_t>(problem), row, column});
      });
    }
    run_tasks(tasks, task);
  }
}

}  // namespace linearard::cpu
