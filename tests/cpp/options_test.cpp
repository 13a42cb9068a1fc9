#include <linearard/linearard.h>

#include <string>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "reference.h"

namespace linearard {
namespace {

using testing::reference_relation;
using testing::row_excess;
using testing::student_and_teacher;

TEST(Options, DefaultsAreTheDocumentedOnes) {
  const RelationOptions relation;
  EXPECT_FALSE(relation.causal());
  EXPECT_EQ(relation.divergence(), Divergence::kForwardKL);
  EXPECT_EQ(relation.reduction(), Reduction::kMean);
  EXPECT_EQ(relation.beta(), 0.5);
  EXPECT_FALSE(relation.scale_student().has_value());
  EXPECT_FALSE(relation.deterministic().has_value());
  EXPECT_TRUE(AttentionOptions{}.causal());
}

TEST(Options, NamesAndEnumsAgree) {
  for (const Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL, Divergence::kJSD}) {
    EXPECT_EQ(parse_divergence(to_string(divergence), "test"), divergence);
  }
  for (const Reduction reduction : {Reduction::kNone, Reduction::kSum, Reduction::kMean}) {
    EXPECT_EQ(parse_reduction(to_string(reduction), "test"), reduction);
  }
  EXPECT_EQ(to_string(Divergence::kReverseKL), "reverse_kl");
  EXPECT_EQ(to_string(Reduction::kNone), "none");
}

TEST(Options, Scales) {
  const auto [student, teacher] = student_and_teacher(1, 2, 40, 16);
  for (const double scale : {0.0, 0.7, -0.3}) {
    const auto options = RelationOptions{}.scale_student(scale).scale_teacher(0.1 - scale);
    const at::Tensor kl = std::get<0>(relation_kl_forward(student, teacher, options));
    EXPECT_LE(row_excess(kl, std::get<0>(reference_relation(student, teacher, options))), 0.0) << scale;
  }
}

TEST(Options, PaddingIsNeverRead) {
  const auto [student, teacher] = student_and_teacher(3, 2, 40, 16);
  at::Tensor mask = at::ones({3, 40}, at::kBool);
  mask[0].narrow(0, 25, 15).fill_(false);
  mask[1].fill_(false);
  const auto options = RelationOptions{}.key_padding_mask(mask).deterministic(true).reduction(Reduction::kNone);
  const at::Tensor kl = relation_kl(student, teacher, options);
  EXPECT_LE(row_excess(kl, std::get<0>(reference_relation(student, teacher, options))), 0.0);
  const at::Tensor padding = mask.logical_not().unsqueeze(1).unsqueeze(3);
  const at::Tensor poisoned =
      relation_kl(student.masked_fill(padding, NAN), teacher.masked_fill(padding, NAN), options);
  EXPECT_TRUE(at::equal(poisoned, kl));
}

TEST(Options, PackedSequencesAreSeparateCalls) {
  const auto [student, teacher] = student_and_teacher(1, 2, 100, 16);
  const at::Tensor boundaries = at::tensor({0, 1, 37, 100}, at::kInt);
  const auto options = RelationOptions{}.cu_seqlens(boundaries).reduction(Reduction::kNone);
  const at::Tensor packed = relation_kl(student, teacher, options);
  for (const auto& [begin, end] : {std::pair{0, 1}, std::pair{1, 37}, std::pair{37, 100}}) {
    const at::Tensor exact =
        std::get<0>(reference_relation(student.narrow(2, begin, end - begin), teacher.narrow(2, begin, end - begin)));
    EXPECT_LE(row_excess(packed.narrow(2, begin, end - begin), exact), 0.0);
  }
}

TEST(Options, Reductions) {
  const auto [student, teacher] = student_and_teacher(2, 3, 20, 8);
  at::Tensor mask = at::ones({2, 20}, at::kBool);
  mask[1].narrow(0, 12, 8).fill_(false);
  const at::Tensor weight = at::linspace(0, 1, 40).view({2, 20});
  const auto options = RelationOptions{}.key_padding_mask(mask);
  const at::Tensor exact = std::get<0>(reference_relation(student, teacher, options));
  const at::Tensor real = mask.to(at::kDouble);
  const at::Tensor weighted = exact * (weight * real).unsqueeze(1);

  const auto value = [&, &student = student, &teacher = teacher](RelationOptions changed) {
    return relation_kl(student, teacher, changed).to(at::kDouble);
  };
  const double sum = exact.sum().item<double>();
  EXPECT_NEAR(value(RelationOptions(options).reduction(Reduction::kSum)).item<double>(), sum, 1e-4 * sum);
  EXPECT_NEAR(value(options).item<double>(), sum / (3 * 32), 1e-4 * sum / (3 * 32));
  const auto items = RelationOptions(options).num_items(at::scalar_tensor(5));
  EXPECT_NEAR(value(items).item<double>(), sum / (3 * 5), 1e-4 * sum / (3 * 5));
  const auto with_weight = RelationOptions(options).row_weight(weight);
  const double count = (weight * real).sum().item<double>();
  const double mean = weighted.sum().item<double>() / (3 * count);
  EXPECT_NEAR(value(with_weight).item<double>(), mean, 1e-4 * mean);
  EXPECT_LE(row_excess(value(RelationOptions(with_weight).reduction(Reduction::kNone)), weighted), 0.0);
}

TEST(Options, ACountOfZeroGivesZero) {
  auto [student, teacher] = student_and_teacher(1, 2, 10, 8);
  student.requires_grad_();
  const at::Tensor loss =
      relation_kl(student, teacher, RelationOptions{}.key_padding_mask(at::zeros({1, 10}, at::kBool)));
  loss.backward();
  EXPECT_EQ(loss.item<double>(), 0.0);
  EXPECT_EQ(student.grad().abs().max().item<double>(), 0.0);
}

TEST(Options, DeterministicRunsAgreeBitByBit) {
  const auto [student, teacher] = student_and_teacher(1, 3, 700, 32);
  const auto options = RelationOptions{}.deterministic(true);
  const auto [kl, lse_student, lse_teacher] = relation_kl_forward(student, teacher, options);
  const at::Tensor gradient = relation_kl_backward(kl, student, teacher, lse_student, lse_teacher, options);
  for (int run = 0; run < 3; ++run) {
    EXPECT_TRUE(at::equal(std::get<0>(relation_kl_forward(student, teacher, options)), kl));
    EXPECT_TRUE(at::equal(relation_kl_backward(kl, student, teacher, lse_student, lse_teacher, options), gradient));
  }
}

TEST(Options, Version) {
  const std::string expected = std::to_string(LINEARARD_VERSION_MAJOR) + "." + std::to_string(LINEARARD_VERSION_MINOR) +
                               "." + std::to_string(LINEARARD_VERSION_PATCH);
  EXPECT_EQ(expected, LINEARARD_VERSION);
}

}  // namespace
}  // namespace linearard
