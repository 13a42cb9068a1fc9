
#include "cpu/attention_call.h"
#include "cpu/refine.h"
#include "cpu/relation.h"

namespace linearard::cpu {
AttentionCall::AttentionCall(const AttentionArguments& attention_arguments, const at::Tensor* grad_kl)
    : arguments(attention_arguments),
      form(choose_logit_form(arguments, grad_kl)),
      query_sets(row_sets(arguments.query_student.size(0),
                          arguments.query_student.size(2),
                          arguments.query_padding_mask,
                          arguments.cu_seqlens)),
      key_sets(row_sets(arguments.key_student.size(0),
                        arguments.key_student.size(2),
                        arguments.key_padding_mask,
                        arguments.cu_seqlens_key)) {
  int64_t longest = 0;
  for (size_t i = 0; i < query_sets.size(); ++i) {
    if (query_sets[i].length == 0 || key_sets[i].length == 0) continue;
    longest = std::max({longest, query_sets[i].length, key_sets[i].length});
    sequences.push_back({&query_sets[i], &key_sets[i], visible_keys(query_sets[i], key_sets[i], arguments.causal)});
  }
  tile_rows = tile_rows_for(longest, std::max(arguments.query_student.size(-1), arguments.query_teacher.size(-1)));
  const int64_t key_heads = arguments.key_student.size(1);
  for (const SequencePair& sequence : sequences) {
    for (int64_t key_head = 0; key_head < key_heads; ++key_head) {
      const int64_t heads = arguments.query_student.size(1) / key_heads;
      groups.push_back({&sequence, key_head, key_head * heads, heads});
    }
  }
}

PackedGroup AttentionCall::pack(const HeadGroup& group) const {
  const RowSet& queries = *group.sequence->queries;
  const RowSet& keys = *group.sequence->keys;
  const int64_t heads_per_teacher_key = arguments.query_student.size(1) / arguments.key_teacher.size(1);
  PackedGroup packed;
  int64_t packed_teacher_head = -1;
  for (int64_t head = 0; head < group.heads; ++head) {
    packed.queries.emplace_back(query_rows(arguments.query_student, group, head),
                                query_rows(arguments.query_teacher, group, head), queries, form, tile_rows);
    const int64_t teacher_head = (group.first_head + head) / heads_per_teacher_key;
    if (teacher_head != packed_teacher_head) {
      packed.keys.push_back(std::make_shared<const Operand>(
          arguments.key_student.select(0, keys.batch).select(0, group.key_head),
          arguments.key_teacher.select(0, keys.batch).select(0, teacher_head), keys, form, tile_rows));
      packed_teacher_head = teacher_head;
    } else {
      packed.keys.push_back(packed.keys.back());
    }
  }
  return packed;
}

template <typename Real>
std::vector<std::vector<RowResult>> attention_statistics(const AttentionCall& call,
                                                         const HeadGroup& group,
                                                         const PackedGroup& packed,
                                                         const TileBuffers& buffers) {
  const int64_t length = group.sequence->queries->length;
  std::vector<std::vector<RowStatistics>> statistics(static_cast<size_t>(group.heads), empty_statistics(length));
  for_each_row_block(call, group, [&](int64_t head, int64_t row_block) {
    // From the last column on: in the causal form that is where every row sees its own key.
    for (int64_t column_block = call.column_blocks(group) - 1; column_block >= 0; --column_block) {
      visit_tile<Real>(
          call, group, packed, {head, row_block, column_block}, buffers, [&](const LogitTile<Real>& logits) {
            tile_kernels<Real>().accumulate_rows(logits.tile, &statistics[head][row_block * call.tile_rows]);
          });
    }
  });
  std::vector<std::vector<RowResult>> results;
  for (size_t head = 0; head < statistics.size(); ++head) {
    std::vector<RowResult>& finished = results.emplace_back();
    finished.reserve(statistics[head].size());
    for (const RowStatistics& row : statistics[head])
      finished.push_back(finish_row(row, kUnitRoundoff<Real>));
    refine_rows(
        call.form, packed.queries[head], *packed.keys[head], [&](int64_t row) { return group.sequence->visible[row]; },
        finished);
  }
  return results;
}

template <typename Real>
void attention_expectation(const AttentionCall& call,
                           Expectation expectation,
                           const HeadGroup& group,
                           const PackedGroup& packed,
                           const TileBuffers& buffers,
                           std::vector<RowVectors<Real>>& vectors) {
  for_each_row_block(call, group, [&](int64_t head, int64_t row_block) {
    const RowReference<Real> rows = vectors[head].reference(row_block * call.tile_rows, false);
    for (int64_t column_block = 0; column_block < call.column_blocks(group); ++column_block) {
      visit_tile<Real>(
          call, group, packed, {head, row_block, column_block}, buffers, [&](const LogitTile<Real>& logits) {
            tile_kernels<Real>().accumulate_expectation(
                expectation, TileKind::kRows, static_cast<Real>(call.arguments.beta), logits.tile, rows, rows);
          });
    }
  });
}

#define LINEARARD_INSTANTIATE(Real)                                                                                  \
  template std::vector<std::vector<RowResult>> attention_statistics<Real>(const AttentionCall&, const HeadGroup&,    \
                                                                          const PackedGroup&, const TileBuffers&);   \
  template void attention_expectation<Real>(const AttentionCall&, Expectation, const HeadGroup&, const PackedGroup&, \
                                            const TileBuffers&, std::vector<RowVectors<Real>>&);
LINEARARD_INSTANTIATE(float)
LINEARARD_INSTANTIATE(double)
#undef LINEARARD_INSTANTIATE

}  // namespace linearard::cpu
