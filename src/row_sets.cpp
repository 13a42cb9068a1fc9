#include "row_sets.h"

#include <ATen/ops/tensor.h>

namespace linearard {
namespace {

RowSet real_rows(int64_t batch, int64_t begin, int64_t length, const bool* mask) {
  RowSet rows{batch, begin, length, begin, length, {}};
  if (mask == nullptr) return rows;
  std::vector<int64_t> positions;
  for (int64_t i = begin; i < begin + length; ++i) {
    if (mask[i]) positions.push_back(i);
  }
  rows.length = static_cast<int64_t>(positions.size());
  if (rows.length == 0) return rows;
  rows.begin = positions.front();
  const bool consecutive = positions.back() - positions.front() + 1 == rows.length;
  if (!consecutive) rows.indices = at::tensor(positions, at::kLong);
  return rows;
}

}  // namespace

std::vector<RowSet> row_sets(int64_t batches,
                             int64_t length,
                             const std::optional<at::Tensor>& key_padding_mask,
                             const std::optional<at::Tensor>& cu_seqlens) {
  at::Tensor mask;
  if (key_padding_mask) mask = key_padding_mask->to(at::kCPU).contiguous();
  std::vector<int64_t> boundaries{0, length};
  if (cu_seqlens) {
    const at::Tensor host = cu_seqlens->to(at::kCPU, at::kLong).contiguous();
    boundaries.assign(host.const_data_ptr<int64_t>(), host.const_data_ptr<int64_t>() + host.numel());
  }
  std::vector<RowSet> sets;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const bool* row_mask = mask.defined() ? mask.const_data_ptr<bool>() + batch * length : nullptr;
    for (size_t s = 0; s + 1 < boundaries.size(); ++s) {
      sets.push_back(real_rows(batch, boundaries[s], boundaries[s + 1] - boundaries[s], row_mask));
    }
  }
  return sets;
}

at::Tensor take_rows(const at::Tensor& tensor, const RowSet& rows, int64_t dimension) {
  if (!rows.indices.defined()) return tensor.narrow(dimension, rows.begin, rows.length);
  return tensor.index_select(dimension, rows.indices.to(tensor.device()));
}

void put_rows(const at::Tensor& tensor, const RowSet& rows, const at::Tensor& values, int64_t dimension) {
  if (!rows.indices.defined()) {
    tensor.narrow(dimension, rows.begin, rows.length).copy_(values);
  } else {
    tensor.index_copy_(dimension, rows.indices.to(tensor.device()), values.to(tensor.scalar_type()));
  }
}

std::vector<int64_t> visible_keys(const RowSet& queries, const RowSet& keys, bool causal) {
  std::vector<int64_t> visible(static_cast<size_t>(queries.length), keys.length);
  if (!causal) return visible;
  int64_t seen = 0;
  for (int64_t i = 0; i < queries.length; ++i) {
    const int64_t position = queries.position(i) - queries.sequence_begin;
    const int64_t last = position + keys.sequence_length - queries.sequence_length;
    while (seen < keys.length && keys.position(seen) - keys.sequence_begin <= last)
      ++seen;
    visible[i] = seen;
  }
  return visible;
}

}  // namespace linearard
