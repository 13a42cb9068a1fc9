#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <linearard/options.h>

// The operators as the dispatcher knows them: signatures of the schemas in ops.cpp, and calls through the dispatcher.

namespace linearard {

using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

using TensorVector = std::vector<at::Tensor>;
using ThreeTensorVectors = std::tuple<TensorVector, TensorVector, TensorVector>;

using RelationForwardSignature = ThreeTensors(const at::Tensor& student,
                                              const at::Tensor& teacher,
                                              const OptionalTensor& key_padding_mask,
                                              const OptionalTensor& cu_seqlens,
                                              std::optional<double> scale_student,
                                              std::optional<double> scale_teacher,
                                              bool causal,
                                              std::string_view divergence,
                                              double beta,
                                              std::optional<bool> deterministic,
                                              const OptionalTensor& lse_teacher);

using RelationBackwardSignature = at::Tensor(const at::Tensor& grad_kl,
                                             const at::Tensor& student,
                                             const at::Tensor& teacher,
                                             const at::Tensor& lse_student,
                                             const at::Tensor& lse_teacher,
                                             const OptionalTensor& key_padding_mask,
                                             const OptionalTensor& cu_seqlens,
                                             std::optional<double> scale_student,
                                             std::optional<double> scale_teacher,
                                             bool causal,
                                             std::string_view divergence,
                                             double beta,
                                             std::optional<bool> deterministic);

using LayerForwardSignature = ThreeTensorVectors(at::TensorList students,
                                                 at::TensorList teachers,
                                                 const OptionalTensor& key_padding_mask,
                                                 const OptionalTensor& cu_seqlens,
                                                 std::optional<double> scale_student,
                                                 std::optional<double> scale_teacher,
                                                 bool causal,
                                                 std::string_view divergence,
                                                 double beta,
                                                 std::optional<bool> deterministic);

using LayerBackwardSignature = TensorVector(at::TensorList grad_kl,
                                            at::TensorList students,
                                            at::TensorList teachers,
                                            at::TensorList lse_student,
                                            at::TensorList lse_teacher,
                                            const OptionalTensor& key_padding_mask,
                                            const OptionalTensor& cu_seqlens,
                                            std::optional<double> scale_student,
                                            std::optional<double> scale_teacher,
                                            bool causal,
                                            std::string_view divergence,
                                            double beta,
                                            std::optional<bool> deterministic);

using RelationLseSignature = at::Tensor(const at::Tensor& x,
                                        const OptionalTensor& key_padding_mask,
                                        const OptionalTensor& cu_seqlens,
                                        std::optional<double> scale,
                                        bool causal,
                                        std::optional<bool> deterministic);

using AttentionForwardSignature = ThreeTensors(const at::Tensor& query_student,
                                               const at::Tensor& key_student,
                                               const at::Tensor& query_teacher,
                                               const at::Tensor& key_teacher,
                                               const OptionalTensor& query_padding_mask,
                                               const OptionalTensor& key_padding_mask,
                                               const OptionalTensor& cu_seqlens,
                                               const OptionalTensor& cu_seqlens_key,
                                               std::optional<double> scale_student,
                                               std::optional<double> scale_teacher,
                                               bool causal,
                                               std::string_view divergence,
                                               double beta,
                                               std::optional<bool> deterministic);

using AttentionBackwardSignature = TwoTensors(const at::Tensor& grad_kl,
                                              const at::Tensor& query_student,
                                              const at::Tensor& key_student,
                                              const at::Tensor& query_teacher,
                                              const at::Tensor& key_teacher,
                                              const at::Tensor& lse_student,
                                              const at::Tensor& lse_teacher,
                                              const OptionalTensor& query_padding_mask,
                                              const OptionalTensor& key_padding_mask,
                                              const OptionalTensor& cu_seqlens,
                                              const OptionalTensor& cu_seqlens_key,
                                              std::optional<double> scale_student,
                                              std::optional<double> scale_teacher,
                                              bool causal,
                                              std::string_view divergence,
                                              double beta,
                                              std::optional<bool> deterministic);

/// Calls through the dispatcher: autograd, tracing and the backend of the tensors take their turns.
ThreeTensors call_relation_kl_forward(const at::Tensor& student,
                                      const at::Tensor& teacher,
                                      const RelationOptions& options);
at::Tensor call_relation_kl_backward(const at::Tensor& grad_kl,
                                     const at::Tensor& student,
                                     const at::Tensor& teacher,
                                     const at::Tensor& lse_student,
                                     const at::Tensor& lse_teacher,
                                     const RelationOptions& options);
ThreeTensorVectors call_layer_relation_kl_forward(at::TensorList students,
                                                  at::TensorList teachers,
                                                  const RelationOptions& options);
TensorVector call_layer_relation_kl_backward(at::TensorList grad_kl,
                                             at::TensorList students,
                                             at::TensorList teachers,
                                             at::TensorList lse_student,
                                             at::TensorList lse_teacher,
                                             const RelationOptions& options);
at::Tensor call_mean_of_rows(const at::Tensor& kl);
at::Tensor call_mean_of_rows_backward(const at::Tensor& grad, const c10::SymInt& count);
TwoTensors call_means_of_rows(at::TensorList kl);
at::Tensor call_relation_lse(const at::Tensor& x, const RelationOptions& options);
ThreeTensors call_attention_kl_forward(const at::Tensor& query_student,
                                       const at::Tensor& key_student,
                                       const at::Tensor& query_teacher,
                                       const at::Tensor& key_teacher,
                                       const AttentionOptions& options);
TwoTensors call_attention_kl_backward(const at::Tensor& grad_kl,
                                      const at::Tensor& query_student,
                                      const at::Tensor& key_student,
                                      const at::Tensor& query_teacher,
                                      const at::Tensor& key_teacher,
                                      const at::Tensor& lse_student,
                                      const at::Tensor& lse_teacher,
                                      const AttentionOptions& options);

/// Options of the kernels out of an operator's arguments; an unknown divergence is an error of `operator_name`.
RelationOptions relation_options(const char* operator_name,
                                 const OptionalTensor& key_padding_mask,
                                 const OptionalTensor& cu_seqlens,
                                 std::optional<double> scale_student,
                                 std::optional<double> scale_teacher,
                                 bool causal,
                                 std::string_view divergence,
                                 double beta,
                                 std::optional<bool> deterministic);
AttentionOptions attention_options(const char* operator_name,
                                   const OptionalTensor& query_padding_mask,
                                   const OptionalTensor& key_padding_mask,
                                   const OptionalTensor& cu_seqlens,
                                   const OptionalTensor& cu_seqlens_key,
                                   std::optional<double> scale_student,
                                   std::optional<double> scale_teacher,
                                   bool causal,
                                   std::string_view divergence,
                                   double beta,
                                   std::optional<bool> deterministic);

}  // namespace linearard
