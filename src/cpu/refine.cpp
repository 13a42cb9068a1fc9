#include "cpu/refine.h"

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

}  // namespace

void refine_rows(const LogitForm& form,
                 const Operand& rows,
                 const Operand& keys,
                 const std::function<int64_t(int64_t)>& visible,
                 std::vector<RowResult>& results) {
  // In double the direct sum has digits to spare.
  if (form.compute == at::kDouble) return;
  std::vector<int64_t> chosen;
  std::vector<int64_t> visible_to_chosen;
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].cancels) continue;
    chosen.push_back(static_cast<int64_t>(i));
    visible_to_chosen.push_back(visible(static_cast<int64_t>(i)));
  }
  if (chosen.empty()) return;
  // Small blocks: this is no reason to leave the memory of tiles.
  aten::DivergenceOptions options;
  options.block_elements = int64_t{1} << 17;
  const aten::RowValues values =
      aten::divergence_forward(form, options, select_rows(as_vectors(rows), at::tensor(chosen, at::kLong)),
                               as_vectors(keys), {at::tensor(visible_to_chosen, at::kLong), false});
  const at::Tensor kl = values.kl.contiguous();
  for (size_t i = 0; i < chosen.size(); ++i) {
    results[static_cast<size_t>(chosen[i])].kl = static_cast<double>(kl.const_data_ptr<float>()[i]);
  }
}

}  // namespace linearard::cpu
