#include <linearard/attention_kl.h>

#include <torch/library.h>

#include "checks.h"
#include "operators.h"
#include "reduction.h"

namespace linearard {

at::Tensor attention_kl(const at::Tensor& query_student,
                        const at::Tensor& key_student,
                        const at::Tensor& query_teacher,
                        const at::Tensor& key_teacher,
                        const AttentionOptions& options) {
  constexpr const char* kName = "attention_kl";
  const AttentionArguments arguments =
      check_attention(kName, query_student, key_student, query_teacher, key_teacher, options);
  check_frozen(kName, "query_teacher", query_teacher);
  check_frozen(kName, "key_teacher", key_teacher);
  check_reduction(kName, query_student, options.row_weight(), options.reduction(), options.num_items());
  const at::Tensor kl =
      std::get<0>(call_attention_kl_forward(query_student, key_student, query_teacher, key_teacher, options));
  return reduce_rows(kl, arguments.query_padding_mask, options.row_weight(), options.reduction(), options.num_items());
}

ThreeTensors attention_kl_forward(const at::Tensor& query_student,
                                  const at::Tensor& key_student,
                                  const at::Tensor& query_teacher,
                                  const at::Tensor& key_teacher,
                                  const AttentionOptions& options) {
  return call_attention_kl_forward(query_student, key_student, query_teacher, key_teacher, options);
}

TwoTensors attention_kl_backward(const at::Tensor& grad_kl,
                                 const at::Tensor& query_student,
                                 const at::Tensor& key_student,
                                 const at::Tensor& query_teacher,
                                 const at::Tensor& key_teacher,
                                 const at::Tensor& lse_student,
                                 const at::Tensor& lse_teacher,
                                 const AttentionOptions& options) {
  return call_attention_kl_backward(grad_kl, query_student, key_student, query_teacher, key_teacher, lse_student,
                                    lse_teacher, options);
}

namespace {

at::Tensor attention_kl_operator(const at::Tensor& query_student,
                                 const at::Tensor& key_student,
                                 const at::Tensor& query_teacher,
                                 const at::Tensor& key_teacher,
                                 const OptionalTensor& query_padding_mask,
                                 const OptionalTensor& key_padding_mask,
                                 const OptionalTensor& cu_seqlens,
                                 const OptionalTensor& cu_seqlens_key,
                                 const OptionalTensor& row_weight,
                                 std::optional<double> scale_student,
                                 std::optional<double> scale_teacher,
                                 bool causal,
                                 std::string_view divergence,
                                 double beta,
                                 std::string_view reduction,
                                 const OptionalTensor& num_items,
                                 std::optional<bool> deterministic) {
  constexpr const char* kName = "attention_kl";
  AttentionOptions options = attention_options(kName, query_padding_mask, key_padding_mask, cu_seqlens, cu_seqlens_key,
                                               scale_student, scale_teacher, causal, divergence, beta, deterministic);
  options.row_weight(row_weight).reduction(parse_reduction(reduction, kName)).num_items(num_items);
  return attention_kl(query_student, key_student, query_teacher, key_teacher, options);
}

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CompositeImplicitAutograd, m) {
  m.impl("attention_kl", &linearard::attention_kl_operator);
}
