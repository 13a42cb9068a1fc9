#include <linearard/relation_kl.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "reference.h"

namespace linearard {
namespace {

using testing::gradient_promise;
using testing::reference_relation;
using testing::relative_error;
using testing::row_excess;
using testing::student_and_teacher;

/// Gradient of sum(rows * weights) with respect to the student, by autograd on the float64 reference.
at::Tensor reference_gradient(const at::Tensor& student,
                              const at::Tensor& teacher,
                              const at::Tensor& weights,
                              const RelationOptions& options) {
  const at::Tensor leaf = student.detach().to(at::kDouble).requires_grad_();
  const at::Tensor rows = std::get<0>(reference_relation(leaf, teacher, options));
  return torch::autograd::grad({(rows * weights).sum()}, {leaf})[0];
}

struct Case {
  at::ScalarType dtype;
  Divergence divergence;
  bool causal;
};

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  return std::string(at::toString(info.param.dtype)) + "_" + std::string(to_string(info.param.divergence)) +
         (info.param.causal ? "_causal" : "_dense");
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (const Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL, Divergence::kJSD}) {
      for (const bool causal : {false, true})
        cases.push_back({dtype, divergence, causal});
    }
  }
  return cases;
}

class RelationKL : public ::testing::TestWithParam<Case> {};

TEST_P(RelationKL, ForwardAndBackwardAgreeWithTheReference) {
  const auto [dtype, divergence, causal] = GetParam();
  const auto [student, teacher] = student_and_teacher(2, 3, 139, 40, dtype);
  const auto options = RelationOptions{}.divergence(divergence).causal(causal).beta(0.3);
  const auto [kl, lse_student, lse_teacher] = relation_kl_forward(student, teacher, options);
  const auto [exact, exact_lse_student, exact_lse_teacher] = reference_relation(student, teacher, options);
  EXPECT_EQ(kl.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat);
  EXPECT_LE(row_excess(kl, exact), 0.0);
  EXPECT_LE(row_excess(lse_student, exact_lse_student), 0.0);
  EXPECT_LE(row_excess(lse_teacher, exact_lse_teacher), 0.0);

  const at::Tensor weights = at::linspace(-0.5, 1.0, kl.numel(), kl.options()).view_as(kl);
  const at::Tensor gradient = relation_kl_backward(weights, student, teacher, lse_student, lse_teacher, options);
  EXPECT_EQ(gradient.scalar_type(), dtype);
  EXPECT_LE(relative_error(gradient, reference_gradient(student, teacher, weights, options)), gradient_promise(dtype));
}

INSTANTIATE_TEST_SUITE_P(All, RelationKL, ::testing::ValuesIn(all_cases()), name_of);

TEST(RelationKLAutograd, GradientOfTheMeanReachesTheStudent) {
  auto [student, teacher] = student_and_teacher(2, 3, 70, 16);
  student.requires_grad_();
  const at::Tensor loss = relation_kl(student, teacher);
  loss.backward();
  const at::Tensor weights = at::full({2, 3, 70}, 1.0 / (2 * 3 * 70), at::kDouble);
  EXPECT_LE(relative_error(student.grad(), reference_gradient(student, teacher, weights, {})), 2e-4);
  EXPECT_FALSE(teacher.grad().defined());
}

TEST(RelationKLAutograd, NothingIsRecordedWithoutGrad) {
  auto [student, teacher] = student_and_teacher(1, 1, 8, 4);
  EXPECT_FALSE(relation_kl(student, teacher).requires_grad());
  student.requires_grad_();
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(relation_kl(student, teacher).requires_grad());
}

TEST(RelationKLAutograd, DoubleBackwardIsAnError) {
  auto [student, teacher] = student_and_teacher(1, 2, 8, 4);
  student.requires_grad_();
  const at::Tensor loss = relation_kl(student, teacher);
  const at::Tensor gradient = torch::autograd::grad({loss}, {student}, {}, true, true)[0];
  EXPECT_THROW(gradient.sum().backward(), c10::Error);
}

TEST(RelationKL, ALongSequenceMeetsEveryTileBoundary) {
  const auto [student, teacher] = student_and_teacher(1, 1, 1025, 24);
  for (const bool causal : {false, true}) {
    const auto options = RelationOptions{}.causal(causal);
    const auto [kl, lse_student, lse_teacher] = relation_kl_forward(student, teacher, options);
    EXPECT_LE(row_excess(kl, std::get<0>(reference_relation(student, teacher, options))), 0.0);
    const at::Tensor ones = at::ones_like(kl);
    const at::Tensor gradient = relation_kl_backward(ones, student, teacher, lse_student, lse_teacher, options);
    EXPECT_LE(relative_error(gradient, reference_gradient(student, teacher, ones, options)), 2e-4);
  }
}

TEST(RelationKL, StridedInputsAreReadInPlace) {
  const auto [student, teacher] = student_and_teacher(2, 3, 33, 8);
  const at::Tensor strided_student = student.transpose(1, 2).contiguous().transpose(1, 2);
  const at::Tensor strided_teacher = at::cat({teacher, at::full_like(teacher, NAN)}, 3).narrow(3, 0, 8);
  const auto options = RelationOptions{}.deterministic(true).reduction(Reduction::kNone);
  EXPECT_TRUE(
      at::equal(relation_kl(strided_student, strided_teacher, options), relation_kl(student, teacher, options)));
}

TEST(RelationKL, DifferentHeadDimensionsAndDtypes) {
  const at::Tensor student = testing::gaussian(1, 2, 50, 16, 3).to(at::kBFloat16);
  const at::Tensor teacher = testing::gaussian(1, 2, 50, 72, 4).to(at::kFloat);
  const at::Tensor kl = std::get<0>(relation_kl_forward(student, teacher));
  EXPECT_LE(row_excess(kl, std::get<0>(reference_relation(student, teacher))), 0.0);
}

TEST(RelationKL, EmptyProblems) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{{0, 2, 5, 4}, {2, 0, 5, 4}, {2, 2, 0, 4}}) {
    const at::Tensor student = at::randn(shape).requires_grad_();
    const at::Tensor loss = relation_kl(student, at::randn(shape));
    loss.backward();
    EXPECT_EQ(loss.item<double>(), 0.0);
    EXPECT_EQ(student.grad().sizes(), student.sizes());
  }
}

TEST(RelationKL, EqualInputsGiveZero) {
  const at::Tensor x = 5 * testing::gaussian(1, 2, 100, 32, 5).to(at::kFloat);
  const at::Tensor kl = relation_kl(x, x.clone(), RelationOptions{}.reduction(Reduction::kNone));
  EXPECT_LE(kl.abs().max().item<double>(), 1e-7);
}

TEST(RelationLse, IsTheStatisticOfTheForward) {
  const auto [student, teacher] = student_and_teacher(1, 2, 77, 16);
  const auto options = RelationOptions{}.scale_teacher(0.4).causal(true);
  const at::Tensor exact = std::get<2>(reference_relation(student, teacher, options));
  EXPECT_LE(row_excess(relation_lse(teacher, options), exact), 0.0);
}

TEST(RelationLse, CanBeHandedIn) {
  const auto [student, teacher] = student_and_teacher(1, 2, 77, 16);
  const at::Tensor lse_teacher = relation_lse(teacher);
  const auto options = RelationOptions{}.lse_teacher(lse_teacher);
  const auto [kl, lse_student, returned] = relation_kl_forward(student, teacher, options);
  EXPECT_TRUE(at::equal(returned, lse_teacher));
  EXPECT_LE(row_excess(kl, std::get<0>(reference_relation(student, teacher))), 0.0);
}

}  // namespace
}  // namespace linearard
