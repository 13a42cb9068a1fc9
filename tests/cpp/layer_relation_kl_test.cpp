#include <linearard/layer_relation_kl.h>
#include <linearard/relation_kl.h>

#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "reference.h"

namespace linearard {
namespace {

struct Layer {
  std::vector<at::Tensor> students;
  std::vector<at::Tensor> teachers;
};

/// Queries, keys and values: heads and dimensions differ.
Layer layer() {
  Layer layer;
  for (const auto& [heads, dimension] : {std::pair{4, 40}, {2, 40}, {2, 24}}) {
    const auto [student, teacher] = testing::student_and_teacher(2, heads, 90, dimension, at::kFloat);
    layer.students.push_back(student.requires_grad_());
    layer.teachers.push_back(teacher);
  }
  return layer;
}

TEST(LayerRelationKL, LossesAndGradientsAreThoseOfSingleCalls) {
  const Layer given = layer();
  const at::Tensor mask = at::arange(90).unsqueeze(0) < at::tensor({90, 60}).unsqueeze(1);
  for (const RelationOptions& options :
       {RelationOptions{}, RelationOptions{}.causal(true).reduction(Reduction::kSum),
        RelationOptions{}.key_padding_mask(mask).row_weight(at::rand({2, 90})),
        RelationOptions{}.num_items(at::scalar_tensor(400)), RelationOptions{}.divergence(Divergence::kJSD)}) {
    const at::Tensor losses = layer_relation_kl(given.students, given.teachers, options);
    ASSERT_EQ(losses.sizes(), at::IntArrayRef({3}));
    const auto gradients = torch::autograd::grad({losses.sum()}, given.students);
    for (size_t i = 0; i < given.students.size(); ++i) {
      const at::Tensor loss = relation_kl(given.students[i], given.teachers[i], options);
      EXPECT_TRUE(at::allclose(losses[static_cast<int64_t>(i)], loss, 1e-6, 0));
      EXPECT_TRUE(at::allclose(gradients[i], torch::autograd::grad({loss}, {given.students[i]})[0], 1e-5, 1e-9));
    }
  }
}

TEST(LayerRelationKL, KernelsGiveListsOfRows) {
  Layer given = layer();
  for (at::Tensor& student : given.students)
    student = student.detach();
  const auto [kl, lse_student, lse_teacher] = layer_relation_kl_forward(given.students, given.teachers);
  std::vector<at::Tensor> ones;
  for (const at::Tensor& rows : kl)
    ones.push_back(at::ones_like(rows));
  const auto gradients = layer_relation_kl_backward(ones, given.students, given.teachers, lse_student, lse_teacher);
  for (size_t i = 0; i < given.students.size(); ++i) {
    const at::Tensor& student = given.students[i];
    const auto [rows, own_student, own_teacher] = relation_kl_forward(student, given.teachers[i]);
    EXPECT_TRUE(at::equal(kl[i], rows));
    EXPECT_TRUE(at::equal(lse_student[i], own_student));
    EXPECT_TRUE(at::equal(lse_teacher[i], own_teacher));
    EXPECT_TRUE(
        at::equal(gradients[i], relation_kl_backward(ones[i], student, given.teachers[i], own_student, own_teacher)));
  }
}

TEST(LayerRelationKL, ErrorsNameTheTensorOfTheList) {
  const Layer given = layer();
  const auto message = [&](const std::vector<at::Tensor>& students, const std::vector<at::Tensor>& teachers,
                           const RelationOptions& options) {
    try {
      layer_relation_kl(students, teachers, options);
    } catch (const c10::Error& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string("no error");
  };
  const auto expect = [](const std::string& text, const std::string& start) {
    EXPECT_EQ(text.rfind(start, 0), 0U) << text;
  };
  expect(message({}, {}, {}), "layer_relation_kl: students must hold at least one tensor");
  expect(message(given.students, {given.teachers[0]}, {}), "layer_relation_kl: teachers must hold as many tensors");
  expect(message({given.students[0], at::rand({2, 2, 91, 40}), given.students[2]}, given.teachers, {}),
         "layer_relation_kl: students[1] must have the sequence length of students[0] (90), got 91");
  expect(message({at::Tensor(), given.students[1], given.students[2]}, given.teachers, {}),
         "layer_relation_kl: students[0] must be a tensor");
  expect(message(given.students, given.students, {}), "layer_relation_kl: teachers[0] must not require grad");
  expect(message(given.students, given.teachers, RelationOptions{}.reduction(Reduction::kNone)),
         "layer_relation_kl: reduction must be 'sum' or 'mean', got 'none'");
  expect(message(given.students, given.teachers, RelationOptions{}.lse_teacher(at::zeros({2, 4, 90}))),
         "layer_relation_kl: lse_teacher must not be given");
}

}  // namespace
}  // namespace linearard
