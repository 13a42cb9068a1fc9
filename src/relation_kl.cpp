#include <linearard/relation_kl.h>

#include <torch/library.h>

#include "checks.h"
#include "operators.h"
#include "reduction.h"

namespace linearard {

at::Tensor relation_kl(const at::Tensor& student, const at::Tensor& teacher, const RelationOptions& options) {
  constexpr const char* kName = "relation_kl";
  check_relation(kName, student, teacher, options);
  check_frozen(kName, "teacher", teacher);
  check_reduction(kName, student, options.row_weight(), options.reduction(), options.num_items());
  const at::Tensor kl = std::get<0>(call_relation_kl_forward(student, teacher, options));
  return reduce_rows(kl, options.key_padding_mask(), options.row_weight(), options.reduction(), options.num_items());
}

ThreeTensors relation_kl_forward(const at::Tensor& student, const at::Tensor& teacher, const RelationOptions& options) {
  return call_relation_kl_forward(student, teacher, options);
}

at::Tensor relation_kl_backward(const at::Tensor& grad_kl,
                                const at::Tensor& student,
                                const at::Tensor& teacher,
                                const at::Tensor& lse_student,
                                const at::Tensor& lse_teacher,
                                const RelationOptions& options) {
  return call_relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, options);
}

at::Tensor relation_lse(const at::Tensor& x, const RelationOptions& options) { return call_relation_lse(x, options); }

namespace {

at::Tensor relation_kl_operator(const at::Tensor& student,
                                const at::Tensor& teacher,
                                const OptionalTensor& key_padding_mask,
                                const OptionalTensor& cu_seqlens,
                                const OptionalTensor& row_weight,
                                std::optional<double> scale_student,
                                std::optional<double> scale_teacher,
                                bool causal,
                                std::string_view divergence,
                                double beta,
                                std::string_view reduction,
                                const OptionalTensor& num_items,
                                std::optional<bool> deterministic,
                                const OptionalTensor& lse_teacher) {
  constexpr const char* kName = "relation_kl";
  RelationOptions options = relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                             divergence, beta, deterministic);
  options.row_weight(row_weight).reduction(parse_reduction(reduction, kName)).num_items(num_items);
  return relation_kl(student, teacher, options.lse_teacher(lse_teacher));
}

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CompositeImplicitAutograd, m) { m.impl("relation_kl", &linearard::relation_kl_operator); }
