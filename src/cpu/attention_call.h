#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/kernels/tile_kernels.h"
#include "cpu/operand.h"
#include "cpu/schedule.h"
#include "cpu/statistics.h"
#include "logit_form.h"
#include "row_sets.h"

// What forward and backward of the attention kernels share.

namespace linearard::cpu {

/// Queries and keys of one sequence.
struct SequencePair {
  const RowSet* queries;
  const RowSet* keys;
  std::vector<int64_t> visible;  ///< [queries] number of leading keys that each query sees
};

/// The query heads of one sequence that share a key head of the student.
struct HeadGroup {
  const SequencePair* sequence;
  int64_t key_head;
  int64_t first_head;
  int64_t heads;
};

/// The packed rows of a head group: queries of each head; keys of each head, shared where its teacher keys are too.
struct PackedGroup {
  std::vector<Operand> queries;
  std::vector<std::shared_ptr<const Operand>> keys;
};

struct AttentionCall {
  /// @param grad_kl upstream gradient in the backward, null in the forward
  AttentionCall(const AttentionArguments& arguments, const at::Tensor* grad_kl);

  const AttentionArguments& arguments;
  LogitForm form;
  std::vector<RowSet> query_sets;
  std::vector<RowSet> key_sets;
  std::vector<SequencePair> sequences;
  std::vector<HeadGroup> groups;
  int64_t tile_rows = 0;

  int64_t row_blocks(const HeadGroup& group) const { return block_count(group.sequence->queries->length, tile_rows); }
  int64_t column_blocks(const HeadGroup& group) const { return block_count(group.sequence->keys->length, tile_rows); }
  PackedGroup pack(const HeadGroup& group) const;
  at::Tensor query_rows(const at::Tensor& tensor, const HeadGroup& group, int64_t head) const {
    return tensor.select(0, group.sequence->queries->batch).select(0, group.first_head + head);
  }
};

/// Index of a tile inside a head group: row blocks of all its heads are counted through.
struct AttentionTile {
  int64_t head;
  int64_t row_block;
  int64_t column_block;
};

/// Computes the logits of a tile and calls `visit(logits)`, unless no row of it sees a key of it.
template <typename Real, typename Visit>
void visit_tile(const AttentionCall& call,
                const HeadGroup& group,
                const PackedGroup& packed,
                const AttentionTile& index,
                const TileBuffers& buffers,
                const Visit& visit) {
  const int64_t first_row = index.row_block * call.tile_rows;
  const int64_t first_column = index.column_block * call.tile_rows;
  const int64_t rows = std::min(call.tile_rows, group.sequence->queries->length - first_row);
  const int64_t columns = std::min(call.tile_rows, group.sequence->keys->length - first_column);
  std::vector<int64_t> visible(static_cast<size_t>(rows));
  bool any = false;
  for (int64_t i = 0; i < rows; ++i) {
    visible[i] = std::clamp<int64_t>(group.sequence->visible[first_row + i] - first_column, 0, columns);
    any = any || visible[i] > 0;
  }
  if (!any) return;
  LogitTile<Real> logits(call.form, packed.queries[index.head], index.row_block, *packed.keys[index.head],
                         index.column_block, buffers.of_this_thread());
  logits.tile.visible = visible.data();
  visit(logits);
}

/// Runs `task(head, row_block)` for every block of rows of a packed group on all threads.
template <typename Task>
void for_each_row_block(const AttentionCall& call, const HeadGroup& group, const Task& task) {
  std::vector<TileTask> tasks;
  for (int64_t head = 0; head < group.heads; ++head) {
    for (int64_t block = 0; block < call.row_blocks(group); ++block)
      tasks.push_back({head, block, 0});
  }
  run_tasks(tasks, [&](const TileTask& index) { task(index.problem, index.row_block); });
}

/// Statistics of all rows of a group, finished: [head][row].
template <typename Real>
std::vector<std::vector<RowResult>> attention_statistics(const AttentionCall& call,
                                                         const HeadGroup& group,
                                                         const PackedGroup& packed,
                                                         const TileBuffers& buffers);

/// Sum of an expectation over every row of a group, into `sum` of the row vectors.
template <typename Real>
void attention_expectation(const AttentionCall& call,
                           Expectation expectation,
                           const HeadGroup& group,
                           const PackedGroup& packed,
                           const TileBuffers& buffers,
                           std::vector<RowVectors<Real>>& vectors);

}  // namespace linearard::cpu
