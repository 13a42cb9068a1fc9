#include "cpu/attention.h"

#include <cmath>

#include <ATen/ops/zeros.h>

#include "cpu/attention_call.h"
#include "saturation.h"

namespace linearard::cpu {
namespace {

template <typename Real>
void forward_groups(const AttentionCall& call,
                    const at::Tensor& kl,
                    const at::Tensor& lse_student,
                    const at::Tensor& lse_teacher) {
  const TileBuffers buffers(call.tile_rows, call.form.compute);
  for (const HeadGroup& group : call.groups) {
    const PackedGroup packed = call.pack(group);
    auto results = attention_statistics<Real>(call, group, packed, buffers);
    if (call.arguments.divergence == Divergence::kJSD) {
      auto vectors = vectors_of<Real>(results);
      attention_expectation<Real>(call, Expectation::kJsdValue, group, packed, buffers, vectors);
      for (size_t head = 0; head < results.size(); ++head) {
        for (size_t i = 0; i < results[head].size(); ++i) {
          results[head][i].kl = bounded_jsd(static_cast<double>(vectors[head].sum[i]), call.arguments.beta);
        }
      }
    }
    for (int64_t head = 0; head < group.heads; ++head) {
      const auto write = [&](const at::Tensor& output, double RowResult::* field) {
        write_rows(call.query_rows(output, group, head), *group.sequence->queries, results[head], field);
      };
      write(kl, &RowResult::kl);
      write(lse_student, &RowResult::lse_student);
      write(lse_teacher, &RowResult::lse_teacher);
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(const AttentionArguments& arguments) {
  const KernelScope scope;
  AttentionArguments roles = arguments;
  // KL(Q || P) is KL(P || Q) with the roles exchanged.
  const bool exchanged = arguments.divergence == Divergence::kReverseKL;
  if (exchanged) {
    std::swap(roles.query_student, roles.query_teacher);
    std::swap(roles.key_student, roles.key_teacher);
    std::swap(roles.scale_student, roles.scale_teacher);
  }
  const auto options = arguments.query_student.options().dtype(statistics_dtype(arguments));
  const auto shape = arguments.query_student.sizes().slice(0, 3);
  at::Tensor kl = at::zeros(shape, options);
  at::Tensor lse_student = at::zeros(shape, options);
  at::Tensor lse_teacher = at::zeros(shape, options);
  const AttentionCall call(roles, nullptr);
  if (call.form.compute == at::kFloat) {
    forward_groups<float>(call, kl, lse_student, lse_teacher);
  } else {
    forward_groups<double>(call, kl, lse_student, lse_teacher);
  }
  if (exchanged) std::swap(lse_student, lse_teacher);
  return {kl, lse_student, lse_teacher};
}

namespace {

/// The row vectors of a group: saved statistics (computed again for inputs beyond float's range) and gradient.
template <typename Real>
std::vector<RowVectors<Real>> load_vectors(const AttentionCall& call,
                                           const at::Tensor& grad_kl,
                                           const at::Tensor& lse_student,
                                           const at::Tensor& lse_teacher,
                                           const HeadGroup& group,
                                           const PackedGroup& packed,
                                           const TileBuffers& buffers) {
  const RowSet& queries = *group.sequence->queries;
  std::vector<RowVectors<Real>> vectors;
  if (call.form.wide) {
    vectors = vectors_of<Real>(attention_statistics<Real>(call, group, packed, buffers));
  } else {
    for (int64_t head = 0; head < group.heads; ++head) {
      RowVectors<Real>& rows = vectors.emplace_back(queries.length);
      load_rows(call.query_rows(lse_teacher, group, head), queries, rows.lse_teacher);
      load_rows(call.query_rows(lse_student, group, head), queries, rows.lse_difference);
      for (size_t i = 0; i < rows.lse_difference.size(); ++i)
        rows.lse_difference[i] -= rows.lse_teacher[i];
    }
  }
  for (int64_t head = 0; head < group.heads; ++head) {
    std::vector<Real>& weight = vectors[head].weight;
    load_rows(call.query_rows(grad_kl, group, head), queries, weight);
    for (int64_t i = 0; i < queries.length; ++i) {
      // A query that sees one key has no divergence and, exactly, no gradient.
      if (group.sequence->visible[i] == 1) weight[i] = 0;
    }
    vectors[head].scale_weight(call.form.gradient_multiplier);
  }
  if (call.arguments.divergence == Divergence::kForwardKL) return vectors;
  attention_expectation<Real>(call, mean_kind(call.arguments.divergence), group, packed, buffers, vectors);
  for (RowVectors<Real>& rows : vectors)
    rows.sums_become_means(call.arguments.divergence, call.arguments.beta);
  return vectors;
}

/// For each row of each head the key that has most of its probability, -1 where none has.
using DominantKeys = std::vector<std::vector<int64_t>>;

/// dQ = G K and dK = G^T Q over all tiles of a group, without scale; vectors[head].sum collects the row sums of G.
template <typename Real>
DominantKeys accumulate_gradients(const AttentionCall& call,
                                  const HeadGroup& group,
                                  const PackedGroup& packed,
                                  const TileBuffers& buffers,
                                  std::vector<RowVectors<Real>>& vectors,
                                  const std::vector<BlockedMatrix>& grad_queries,
                                  const BlockedMatrix& grad_keys) {
  const int64_t row_blocks = call.row_blocks(group);
  const int64_t all_row_blocks = group.heads * row_blocks;
  const int64_t column_blocks = call.column_blocks(group);
  const Gradient gradient = gradient_kind(call.arguments.divergence);
  const int64_t rounds = std::max(all_row_blocks, column_blocks);
  DominantKeys dominant(vectors.size(), std::vector<int64_t>(group.sequence->queries->length, -1));
  std::vector<TileTask> tasks;
  for (int64_t round = 0; round < rounds; ++round) {
    tasks.clear();
    latin_round(all_row_blocks, column_blocks, round,
                [&](int64_t row, int64_t column) { tasks.push_back({row / row_blocks, row % row_blocks, column}); });
    run_tasks(tasks, [&](const TileTask& task) {
      const int64_t head = task.problem;
      visit_tile<Real>(call, group, packed, {head, task.row_block, task.column_block}, buffers,
                       [&](const LogitTile<Real>& logits) {
                         const int64_t first_row = task.row_block * call.tile_rows;
                         RowReference<Real> rows = vectors[head].reference(first_row, true);
                         rows.dominant = dominant[head].data() + first_row;
                         rows.first_key = task.column_block * call.tile_rows;
                         tile_kernels<Real>().gradient(gradient, TileKind::kRows,
                                                       static_cast<Real>(call.arguments.beta), logits.tile, rows, rows);
                         grad_queries[head].blocks[task.row_block].addmm_(
                             logits.teacher, packed.keys[head]->gradient.blocks[task.column_block]);
                         grad_keys.blocks[task.column_block].addmm_(
                             logits.teacher.t(), packed.queries[head].gradient.blocks[task.row_block]);
                       });
    });
  }
  return dominant;
}

/// A row of G sums to zero. Where one key has most of the row, its G is minus the sum of the others: a difference of
/// the log-sum-exps' roundings would otherwise stand there, and in a saturated row it is larger than the gradient.
template <typename Real>
void balance_rows(const PackedGroup& packed,
                  const DominantKeys& dominant,
                  const std::vector<RowVectors<Real>>& vectors,
                  const std::vector<BlockedMatrix>& grad_queries,
                  const BlockedMatrix& grad_keys) {
  const auto row_of = [](const at::Tensor& matrix, int64_t row) {
    return static_cast<Real*>(matrix.data_ptr()) + row * matrix.stride(0);
  };
  for (size_t head = 0; head < dominant.size(); ++head) {
    const at::Tensor& queries = packed.queries[head].gradient.whole;
    const at::Tensor& keys = packed.keys[head]->gradient.whole;
    for (size_t i = 0; i < dominant[head].size(); ++i) {
      const int64_t key_index = dominant[head][i];
      if (key_index < 0) continue;
      const auto row = static_cast<int64_t>(i);
      const Real rest = -vectors[head].sum[i];
      const Real* query = row_of(queries, row);
      const Real* key = row_of(keys, key_index);
      Real* grad_query = row_of(grad_queries[head].whole, row);
      Real* grad_key = row_of(grad_keys.whole, key_index);
      for (int64_t d = 0; d < keys.size(1); ++d) {
        grad_query[d] += rest * key[d];
        grad_key[d] += rest * query[d];
      }
    }
  }
}

template <typename Real>
void backward_groups(const AttentionCall& call,
                     const at::Tensor& grad_kl,
                     const at::Tensor& lse_student,
                     const at::Tensor& lse_teacher,
                     const at::Tensor& grad_query,
                     const at::Tensor& grad_key) {
  const TileBuffers buffers(call.tile_rows, call.form.compute);
  const int64_t dimension = call.arguments.query_student.size(-1);
  const double scale = call.form.gradient_scale(call.arguments.scale_student);
  for (const HeadGroup& group : call.groups) {
    const RowSet& queries = *group.sequence->queries;
    const RowSet& keys = *group.sequence->keys;
    const PackedGroup packed = call.pack(group);
    auto vectors = load_vectors<Real>(call, grad_kl, lse_student, lse_teacher, group, packed, buffers);
    std::vector<BlockedMatrix> grad_queries;
    grad_queries.reserve(static_cast<size_t>(group.heads));
    for (int64_t head = 0; head < group.heads; ++head) {
      grad_queries.emplace_back(at::zeros({queries.length, dimension}, call.form.compute), call.tile_rows);
    }
    const BlockedMatrix grad_keys(at::zeros({keys.length, dimension}, call.form.compute), call.tile_rows);
    const DominantKeys dominant =
        accumulate_gradients<Real>(call, group, packed, buffers, vectors, grad_queries, grad_keys);
    balance_rows<Real>(packed, dominant, vectors, grad_queries, grad_keys);
    for (int64_t head = 0; head < group.heads; ++head) {
      put_rows(call.query_rows(grad_query, group, head), queries,
               saturating_cast(grad_queries[head].whole.mul_(scale).div_(call.form.gradient_multiplier),
                               grad_query.scalar_type()));
    }
    put_rows(grad_key.select(0, keys.batch).select(0, group.key_head), keys,
             saturating_cast(grad_keys.whole.mul_(scale).div_(call.form.gradient_multiplier), grad_key.scalar_type()));
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad_kl,
                                                      const at::Tensor& lse_student,
                                                      const at::Tensor& lse_teacher,
                                                      const AttentionArguments& arguments) {
  const KernelScope scope;
  at::Tensor grad_query = at::zeros(arguments.query_student.sizes(), arguments.query_student.options());
  at::Tensor grad_key = at::zeros(arguments.key_student.sizes(), arguments.key_student.options());
  const AttentionCall call(arguments, &grad_kl);
  if (call.form.compute == at::kFloat) {
    backward_groups<float>(call, grad_kl, lse_student, lse_teacher, grad_query, grad_key);
  } else {
    backward_groups<double>(call, grad_kl, lse_student, lse_teacher, grad_query, grad_key);
  }
  return {grad_query, grad_key};
}

}  // namespace linearard::cpu
