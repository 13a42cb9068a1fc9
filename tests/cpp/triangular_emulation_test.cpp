#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <emulation/block.h>
#include <triangular/launch.h>

#include "kernel_parameters.h"
#include "reference.h"
#include "triangular_steps.h"

// The triangular kernels with the steps before and after them, run on the CPU by tests/emulation, against float64.

namespace linearard {
namespace {

using cuda::Traversal;
using testing::KernelProblem;
using testing::run_backward;
using testing::run_forward;

struct Case {
  at::ScalarType type;
  int64_t tokens;
  int64_t dim;
  bool causal;
  bool mask;
  Traversal traversal;
};

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return std::string(at::toString(c.type)) + std::to_string(c.dim) + (c.causal ? "Causal" : "Dense") +
         (c.mask ? "Masked" : "") + (c.traversal == Traversal::kRows ? "Rows" : "Triangular");
}

class EmulatedTriangular : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedTriangular, AgreesWithFloat64) {
  const Case& c = GetParam();
  const int64_t batch = c.mask ? 2 : 1;
  const auto [student, teacher] = testing::student_and_teacher(batch, 2, c.tokens, c.dim, c.type);
  auto options = RelationOptions{}.causal(c.causal);
  std::optional<at::Tensor> mask;
  if (c.mask) {
    mask = (at::arange(c.tokens).unsqueeze(0) < at::tensor({c.tokens, c.tokens - 50}).unsqueeze(1)) &
           (at::arange(c.tokens) != 40);
    options.key_padding_mask(*mask);
    student.masked_fill_(mask->logical_not().unsqueeze(1).unsqueeze(-1), NAN);  // padding may hold anything
  }
  const KernelProblem problem = testing::relation_problem(student, teacher, c.causal, mask);
  const auto [rows, listed] = run_forward(problem, c.traversal);
  EXPECT_LT(listed, rows.kl.numel() / 20);
  const at::Tensor exact_student =
      (c.mask ? at::nan_to_num(student) : student).to(at::kDouble).contiguous().requires_grad_();
  const auto exact = testing::reference_relation(exact_student, teacher, options);
  EXPECT_LE(testing::row_excess(rows.kl, std::get<0>(exact)), 0.0);
  EXPECT_LE(testing::row_excess(rows.lse_student, std::get<1>(exact)), 0.0);
  EXPECT_LE(testing::row_excess(rows.lse_teacher, std::get<2>(exact)), 0.0);
  if (c.dim > 128) return;  // there is no triangular backward

  const at::Tensor weights = at::linspace(-0.5, 1.0, rows.kl.numel(), at::kFloat).view_as(rows.kl);
  const auto [gradient, wide_heads] = run_backward(problem, c.traversal, weights, rows);
  EXPECT_EQ(wide_heads.sum().item<int64_t>(), 0);
  (std::get<0>(exact) * weights).sum().backward();
  EXPECT_LE(testing::relative_error(gradient, exact_student.grad()), testing::gradient_promise(c.type));
}

INSTANTIATE_TEST_SUITE_P(,
                         EmulatedTriangular,
                         ::testing::Values(Case{at::kBFloat16, 300, 64, false, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 256, 64, true, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 200, 64, false, true, Traversal::kTriangular},
                                           Case{at::kBFloat16, 200, 64, true, true, Traversal::kRows},
                                           Case{at::kBFloat16, 270, 64, false, false, Traversal::kRows},
                                           Case{at::kBFloat16, 150, 56, false, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 150, 80, false, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 150, 72, true, false, Traversal::kRows},
                                           Case{at::kHalf, 270, 128, false, false, Traversal::kTriangular},
                                           Case{at::kHalf, 150, 104, true, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 130, 256, false, false, Traversal::kTriangular}),
                         name_of);

/// Rows whose sums have lost digits: every logit moves in the same direction, far more than the rows diverge.
TEST(EmulatedTriangularRows, RowsThatLostDigitsAreComputedAgain) {
  const at::Tensor teacher = (testing::gaussian(1, 1, 200, 64, 5) * 0.5 + 1.5).to(at::kBFloat16);
  const at::Tensor student = (teacher.to(at::kDouble) * 1.02).to(at::kBFloat16);
  const auto [rows, listed] = run_forward(testing::relation_problem(student, teacher), Traversal::kTriangular);
  EXPECT_GT(listed, 0);
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  const at::Tensor& kl = std::get<0>(exact);
  const at::Tensor allowed = at::where(kl >= 1e-3, 1e-4 * kl, 1e-2 * kl) + 1e-7;
  EXPECT_LE((rows.kl - kl).abs().sub(allowed).max().item<double>(), 0.0);
}

/// A head whose logits spread over more than float can hold in one frame of reference is left to the dense kernels,
/// and its neighbour is not.
TEST(EmulatedTriangularRows, WideHeadsAreLeftOut) {
  auto [student, teacher] = testing::student_and_teacher(1, 2, 140, 64, at::kBFloat16);
  student.select(1, 1).narrow(1, 0, 1).mul_(20);
  teacher.select(1, 1).narrow(1, 0, 1).mul_(20);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto [rows, listed] = run_forward(problem, Traversal::kTriangular);
  EXPECT_EQ(listed, 140);
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  EXPECT_LE(testing::row_excess(rows.lse_teacher, std::get<2>(exact)), 0.0);
  const auto [gradient, wide_heads] = run_backward(problem, Traversal::kTriangular, at::ones_like(rows.kl), rows);
  EXPECT_EQ(wide_heads[0].item<int64_t>(), 0);
  EXPECT_EQ(wide_heads[1].item<int64_t>(), 1);
}

/// Spread of 150 nats within a head, as real models have it.
TEST(EmulatedTriangularRows, OutlierTokensKeepTheirDigits) {
  at::Tensor teacher = testing::gaussian(1, 1, 260, 64, 7) * 0.7;
  const at::Tensor outliers = teacher.narrow(2, 0, 2);
  outliers.mul_(std::sqrt(150.0 * 8) / at::linalg_vector_norm(outliers, 2, -1, true));
  teacher = teacher.to(at::kBFloat16);
  const at::Tensor student = (teacher.to(at::kDouble) + 0.02 * testing::gaussian(1, 1, 260, 64, 8)).to(at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto [rows, listed] = run_forward(problem, Traversal::kTriangular);
  EXPECT_LT(listed, 26);
  const at::Tensor exact_student = student.to(at::kDouble).requires_grad_();
  const auto exact = testing::reference_relation(exact_student, teacher, {});
  const at::Tensor& kl = std::get<0>(exact);
  EXPECT_GT((std::get<2>(exact).max() - std::get<2>(exact).min()).item<double>(), 100.0);
  const at::Tensor allowed = at::where(kl >= 1e-3, 1e-4 * kl, 1e-2 * kl) + 1e-7;
  EXPECT_LE((rows.kl - kl).abs().sub(allowed).max().item<double>(), 0.0);
  const at::Tensor weights = at::ones_like(rows.kl);
  const auto [gradient, wide_heads] = run_backward(problem, Traversal::kTriangular, weights, rows);
  EXPECT_EQ(wide_heads.sum().item<int64_t>(), 0);
  kl.sum().backward();
  EXPECT_LE(testing::relative_error(gradient, exact_student.grad()), testing::gradient_promise(at::kBFloat16));
}

/// The gradient of a mean is one number in memory: the same bits as a number for each row.
/// All logits of a row move by about 0.3 nats: its divergence is a hundredth of the sum of phi and less.
TEST(EmulatedTriangularRows, LogitsThatMoveTogether) {
  const at::Tensor common = std::sqrt(6.0 / std::sqrt(64.0)) * at::ones({1, 1, 1, 64}, at::kDouble);
  const at::Tensor teacher = (common + 0.5 * testing::gaussian(1, 2, 200, 64, 9)).to(at::kBFloat16);
  const at::Tensor student = (std::sqrt(1.05) * teacher.to(at::kDouble)).to(at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  const at::Tensor& kl = std::get<0>(exact);
  for (const testing::Kernels kernels : {testing::Kernels::kPortable, testing::Kernels::kHopper}) {
    for (const Traversal traversal : {Traversal::kTriangular, Traversal::kRows}) {
      const auto rows = testing::run_forward({problem}, traversal, kernels)[0];
      EXPECT_LT(rows.listed, 40);  // of 400
      EXPECT_LE(((rows.result.kl - kl).abs() / kl).max().item<double>(), 1e-4);
    }
  }
}

/// A token that the teacher hardly sees beside the others, e^-35, is nearly all that the student sees: what is left of
/// the others' probability has no digits beside 1.
TEST(EmulatedTriangularRows, RowThatTurnsToItsOwnToken) {
  const at::Tensor vectors = 0.3 * testing::gaussian(1, 1, 200, 64, 9);
  vectors.select(3, 0).fill_(31);
  vectors.select(3, 63).zero_();
  vectors.select(2, 77).mul_(0.5);
  const at::Tensor teacher = vectors.to(at::kBFloat16);
  const at::Tensor student = teacher.clone();
  student.select(2, 77).select(2, 63).fill_(22);  // all others have nothing there
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  const at::Tensor kl = std::get<0>(exact).flatten()[77];
  EXPECT_NEAR(kl.item<double>(), 25, 1);
  for (const testing::Kernels kernels : {testing::Kernels::kPortable, testing::Kernels::kHopper}) {
    const auto rows = testing::run_forward({problem}, Traversal::kTriangular, kernels)[0];
    EXPECT_EQ(rows.listed, 0);
    EXPECT_NEAR(rows.result.kl.flatten()[77].item<double>(), kl.item<double>(), 1e-4 * kl.item<double>());
    EXPECT_LE((rows.result.lse_student - std::get<1>(exact)).abs().max().item<double>(), 1e-4);
  }
}

TEST(EmulatedTriangularRows, OneGradientForAllRows) {
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    const auto [student, teacher] = testing::student_and_teacher(1, 2, 200, type == at::kHalf ? 128 : 64, type);
    const KernelProblem problem = testing::relation_problem(student, teacher);
    const auto rows = run_forward(problem, Traversal::kRows).result;
    const at::Tensor weight = at::full({1}, -3e-4, at::kFloat);
    const auto gradient_for = [&](const at::Tensor& weights) {
      return run_backward(problem, Traversal::kRows, weights, rows).gradient;
    };
    const at::Tensor one = weight.expand_as(rows.kl);
    EXPECT_TRUE(at::equal(gradient_for(one), gradient_for(one.contiguous())));
  }
}

/// The steps around the kernels where a head has several blocks of each, and its largest logits lie in the last.
TEST(EmulatedTriangularRows, StepsTakeManyTokens) {
  constexpr int64_t kTokens = 9000;
  auto [student, teacher] = testing::student_and_teacher(1, 2, kTokens, 8, at::kBFloat16);
  teacher.select(1, 1).select(1, kTokens - 1).fill_(16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto params = testing::triangular_params<cuda::TriangularForwardParams>({problem}, Traversal::kTriangular);
  const auto memory = [&](int64_t floats) { return at::full({2, floats}, NAN, at::kFloat); };
  const auto ints = [](at::IntArrayRef shape) { return at::full(shape, -1, at::kInt); };
  const at::Tensor sums = memory(cuda::kSums * kTokens);
  const at::Tensor token_values = memory(2 * kTokens);
  const at::Tensor own = memory(2 * kTokens);
  const at::Tensor centers = memory(1);
  const at::Tensor wide = ints({2});
  const at::Tensor counts = ints({2});
  const at::Tensor largest = ints({2, (kTokens + 63) / 64});
  const at::Tensor marks = testing::clear_marks(2, kTokens).fill_(-1);
  cuda::PrepareForwardParams prepare{};
  prepare.group = params.group;
  prepare.vectors = params.vectors;
  prepare.tokens = params.tokens;
  prepare.scale_student = problem.scale_student();
  prepare.scale_teacher = problem.scale_teacher();
  prepare.largest = largest.mutable_data_ptr<int>();
  prepare.token_values = reinterpret_cast<cuda::ForwardToken*>(token_values.mutable_data_ptr<float>());
  prepare.own = reinterpret_cast<cuda::OwnLogit*>(own.mutable_data_ptr<float>());
  prepare.centers = centers.mutable_data_ptr<float>();
  prepare.wide_heads = wide.mutable_data_ptr<int>();
  prepare.sums = sums.mutable_data_ptr<float>();
  prepare.row_counts = counts.mutable_data_ptr<int>();
  prepare.redo[0] = marks.mutable_data_ptr<int>();
  ASSERT_EQ(cuda::triangular::prepare_forward(prepare, nullptr), cudaSuccess);
  EXPECT_EQ(sums.abs().sum().item<double>() + marks.abs().sum().item<double>(), 0);
  const auto squares = [](const at::Tensor& x, double scale) {
    return x.to(at::kDouble).square().sum(-1).view({2, kTokens}) * (scale * 1.4426950408889634);
  };
  const at::Tensor t = squares(teacher, problem.scale_teacher());
  const at::Tensor x = squares(student, problem.scale_student()) - t;
  EXPECT_TRUE(at::equal(own.view({2, kTokens, 2}), at::stack({t, x}, 2).to(at::kFloat)));
  EXPECT_TRUE(at::equal(centers.flatten(), t.amax(1).to(at::kFloat) / 4));
  EXPECT_TRUE(at::equal(wide, (t.amax(1) >= cuda::kLargestSpread * 1.4426950408889634).to(at::kInt)));
  EXPECT_EQ(wide.sum().item<int64_t>(), 1);
  const at::Tensor values = token_values.view({2, kTokens, 2});
  EXPECT_TRUE(at::allclose(values.select(2, 1), at::exp2(t / 2 - t.amax(1, true) / 4).to(at::kFloat), 1e-4, 0));

  const at::Tensor lse = at::linspace(1, 100, 2 * kTokens, at::kFloat).view({2, kTokens}).contiguous();
  lse[1][kTokens - 1] = 300;
  const at::Tensor moved = lse + 1;
  const at::Tensor grads = at::linspace(-1, 1, 2 * kTokens, at::kFloat);
  const at::Tensor backward_values = memory(4 * kTokens);
  const at::Tensor gradient = memory(8 * kTokens);
  wide.fill_(-1);
  marks.fill_(-1);
  cuda::PrepareBackwardParams before{};
  before.group = params.group;
  before.visibility = problem.memory.visibility;
  before.rows[0] = {grads.const_data_ptr<float>(), false,   moved.const_data_ptr<float>(),
                    lse.const_data_ptr<float>(),   nullptr, nullptr,
                    marks.mutable_data_ptr<int>()};
  before.token_values = reinterpret_cast<cuda::BackwardToken*>(backward_values.mutable_data_ptr<float>());
  before.wide_heads = wide.mutable_data_ptr<int>();
  before.gradient = gradient.mutable_data_ptr<float>();
  before.gradient_floats = gradient.numel();
  ASSERT_EQ(cuda::triangular::prepare_backward(before, nullptr), cudaSuccess);
  EXPECT_EQ(gradient.abs().sum().item<double>() + marks.abs().sum().item<double>(), 0);
  EXPECT_EQ(wide[0].item<int>(), 0);
  EXPECT_EQ(wide[1].item<int>(), 1);
  const at::Tensor made = backward_values.view({2, kTokens, 4});
  EXPECT_TRUE(at::allclose(made.select(2, 0), lse * 0.72134752f - cuda::kHeadroom / 2, 1e-6, 1e-5));
  EXPECT_TRUE(at::allclose(made.select(2, 1) * made.select(2, 2),
                           grads.view({2, kTokens}) * std::exp2(-cuda::kHeadroom), 1e-4, 0));
  EXPECT_TRUE(at::allclose(made.select(2, 3), std::exp(-1.0) * made.select(2, 2), 1e-4, 0));

  const at::Tensor exact = at::linspace(-5, 5, gradient.numel(), at::kFloat).view_as(gradient);
  gradient.copy_(exact);
  gradient[0][8 * 8191 + 3] = INFINITY;
  wide.zero_();
  const at::Tensor result = at::full({2, 8 * kTokens}, NAN, at::kBFloat16);
  cuda::FinishBackwardParams finish{};
  finish.type = cuda::Scalar::kBFloat16;
  finish.group = params.group;
  finish.tokens = kTokens;
  finish.dim = 8;
  finish.output_scale = 0.5;
  finish.wide_heads = wide.const_data_ptr<int>();
  finish.sums = gradient.const_data_ptr<float>();
  finish.relations[0] = {result.mutable_data_ptr(), nullptr, marks.mutable_data_ptr<int>()};
  ASSERT_EQ(cuda::triangular::finish_backward(finish, nullptr), cudaSuccess);
  const at::Tensor expected = (exact * 0.5).to(at::kBFloat16);
  expected[0][8 * 8191 + 3] = 3.3895313892515355e38;
  EXPECT_TRUE(at::equal(result, expected));
  EXPECT_EQ(marks.sum().item<int64_t>(), 2);
  EXPECT_EQ(marks[0].item<int>() + marks[1 + 8191 / 64].item<int>(), 2);
}

/// Whatever warp goes first: the traversal by rows gives the same bits, and no barrier is missing.
TEST(EmulatedTriangularRows, ScheduleDoesNotMatterByRows) {
  const auto [student, teacher] = testing::student_and_teacher(1, 1, 160, 64, at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto first = run_forward(problem, Traversal::kRows).result;
  const at::Tensor weights = at::ones_like(first.kl);
  const at::Tensor gradient = run_backward(problem, Traversal::kRows, weights, first).gradient;
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  for (const uint32_t seed : {1u, 2u}) {
    emulation::set_schedule(seed);
    EXPECT_TRUE(at::equal(run_forward(problem, Traversal::kRows).result.kl, first.kl));
    EXPECT_TRUE(at::equal(run_backward(problem, Traversal::kRows, weights, first).gradient, gradient));
    const auto triangular = run_forward(problem, Traversal::kTriangular).result;
    EXPECT_LE(testing::row_excess(triangular.kl, std::get<0>(exact)), 0.0);
  }
  emulation::set_schedule(0);
}

}  // namespace
}  // namespace linearard
