#include "cpu/refine.h"

#include <algorithm>

#include <ATen/ops/tensor.h>

#include "aten/divergence.h"

namespace linearard::cpu {
namespace {

aten::Vectors as_vectors(const Operand& operand) {
  const auto head = [](const BlockedMatrix& matrix) {
    return matrix.whole.defined() ? matrix.whole.unsqueeze(0) : at::Tensor();
  };
  return {head(operand.student), head(operand.teacher), head(operand.scaled_student), head(operand.difference)};
}

aten::Vectors select_rows(const aten::Vectors& vectors, const at::Tensor& indices) {
  const auto select = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.index_select(1, indices) : at::Tensor();
  };
  return {select(vectors.student), select(vectors.teacher), select(vectors.scaled_student), select(vectors.difference)};
}

/// Logits at once: this is no reason to leave the memory of tiles.
constexpr int64_t kRefineElements = int64_t{1} << 16;

int64_t refined_at_once(int64_t keys) { return std::max<int64_t>(1, kRefineElements / std::max<int64_t>(1, keys)); }

}  // namespace

int64_t refine_bytes(const LogitForm& form, int64_t rows, int64_t keys, int64_t dimension) {
  constexpr int64_t kMatrices = 16;  // of logits of a block and what aten::divergence_forward makes of them
  constexpr int64_t kOperands = 4;   // of Vectors
  const auto element = static_cast<int64_t>(c10::elementSize(form.compute));
  const int64_t rows_at_once = std::min(rows, refined_at_once(keys));
  const int64_t keys_bytes = (kMatrices * element + 8) * keys;  // the 8: numbers of the keys, as int64
  return rows_at_once * (keys_bytes + kOperands * element * dimension);
}

void refine_rows(const LogitForm& form,
                 const Operand& rows,
                 const Operand& keys,
                 const std::function<int64_t(int64_t)>& visible,
                 std::vector<RowResult>& results) {
  const aten::Vectors all_rows = as_vectors(rows);
  const aten::Vectors all_keys = as_vectors(keys);
  aten::DivergenceOptions options;
  options.block_elements = kRefineElements;
  const int64_t rows_at_once = refined_at_once(keys.length);
  std::vector<int64_t> chosen;
  std::vector<int64_t> visible_to_chosen;
  for (int64_t i = 0; i < rows.length; ++i) {
    if (results[static_cast<size_t>(i)].cancels) {
      chosen.push_back(i);
      visible_to_chosen.push_back(visible(i));
    }
    const auto count = static_cast<int64_t>(chosen.size());
    if (count == 0 || (count < rows_at_once && i + 1 < rows.length)) continue;
    const aten::RowValues values =
        aten::divergence_forward(form, options, select_rows(all_rows, at::tensor(chosen, at::kLong)), all_keys,
                                 {at::tensor(visible_to_chosen, at::kLong), false});
    const at::Tensor kl = values.kl.to(at::kDouble).contiguous();
    for (int64_t k = 0; k < count; ++k)
      results[static_cast<size_t>(chosen[k])].kl = kl.const_data_ptr<double>()[k];
    chosen.clear();
    visible_to_chosen.clear();
  }
}

}  // namespace linearard::cpu
