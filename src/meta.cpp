#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "backends.h"

// Shapes and dtypes without values: what torch.compile traces with. Sizes may be symbolic.

namespace linearard {
namespace {

at::Tensor empty_rows(const at::Tensor& rows_of, at::ScalarType dtype) {
  return at::empty_symint(rows_of.sym_sizes().slice(0, 3), rows_of.options().dtype(dtype));
}

at::Tensor empty_like_contiguous(const at::Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

struct MetaBackend {
  static constexpr bool kHasValues = false;
  static ThreeTensors relation_forward(const RelationArguments& arguments) {
    const at::ScalarType dtype = statistics_dtype(arguments);
    return {empty_rows(arguments.student, dtype), empty_rows(arguments.student, dtype),
            empty_rows(arguments.student, dtype)};
  }
  static at::Tensor relation_backward(const at::Tensor& /*grad_kl*/,
                                      const at::Tensor& /*lse_student*/,
                                      const at::Tensor& /*lse_teacher*/,
                                      const RelationArguments& arguments) {
    return empty_like_contiguous(arguments.student);
  }
  static at::Tensor relation_lse(const RelationArguments& arguments) {
    return empty_rows(arguments.teacher, statistics_dtype(arguments));
  }
  static ThreeTensors attention_forward(const AttentionArguments& arguments) {
    const at::ScalarType dtype = statistics_dtype(arguments);
    return {empty_rows(arguments.query_student, dtype), empty_rows(arguments.query_student, dtype),
            empty_rows(arguments.query_student, dtype)};
  }
  static TwoTensors attention_backward(const at::Tensor& /*grad_kl*/,
                                       const at::Tensor& /*lse_student*/,
                                       const at::Tensor& /*lse_teacher*/,
                                       const AttentionArguments& arguments) {
    return {empty_like_contiguous(arguments.query_student), empty_like_contiguous(arguments.key_student)};
  }
};

TwoTensors means_of_rows(at::TensorList kl) {
  at::ScalarType dtype = at::kFloat;
  for (const at::Tensor& rows : kl)
    if (rows.scalar_type() == at::kDouble) dtype = at::kDouble;
  const auto one_each = [&] { return at::empty({static_cast<int64_t>(kl.size())}, kl[0].options().dtype(dtype)); };
  return {one_each(), one_each()};
}

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, Meta, m) {
  linearard::Kernels<linearard::MetaBackend>::register_in(m);
  m.impl("means_of_rows", &linearard::means_of_rows);
}
