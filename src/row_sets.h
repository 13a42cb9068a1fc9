#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace linearard {

/// The real tokens of one sequence: rows that relate to each other. Padding is in no set and is never read.
struct RowSet {
  int64_t batch;
  int64_t sequence_begin;   ///< first position of the sequence in dimension N, padding included
  int64_t sequence_length;  ///< its length, padding included
  int64_t begin;            ///< first row, where the rows are consecutive
  int64_t length;           ///< number of rows
  at::Tensor indices;       ///< [length] int64 on the CPU where padding lies between the rows, else undefined

  /// Position of a row in dimension N.
  int64_t position(int64_t row) const {
    return indices.defined() ? indices.const_data_ptr<int64_t>()[row] : begin + row;
  }
};

/// One set for each sequence of each batch entry (empty sets included): `cu_seqlens` cuts batch entry 0 into several.
/// @param key_padding_mask [B, N] bool on any device, @param cu_seqlens [S + 1] on any device
std::vector<RowSet> row_sets(int64_t batches,
                             int64_t length,
                             const std::optional<at::Tensor>& key_padding_mask,
                             const std::optional<at::Tensor>& cu_seqlens);

/// The rows of a set out of a tensor with dimension N at `dimension`: a view where they are consecutive.
at::Tensor take_rows(const at::Tensor& tensor, const RowSet& rows, int64_t dimension = 0);

/// Write `values` to the rows of a set in a tensor with dimension N at `dimension`.
void put_rows(const at::Tensor& tensor, const RowSet& rows, const at::Tensor& values, int64_t dimension = 0);

/// Number of leading keys that each query sees: all of them, or, causal, those up to i + (keys - queries): aligned to
/// the bottom right, in positions that count padding (padding itself is in neither set).
std::vector<int64_t> visible_keys(const RowSet& queries, const RowSet& keys, bool causal);

}  // namespace linearard
