#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <emulation/block.h>
#include <triangular/launch.h>

#include "kernel_parameters.h"
#include "reference.h"
#include "triangular_steps.h"

// Several relations in one set of launches, run on the CPU by tests/emulation: each against float64, and against the
// launches of that relation alone.

namespace linearard {
namespace {

using cuda::Traversal;
using testing::KernelProblem;
using testing::Kernels;

struct Case {
  Kernels kernels;
  at::ScalarType type;
  std::vector<int64_t> heads;  ///< of the relations
  int64_t batch;
  int64_t tokens;
  int64_t dim;
  bool causal = false;
  bool mask = false;
  Traversal traversal = Traversal::kTriangular;
  uint32_t schedule = 0;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << (c.kernels == Kernels::kHopper ? "Hopper " : "portable ") << c.type << " heads=" << c.heads << " "
             << c.batch << "x" << c.tokens << "x" << c.dim << " causal=" << c.causal << " mask=" << c.mask;
}

/// Heads stored one after the other, or in turn, or as every other head of a larger tensor.
at::Tensor stored(const at::Tensor& x, size_t way) {
  if (way % 3 == 1) return x.transpose(1, 2).contiguous().transpose(1, 2);
  if (way % 3 == 2) return at::stack({x, at::full_like(x, 7)}, 2).select(2, 0);
  return x;
}

std::optional<at::Tensor> mask_of(const Case& c) {
  if (!c.mask) return std::nullopt;
  return (at::arange(c.tokens).unsqueeze(0) < at::tensor({c.tokens, c.tokens - 50}).unsqueeze(1)) &
         (at::arange(c.tokens) != 40);
}

std::vector<KernelProblem> relations_of(const Case& c) {
  std::vector<KernelProblem> relations;
  for (size_t r = 0; r < c.heads.size(); ++r) {
    const at::Tensor teacher = testing::gaussian(c.batch, c.heads[r], c.tokens, c.dim, 10 + static_cast<uint64_t>(r));
    const at::Tensor noise = testing::gaussian(c.batch, c.heads[r], c.tokens, c.dim, 50 + static_cast<uint64_t>(r));
    relations.push_back(testing::relation_problem(stored((teacher + 0.1 * noise).to(c.type), r),
                                                  stored(teacher.to(c.type), r + 1), c.causal, mask_of(c)));
  }
  return relations;
}

class EmulatedGroup : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { emulation::set_schedule(GetParam().schedule); }
  void TearDown() override { emulation::set_schedule(0); }
};

TEST_P(EmulatedGroup, EachRelationAgreesWithFloat64) {
  const Case& c = GetParam();
  const std::vector<KernelProblem> relations = relations_of(c);
  const auto rows = testing::run_forward(relations, c.traversal, c.kernels);
  auto options = RelationOptions{}.causal(c.causal);
  if (c.mask) options.key_padding_mask(*mask_of(c));
  std::vector<at::Tensor> grad_kl;
  std::vector<testing::ForwardResult> results;
  for (size_t r = 0; r < relations.size(); ++r) {
    const at::Tensor& kl = rows[r].result.kl;
    // One number for all rows of the first relation, another one for each row of the others.
    grad_kl.push_back(r == 0 ? at::full({1}, 0.3, at::kFloat).expand_as(kl)
                             : at::linspace(-0.5, 1.0, kl.numel(), at::kFloat).view_as(kl));
    results.push_back(rows[r].result);
  }
  const auto gradients = testing::run_backward(relations, c.traversal, grad_kl, results, c.kernels);
  for (size_t r = 0; r < relations.size(); ++r) {
    SCOPED_TRACE("relation " + std::to_string(r));
    const KernelProblem& relation = relations[r];
    EXPECT_LT(rows[r].listed, rows[r].result.kl.numel() / 20);
    const at::Tensor student = relation.student_rows.to(at::kDouble).contiguous().requires_grad_();
    const auto exact = testing::reference_relation(student, relation.teacher_rows, options);
    EXPECT_LE(testing::row_excess(rows[r].result.kl, std::get<0>(exact)), 0.0);
    EXPECT_LE(testing::row_excess(rows[r].result.lse_student, std::get<1>(exact)), 0.0);
    EXPECT_LE(testing::row_excess(rows[r].result.lse_teacher, std::get<2>(exact)), 0.0);
    EXPECT_EQ(gradients[r].wide_heads.sum().item<int64_t>(), 0);
    (std::get<0>(exact) * grad_kl[r]).sum().backward();
    EXPECT_LE(testing::relative_error(gradients[r].gradient, student.grad()), testing::gradient_promise(c.type));
  }
}

constexpr Kernels kPortable = Kernels::kPortable;
constexpr Kernels kHopper = Kernels::kHopper;

INSTANTIATE_TEST_SUITE_P(
    Groups,
    EmulatedGroup,
    ::testing::Values(Case{kPortable, at::kBFloat16, {3, 1, 2}, 1, 150, 64},
                      Case{kPortable, at::kBFloat16, {2, 1}, 2, 140, 72, true, true},
                      Case{kPortable, at::kHalf, {1, 2}, 1, 150, 128, false, false, Traversal::kTriangular, 1},
                      Case{kPortable, at::kBFloat16, {1, 2}, 2, 130, 56, false, true, Traversal::kRows},
                      Case{kPortable, at::kBFloat16, {1, 1, 1, 1, 1, 1, 1, 1}, 1, 70, 64},
                      Case{kHopper, at::kBFloat16, {3, 1, 2}, 1, 200, 64},
                      Case{kHopper, at::kBFloat16, {2, 1}, 2, 193, 128, false, false, Traversal::kTriangular, 2},
                      Case{kHopper, at::kHalf, {1, 2, 1}, 1, 257, 128, false, false, Traversal::kTriangular, 3},
                      Case{kHopper, at::kBFloat16, {1, 3}, 2, 130, 96, true, false, Traversal::kTriangular, 4},
                      Case{kHopper, at::kBFloat16, {1, 1, 1, 1, 1, 1, 1, 1}, 1, 100, 64}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

/// A relation's rows that need the dense kernels, a head that is left to them, and the gradient's marks are its own.
TEST(EmulatedGroupSteps, WhatIsLeftToTheDenseKernelsIsOfItsRelation) {
  for (const Kernels kernels : {kPortable, kHopper}) {
    std::vector<KernelProblem> relations = relations_of({kernels, at::kBFloat16, {2, 3, 1}, 1, 140, 64});
    for (at::Tensor* x : {&relations[1].student_rows, &relations[1].teacher_rows})
      x->select(1, 2).narrow(1, 0, 1).mul_(20);
    relations[1] = testing::relation_problem(relations[1].student_rows, relations[1].teacher_rows);
    const auto rows = testing::run_forward(relations, Traversal::kTriangular, kernels);
    EXPECT_EQ(rows[0].listed + rows[2].listed, 0);
    EXPECT_EQ(rows[1].listed, 140);
    std::vector<at::Tensor> grad_kl;
    std::vector<testing::ForwardResult> results;
    for (size_t r = 0; r < relations.size(); ++r) {
      const auto exact =
          testing::reference_relation(relations[r].student_rows.to(at::kDouble), relations[r].teacher_rows, {});
      EXPECT_LE(testing::row_excess(rows[r].result.lse_teacher, std::get<2>(exact)), 0.0);
      grad_kl.push_back(at::ones_like(rows[r].result.kl));
      results.push_back(rows[r].result);
    }
    const auto gradients = testing::run_backward(relations, Traversal::kTriangular, grad_kl, results, kernels);
    EXPECT_EQ(gradients[0].wide_heads.sum().item<int64_t>() + gradients[2].wide_heads.sum().item<int64_t>(), 0);
    EXPECT_TRUE(at::equal(gradients[1].wide_heads, at::tensor({0, 0, 1}, at::kInt)));
    EXPECT_TRUE(gradients[1].gradient.select(1, 2).isnan().all().item<bool>());  // not written
    EXPECT_FALSE(gradients[1].gradient.narrow(1, 0, 2).isnan().any().item<bool>());
  }
}

/// Row by row nothing depends on the order of additions: the bits of each relation alone.
TEST(EmulatedGroupSteps, ByRowsTheBitsOfSingleCalls) {
  const std::vector<KernelProblem> relations = relations_of({kPortable, at::kBFloat16, {2, 1}, 2, 130, 64});
  const auto together = testing::run_forward(relations, Traversal::kRows);
  std::vector<at::Tensor> grad_kl;
  for (size_t r = 0; r < relations.size(); ++r) {
    const auto alone = testing::run_forward(relations[r], Traversal::kRows).result;
    EXPECT_TRUE(at::equal(together[r].result.kl, alone.kl));
    EXPECT_TRUE(at::equal(together[r].result.lse_student, alone.lse_student));
    grad_kl.push_back(at::linspace(-1, 1, alone.kl.numel(), at::kFloat).view_as(alone.kl));
  }
  const auto gradients =
      testing::run_backward(relations, Traversal::kRows, grad_kl, {together[0].result, together[1].result});
  for (size_t r = 0; r < relations.size(); ++r) {
    const auto alone = testing::run_backward(relations[r], Traversal::kRows, grad_kl[r], together[r].result);
    EXPECT_TRUE(at::equal(gradients[r].gradient, alone.gradient));
  }
}

}  // namespace
}  // namespace linearard
