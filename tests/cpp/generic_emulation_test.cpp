#include <tuple>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <instantiations/generic.h>

#include "kernel_parameters.h"
#include "reference.h"

// The generic kernels, run on the CPU by tests/emulation, against float64.

namespace linearard {
namespace {

using testing::gaussian;
using testing::gradient_promise;
using testing::KernelProblem;
using testing::relative_error;
using testing::row_excess;

/// The ratio of the difference form for each head, 0 where student and teacher are far apart: [B heads] double.
at::Tensor measured_ratios(const KernelProblem& problem) {
  const cuda::ForwardParams of = testing::forward_params(problem, testing::empty_result(problem));
  const at::Tensor ratios = at::full({problem.batch() * problem.heads()}, -1, at::kDouble);
  const cuda::ClosenessParams params{of.student_rows,
                                     of.student_keys,
                                     of.teacher_rows,
                                     of.teacher_keys,
                                     of.batch,
                                     of.heads,
                                     of.visibility,
                                     problem.relation,
                                     1.0,
                                     ratios.mutable_data_ptr<double>()};
  EXPECT_EQ(cuda::measure_closeness(params, nullptr), cudaSuccess);
  return ratios;
}

testing::ForwardResult run_forward(const KernelProblem& problem, const at::Tensor& ratios) {
  const testing::ForwardResult result = testing::empty_result(problem);
  cuda::ForwardParams params = testing::forward_params(problem, result);
  params.difference_ratio = 1;
  params.difference_ratios = ratios.defined() ? ratios.const_data_ptr<double>() : nullptr;
  EXPECT_EQ(cuda::generic::launch_forward<float>(params, cuda::Blocks::kAll, nullptr), cudaSuccess);
  EXPECT_EQ(result.marks.sum().item<int64_t>(), 0);
  return result;
}

at::Tensor run_backward(cuda::BackwardParams params, const at::Tensor& ratios, const at::Tensor& owners) {
  const at::Tensor gradient = at::full_like(owners, std::numeric_limits<double>::quiet_NaN());
  const at::Tensor marks = testing::clear_marks(owners.size(0) * owners.size(1), owners.size(2));
  params.difference_ratio = 1;
  params.difference_ratios = ratios.defined() ? ratios.const_data_ptr<double>() : nullptr;
  params.gradient = gradient.mutable_data_ptr();
  params.redo = marks.mutable_data_ptr<int>();
  EXPECT_EQ(cuda::generic::launch_backward<float>(params, cuda::Blocks::kAll, nullptr), cudaSuccess);
  EXPECT_EQ(marks.sum().item<int64_t>(), 0);
  return gradient;
}

/// Three heads of a teacher whose logits reach 2,000 nats: the student of the first is close, that of the second has
/// logits of 20 nats, that of the third is 0.6 times the teacher. Padding is far apart and does not count.
struct CloseAndFar {
  at::Tensor teacher = 20 * gaussian(2, 3, 70, 24, 1);
  at::Tensor mask = (at::arange(70) != 40).expand({2, 70}).contiguous();
  at::Tensor student;

  CloseAndFar() {
    const at::Tensor noise = gaussian(2, 3, 70, 24, 2);
    student = at::stack(
        {teacher.select(1, 0) + 0.01 * noise.select(1, 0), 2 * noise.select(1, 1), 0.6 * teacher.select(1, 2)}, 1);
    student.select(2, 40).fill_(1e6);
    student = student.to(at::kFloat);
    teacher = teacher.to(at::kFloat);
  }
  KernelProblem problem() const { return testing::relation_problem(student, teacher, false, mask); }
};

TEST(EmulatedGeneric, MeasuresWhichHeadsAreClose) {
  const CloseAndFar tensors;
  EXPECT_TRUE(measured_ratios(tensors.problem()).equal(at::tensor({1., 0., 1., 1., 0., 1.}, at::kDouble)));
}

TEST(EmulatedGeneric, AnAttentionMapIsCloseWhereQueriesAndKeysAre) {
  const at::Tensor far = 5 * gaussian(1, 4, 40, 24, 3);
  const at::Tensor query = gaussian(1, 4, 40, 24, 1);
  const at::Tensor key = gaussian(1, 2, 33, 24, 2);
  at::Tensor key_student = key.clone();
  key_student.select(1, 1).add_(far.select(1, 0).narrow(1, 0, 33));  // shared by the heads 2 and 3
  at::Tensor query_student = query.clone();
  query_student.select(1, 1).add_(far.select(1, 1));
  const auto as_float = [](const at::Tensor& x) { return x.to(at::kFloat); };
  const KernelProblem problem =
      testing::attention_problem(as_float(query_student), as_float(key_student), as_float(query), as_float(key));
  EXPECT_TRUE(measured_ratios(problem).equal(at::tensor({1., 0., 0., 0.}, at::kDouble)));
}

TEST(EmulatedGeneric, SmallStudentsOfLargeTeachersKeepTheirDigits) {
  const CloseAndFar tensors;
  const KernelProblem problem = tensors.problem();
  const at::Tensor ratios = measured_ratios(problem);
  const testing::ForwardResult result = run_forward(problem, ratios);
  const auto options = RelationOptions{}.key_padding_mask(tensors.mask);
  const at::Tensor student = tensors.student.to(at::kDouble).requires_grad_();
  const auto exact = testing::reference_relation(student, tensors.teacher, options);
  const at::Tensor far = std::get<1>(exact).select(1, 1).detach();
  const auto error = [&](const testing::ForwardResult& of) {
    return (of.lse_student.select(1, 1).to(at::kDouble) - far).abs().max().item<double>();
  };
  EXPECT_LT(5 * error(result), error(run_forward(problem, {}))) << "as a difference, in all heads";
  EXPECT_LE(row_excess(result.kl.select(1, 1), std::get<0>(exact).select(1, 1).detach()), 0.0);

  const at::Tensor weights = at::ones_like(result.kl);
  const at::Tensor gradient =
      run_backward(testing::row_gradient_params(problem, weights, result), ratios, tensors.student);
  std::get<0>(exact).sum().backward();
  EXPECT_LE(relative_error(gradient.select(1, 1), student.grad().select(1, 1)), gradient_promise(at::kFloat));
}

/// A row that one key has nearly wholly: the gradient on that key's logit is minus the sum of the others, and smaller
/// than the rounding of log-sum-exps of 100 nats.
TEST(EmulatedGeneric, SaturatedAttentionMaps) {
  const at::Tensor key = at::linspace(0.3, 3, 70).view({1, 1, 70, 1}) * gaussian(1, 1, 70, 64, 5);
  const at::Tensor query = key.repeat({1, 2, 1, 1});
  const at::Tensor key_teacher = key.to(at::kFloat);
  const at::Tensor query_teacher = query.to(at::kFloat);
  const at::Tensor key_student = (key * (1 + 1e-6)).to(at::kFloat);
  const at::Tensor query_student = (query * (1 + 1e-6)).to(at::kFloat);
  const KernelProblem problem =
      testing::attention_problem(query_student, key_student, query_teacher, key_teacher, false);
  const testing::ForwardResult statistics = run_forward(problem, {});
  const at::Tensor exact_query = query_student.to(at::kDouble).requires_grad_();
  const at::Tensor exact_key = key_student.to(at::kDouble).requires_grad_();
  const at::Tensor exact = std::get<0>(testing::reference_attention(exact_query, exact_key, query_teacher, key_teacher,
                                                                    AttentionOptions{}.causal(false)));
  exact.sum().backward();

  const at::Tensor weights = at::ones_like(statistics.kl);
  const at::Tensor dominant_keys = at::full({1, 2, 70}, -1, at::kInt);
  const at::Tensor dominant_gradients = at::full({1, 2, 70}, std::numeric_limits<double>::quiet_NaN(), at::kDouble);
  cuda::BackwardParams rows = testing::row_gradient_params(problem, weights, statistics);
  cuda::BackwardParams keys = testing::key_gradient_params(problem, weights, statistics);
  const auto errors = [&] {
    const at::Tensor of_rows = run_backward(rows, {}, query_student);
    const at::Tensor of_keys = run_backward(keys, {}, key_student);
    const auto error = [](const at::Tensor& gradient, const at::Tensor& of) {
      return (gradient.to(at::kDouble) - of).norm().item<double>();
    };
    return std::tuple(error(of_rows, exact_query.grad()), error(of_keys, exact_key.grad()));
  };
  const auto [plain_rows, plain_keys] = errors();
  for (cuda::BackwardParams* const params : {&rows, &keys}) {
    params->dominant_keys = dominant_keys.mutable_data_ptr<int>();
    params->dominant_gradients = dominant_gradients.mutable_data_ptr<double>();
  }
  const auto [balanced_rows, balanced_keys] = errors();
  EXPECT_LT(balanced_rows, plain_rows / 10);
  EXPECT_LT(balanced_keys, plain_keys / 10);
  EXPECT_TRUE(dominant_keys.select(2, 69).eq(69).all().item<bool>());
}

}  // namespace
}  // namespace linearard
