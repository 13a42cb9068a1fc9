#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "operators.h"

// Autograd, once for Python, C++ trainers and torch.compile.

namespace linearard {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); }
OptionalTensor or_nothing(const Variable& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

/// The options that are no tensors, which relations and attention maps have in common, into a node and out of it.
template <typename Options>
void save_options(AutogradContext& context, const Options& options) {
  auto& data = context.saved_data;
  data["scale_student"] = options.scale_student();
  data["scale_teacher"] = options.scale_teacher();
  data["causal"] = options.causal();
  data["divergence"] = static_cast<int64_t>(options.divergence());
  data["beta"] = options.beta();
  data["deterministic"] = options.deterministic();
}

template <typename Options>
Options saved_options(const AutogradContext& context) {
  const auto& data = context.saved_data;
  return Options{}
      .scale_student(data.at("scale_student").to<std::optional<double>>())
      .scale_teacher(data.at("scale_teacher").to<std::optional<double>>())
      .causal(data.at("causal").toBool())
      .divergence(static_cast<Divergence>(data.at("divergence").toInt()))
      .beta(data.at("beta").toDouble())
      .deterministic(data.at("deterministic").to<std::optional<bool>>());
}

/// Double backward would need another kernel; asking for it is an error rather than a silent zero. The node passes on
/// the gradients that a backward kernel has computed out of its differentiable arguments `from` and `student`.
class OnceDifferentiable : public Function<OnceDifferentiable> {
 public:
  static variable_list forward(AutogradContext* context,
                               const std::string& name,
                               const variable_list& gradients,
                               const Variable& /*from*/,
                               const Variable& /*student*/) {
    context->saved_data["name"] = name;
    return gradients;
  }
  static variable_list backward(AutogradContext* context, const variable_list& /*gradients*/) {
    TORCH_CHECK(false, context->saved_data["name"].toStringRef(),
                ": differentiable once only, got a request for the gradient of its gradient (create_graph=True and a "
                "second backward)");
  }
};

class RelationKL : public Function<RelationKL> {
 public:
  static variable_list forward(AutogradContext* context,
                               const Variable& student,
                               const Variable& teacher,
                               const RelationOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [kl, lse_student, lse_teacher] = call_relation_kl_forward(student, teacher, options);
    context->save_for_backward({student, teacher, lse_student, lse_teacher, or_undefined(options.key_padding_mask()),
                                or_undefined(options.cu_seqlens())});
    save_options(*context, options);
    // Or zeros would be made as gradients of the statistics.
    context->set_materialize_grads(false);
    context->mark_non_differentiable({lse_student, lse_teacher});
    return {kl, lse_student, lse_teacher};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(3);
    const variable_list saved = context->get_saved_variables();
    const auto options = saved_options<RelationOptions>(*context)
                             .key_padding_mask(or_nothing(saved[4]))
                             .cu_seqlens(or_nothing(saved[5]));
    return {call_relation_kl_backward(gradients[0], saved[0], saved[1], saved[2], saved[3], options), Variable(),
            Variable()};
  }
};

/// A student takes part in the backward where its rows have a gradient and it is asked for one.
class LayerRelationKL : public Function<LayerRelationKL> {
 public:
  static variable_list forward(AutogradContext* context,
                               at::TensorList students,
                               at::TensorList teachers,
                               const RelationOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [kl, lse_student, lse_teacher] = call_layer_relation_kl_forward(students, teachers, options);
    variable_list saved = students.vec();
    saved.insert(saved.end(), teachers.begin(), teachers.end());
    saved.insert(saved.end(), lse_student.begin(), lse_student.end());
    saved.insert(saved.end(), lse_teacher.begin(), lse_teacher.end());
    saved.push_back(or_undefined(options.key_padding_mask()));
    saved.push_back(or_undefined(options.cu_seqlens()));
    context->save_for_backward(std::move(saved));
    save_options(*context, options);
    context->set_materialize_grads(false);
    variable_list results = std::move(kl);
    variable_list statistics = std::move(lse_student);
    statistics.insert(statistics.end(), lse_teacher.begin(), lse_teacher.end());
    context->mark_non_differentiable(statistics);
    results.insert(results.end(), statistics.begin(), statistics.end());
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const size_t count = gradients.size() / 3;
    const auto options = saved_options<RelationOptions>(*context)
                             .key_padding_mask(or_nothing(saved[4 * count]))
                             .cu_seqlens(or_nothing(saved[4 * count + 1]));
    std::vector<size_t> places;
    for (size_t i = 0; i < count; ++i)
      if (gradients[i].defined() && context->needs_input_grad(i)) places.push_back(i);
    variable_list results(2 * count + 1);
    if (places.empty()) return results;
    const auto taken = [&](const variable_list& from, size_t first) {
      variable_list some;
      for (const size_t i : places)
        some.push_back(from[first + i]);
      return some;
    };
    variable_list computed = call_layer_relation_kl_backward(taken(gradients, 0), taken(saved, 0), taken(saved, count),
                                                             taken(saved, 2 * count), taken(saved, 3 * count), options);
    for (size_t i = 0; i < places.size(); ++i)
      results[places[i]] = std::move(computed[i]);
    return results;
  }
};

/// The gradient of a mean is one number, which each row refers to: no tensor of rows is made of it.
class MeanOfRows : public Function<MeanOfRows> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& kl) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->saved_data["sizes"] = kl.sym_sizes();
    context->saved_data["count"] = kl.sym_numel();
    return {call_mean_of_rows(kl)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto& data = context->saved_data;
    const at::Tensor one = call_mean_of_rows_backward(gradients[0], data.at("count").toSymInt());
    return {one.expand_symint(data.at("sizes").toSymIntVector())};
  }
};

/// The same for each tensor of a list.
class MeansOfRows : public Function<MeansOfRows> {
 public:
  static variable_list forward(AutogradContext* context, at::TensorList kl) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [mean, inverse_count] = call_means_of_rows(kl);
    std::vector<c10::SymInt> sizes;
    for (const Variable& rows : kl)
      for (const c10::SymInt& size : rows.sym_sizes())
        sizes.push_back(size);
    context->saved_data["sizes"] = sizes;
    context->save_for_backward({inverse_count});
    context->set_materialize_grads(false);
    context->mark_non_differentiable({inverse_count});
    return {mean, inverse_count};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const std::vector<c10::SymInt> sizes = context->saved_data.at("sizes").toSymIntVector();
    constexpr size_t kDimensions = 3;
    if (!gradients[0].defined()) return variable_list(sizes.size() / kDimensions);
    const at::Tensor ones = gradients[0].mul(context->get_saved_variables()[0]);
    variable_list results;
    for (size_t i = 0; i < sizes.size() / kDimensions; ++i) {
      const c10::SymIntArrayRef size(sizes.data() + i * kDimensions, kDimensions);
      results.push_back(ones.select(0, static_cast<int64_t>(i)).expand_symint(size));
    }
    return results;
  }
};

class AttentionKL : public Function<AttentionKL> {
 public:
  static variable_list forward(AutogradContext* context,
                               const Variable& query_student,
                               const Variable& key_student,
                               const Variable& query_teacher,
                               const Variable& key_teacher,
                               const AttentionOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [kl, lse_student, lse_teacher] =
        call_attention_kl_forward(query_student, key_student, query_teacher, key_teacher, options);
    context->save_for_backward({query_student, key_student, query_teacher, key_teacher, lse_student, lse_teacher,
                                or_undefined(options.query_padding_mask()), or_undefined(options.key_padding_mask()),
                                or_undefined(options.cu_seqlens()), or_undefined(options.cu_seqlens_key())});
    save_options(*context, options);
    // Or zeros would be made as gradients of the statistics.
    context->set_materialize_grads(false);
    context->mark_non_differentiable({lse_student, lse_teacher});
    return {kl, lse_student, lse_teacher};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(5);
    const variable_list saved = context->get_saved_variables();
    const auto options = saved_options<AttentionOptions>(*context)
                             .query_padding_mask(or_nothing(saved[6]))
                             .key_padding_mask(or_nothing(saved[7]))
                             .cu_seqlens(or_nothing(saved[8]))
                             .cu_seqlens_key(or_nothing(saved[9]));
    auto [grad_query, grad_key] =
        call_attention_kl_backward(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], options);
    return {grad_query, grad_key, Variable(), Variable(), Variable()};
  }
};

ThreeTensors relation_kl_forward_autograd(const at::Tensor& student,
                                          const at::Tensor& teacher,
                                          const OptionalTensor& key_padding_mask,
                                          const OptionalTensor& cu_seqlens,
                                          std::optional<double> scale_student,
                                          std::optional<double> scale_teacher,
                                          bool causal,
                                          std::string_view divergence,
                                          double beta,
                                          std::optional<bool> deterministic,
                                          const OptionalTensor& lse_teacher) {
  constexpr const char* kName = "relation_kl_forward";
  check_frozen(kName, "teacher", teacher);
  RelationOptions options = relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                             divergence, beta, deterministic);
  const variable_list results = RelationKL::apply(student, teacher, options.lse_teacher(lse_teacher));
  return {results[0], results[1], results[2]};
}

at::Tensor relation_kl_backward_autograd(const at::Tensor& grad_kl,
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
                                         std::optional<bool> deterministic) {
  constexpr const char* kName = "relation_kl_backward";
  at::Tensor gradient;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    gradient = call_relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher,
                                         relation_options(kName, key_padding_mask, cu_seqlens, scale_student,
                                                          scale_teacher, causal, divergence, beta, deterministic));
  }
  return OnceDifferentiable::apply(std::string(kName), variable_list{gradient}, grad_kl, student)[0];
}

ThreeTensorVectors layer_relation_kl_forward_autograd(at::TensorList students,
                                                      at::TensorList teachers,
                                                      const OptionalTensor& key_padding_mask,
                                                      const OptionalTensor& cu_seqlens,
                                                      std::optional<double> scale_student,
                                                      std::optional<double> scale_teacher,
                                                      bool causal,
                                                      std::string_view divergence,
                                                      double beta,
                                                      std::optional<bool> deterministic) {
  constexpr const char* kName = "layer_relation_kl_forward";
  check_frozen(kName, "teachers", teachers);
  const variable_list results =
      LayerRelationKL::apply(students, teachers,
                             relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                              divergence, beta, deterministic));
  const auto count = static_cast<ptrdiff_t>(results.size() / 3);
  const auto begin = results.begin();
  return {{begin, begin + count}, {begin + count, begin + 2 * count}, {begin + 2 * count, results.end()}};
}

TensorVector layer_relation_kl_backward_autograd(at::TensorList grad_kl,
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
                                                 std::optional<bool> deterministic) {
  constexpr const char* kName = "layer_relation_kl_backward";
  TensorVector gradients;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    gradients =
        call_layer_relation_kl_backward(grad_kl, students, teachers, lse_student, lse_teacher,
                                        relation_options(kName, key_padding_mask, cu_seqlens, scale_student,
                                                         scale_teacher, causal, divergence, beta, deterministic));
  }
  // A gradient of its own for each pair: which of them depend on what is then as it is of single relations.
  for (size_t i = 0; i < gradients.size(); ++i)
    gradients[i] =
        OnceDifferentiable::apply(std::string(kName), variable_list{gradients[i]}, grad_kl[i], students[i])[0];
  return gradients;
}

TwoTensors means_of_rows_autograd(at::TensorList kl) {
  const variable_list results = MeansOfRows::apply(kl);
  return {results[0], results[1]};
}

at::Tensor relation_lse_autograd(const at::Tensor& x,
                                 const OptionalTensor& key_padding_mask,
                                 const OptionalTensor& cu_seqlens,
                                 std::optional<double> scale,
                                 bool causal,
                                 std::optional<bool> deterministic) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_relation_lse(x, relation_options("relation_lse", key_padding_mask, cu_seqlens, scale, scale, causal,
                                               to_string(Divergence::kForwardKL), 0.5, deterministic));
}

at::Tensor mean_of_rows_autograd(const at::Tensor& kl) { return MeanOfRows::apply(kl)[0]; }

ThreeTensors attention_kl_forward_autograd(const at::Tensor& query_student,
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
                                           std::optional<bool> deterministic) {
  constexpr const char* kName = "attention_kl_forward";
  check_frozen(kName, "query_teacher", query_teacher);
  check_frozen(kName, "key_teacher", key_teacher);
  const variable_list results =
      AttentionKL::apply(query_student, key_student, query_teacher, key_teacher,
                         attention_options(kName, query_padding_mask, key_padding_mask, cu_seqlens, cu_seqlens_key,
                                           scale_student, scale_teacher, causal, divergence, beta, deterministic));
  return {results[0], results[1], results[2]};
}

TwoTensors attention_kl_backward_autograd(const at::Tensor& grad_kl,
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
                                          std::optional<bool> deterministic) {
  constexpr const char* kName = "attention_kl_backward";
  variable_list gradients;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_query, grad_key] = call_attention_kl_backward(
        grad_kl, query_student, key_student, query_teacher, key_teacher, lse_student, lse_teacher,
        attention_options(kName, query_padding_mask, key_padding_mask, cu_seqlens, cu_seqlens_key, scale_student,
                          scale_teacher, causal, divergence, beta, deterministic));
    gradients = {grad_query, grad_key};
  }
  // One of the two student tensors that requires grad suffices to attach the node.
  const at::Tensor& student = query_student.requires_grad() ? query_student : key_student;
  const variable_list results = OnceDifferentiable::apply(std::string(kName), gradients, grad_kl, student);
  return {results[0], results[1]};
}

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, Autograd, m) {
  m.impl("relation_kl_forward", &linearard::relation_kl_forward_autograd);
  m.impl("relation_kl_backward", &linearard::relation_kl_backward_autograd);
  m.impl("layer_relation_kl_forward", &linearard::layer_relation_kl_forward_autograd);
  m.impl("layer_relation_kl_backward", &linearard::layer_relation_kl_backward_autograd);
  m.impl("means_of_rows", &linearard::means_of_rows_autograd);
  m.impl("relation_lse", &linearard::relation_lse_autograd);
  m.impl("mean_of_rows", &linearard::mean_of_rows_autograd);
  m.impl("attention_kl_forward", &linearard::attention_kl_forward_autograd);
  m.impl("attention_kl_backward", &linearard::attention_kl_backward_autograd);
}
