#include <cmath>
#include <ostream>
#include <string>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <emulation/block.h>
#include <sm90/instantiations.h>

#include "kernel_parameters.h"
#include "reference.h"

// The Hopper kernels of the triangular relation, run on the CPU by tests/emulation, against float64.

namespace linearard {
namespace {

using cuda::BackwardToken;
using cuda::ForwardToken;
using testing::gaussian;
using testing::vectors_of;

struct Relation {
  int64_t batch = 1;
  int64_t heads = 2;
  int64_t tokens = 200;
  int64_t dim = 64;
  at::ScalarType type = at::kBFloat16;
  bool causal = false;
  bool rows = false;         ///< row by row, else every pair once
  bool plain = false;        ///< heads without biases that depend on the token
  double noise = 0.05;       ///< student = teacher + noise
  int multiprocessors = 1;   ///< more than there are walks: walks are cut
  bool token_major = false;  ///< [B, N, H, D] in memory
  uint32_t schedule = 0;     ///< of the emulated warps
};

std::ostream& operator<<(std::ostream& out, const Relation& r) {
  return out << r.batch << "x" << r.heads << "x" << r.tokens << "x" << r.dim << " " << r.type << " causal=" << r.causal
             << " rows=" << r.rows << " plain=" << r.plain << " noise=" << r.noise << " SMs=" << r.multiprocessors
             << " token_major=" << r.token_major;
}

/// Vectors, factors and logits in units of log 2 of a relation: t, and x = s - t, [B H, N, N] in float64.
struct Problem {
  at::Tensor student;
  at::Tensor teacher;
  cuda::LogitFactors factors{};
  at::Tensor t;
  at::Tensor x;
};

at::Tensor flat(const at::Tensor& vectors) { return vectors.flatten(0, 1).to(at::kDouble); }

Problem problem_of(const Relation& r) {
  Problem p;
  const at::Tensor teacher = gaussian(r.batch, r.heads, r.tokens, r.dim, 1);
  p.teacher = teacher.to(r.type);
  p.student = (teacher + r.noise * gaussian(r.batch, r.heads, r.tokens, r.dim, 2)).to(r.type);
  if (r.token_major) {
    p.teacher = p.teacher.transpose(1, 2).contiguous().transpose(1, 2);
    p.student = p.student.transpose(1, 2).contiguous().transpose(1, 2);
  }
  const auto scale = static_cast<float>(std::log2(std::exp(1.0)) / std::sqrt(static_cast<double>(r.dim)));
  p.factors.teacher = scale;
  p.factors.student = scale;
  p.factors.excess = 0;
  const at::Tensor s = flat(p.student).matmul(flat(p.student).mT()) * static_cast<double>(p.factors.student);
  p.t = flat(p.teacher).matmul(flat(p.teacher).mT()) * static_cast<double>(p.factors.teacher);
  p.x = s - p.t;
  return p;
}

template <typename Params>
Params params_of(const Relation& r, const Problem& p, const at::Tensor& wide_heads) {
  Params params{};
  params.student = vectors_of(p.student, r.heads);
  params.teacher = vectors_of(p.teacher, r.heads);
  params.batch = static_cast<int>(r.batch);
  params.heads = static_cast<int>(r.heads);
  params.tokens = static_cast<int>(r.tokens);
  params.causal = r.causal;
  params.traversal = r.rows ? cuda::Traversal::kRows : cuda::Traversal::kTriangular;
  params.factors = p.factors;
  params.group = cuda::RelationGroup::of(params.batch, &params.heads, 1);
  params.vectors.student[0] = params.student;
  params.vectors.teacher[0] = params.teacher;
  params.wide_heads = wide_heads.mutable_data_ptr<int>();
  return params;
}

template <typename T>
cudaError_t launch_of(const cuda::TriangularForwardParams& p, int multiprocessors) {
  if (p.traversal == cuda::Traversal::kRows) {
    if (p.student.dim <= 64) return cuda::sm90::launch_rows_forward<T, 64>(p, multiprocessors, nullptr);
    if (p.student.dim <= 128) return cuda::sm90::launch_rows_forward<T, 128>(p, multiprocessors, nullptr);
    return cuda::sm90::launch_rows_forward<T, 256>(p, multiprocessors, nullptr);
  }
  if (p.student.dim <= 64) return cuda::sm90::launch_forward<T, 64>(p, multiprocessors, nullptr);
  if (p.student.dim <= 128) return cuda::sm90::launch_forward<T, 128>(p, multiprocessors, nullptr);
  return cuda::sm90::launch_forward<T, 256>(p, multiprocessors, nullptr);
}
template <typename T>
cudaError_t launch_of(const cuda::TriangularBackwardParams& p, int multiprocessors) {
  if (p.traversal == cuda::Traversal::kRows) {
    if (p.student.dim <= 64) return cuda::sm90::launch_rows_backward<T, 64>(p, multiprocessors, nullptr);
    if (p.student.dim <= 128) return cuda::sm90::launch_rows_backward<T, 128>(p, multiprocessors, nullptr);
    return cuda::sm90::launch_rows_backward<T, 256>(p, multiprocessors, nullptr);
  }
  if (p.student.dim <= 64) return cuda::sm90::launch_backward<T, 64>(p, multiprocessors, nullptr);
  return cuda::sm90::launch_backward<T, 128>(p, multiprocessors, nullptr);
}
template <typename Params>
cudaError_t launch(const Relation& r, const Params& p) {
  return r.type == at::kHalf ? launch_of<__half>(p, r.multiprocessors) : launch_of<__nv_bfloat16>(p, r.multiprocessors);
}

at::Tensor visible_pairs(const Relation& r) {
  const at::Tensor all = at::ones({r.tokens, r.tokens}, at::kDouble);
  return r.causal ? all.tril() : all;
}

/// What a kernel is told of the largest of each 64 logits of a token with itself, in units of log 2.
/// @param at_least nats, of the last
at::Tensor largest_of_blocks(const Relation& r, const at::Tensor& own, double at_least) {
  const int64_t blocks = (r.tokens + 63) / 64;
  const at::Tensor padded = at::constant_pad_nd(own, {0, 64 * blocks - r.tokens});
  const at::Tensor largest = padded.view({own.size(0), blocks, 64}).amax(2).to(at::kFloat).contiguous();
  largest.select(1, blocks - 1).clamp_min_(at_least * std::log2(std::exp(1.0)));
  return largest.view(at::kInt);
}

double largest_relative_error(const at::Tensor& computed, const at::Tensor& exact, const at::Tensor& size) {
  return ((computed.to(at::kDouble) - exact).abs() / size).nan_to_num(0).max().item<double>();
}

/// Under schedules that differ by the case: a missing barrier shows in some.
class TriangularSm90 : public ::testing::TestWithParam<Relation> {
 protected:
  void SetUp() override { emulation::set_schedule(GetParam().schedule); }
  void TearDown() override { emulation::set_schedule(0); }
};

/// The three sums over the other tokens. float rounds exponents of up to 64 units and the products of vectors, of whose
/// difference phi is the square.
TEST_P(TriangularSm90, Forward) {
  const Relation& r = GetParam();
  const Problem p = problem_of(r);
  const at::Tensor own = p.t.diagonal(0, 1, 2);
  const at::Tensor references = own.to(at::kFloat).contiguous();
  // Whether heads are plain depends on their largest logit, here on what the kernel is told of it.
  const at::Tensor largest = largest_of_blocks(r, own, r.plain ? 0 : 61);
  const at::Tensor center = r.plain ? at::full({r.batch * r.heads, 1}, cuda::kHeadroom / 2, at::kDouble)
                                    : largest.view(at::kFloat).amax(1, true).to(at::kDouble) / 4;
  const at::Tensor values = (r.plain ? at::stack({at::zeros_like(own), at::ones_like(own)}, 2)
                                     : at::stack({own / 2 - cuda::kHeadroom / 2, at::exp2(own / 2 - center)}, 2))
                                .to(at::kFloat)
                                .contiguous();
  const at::Tensor plain = at::full({r.batch * r.heads}, -1, at::kInt);
  const at::Tensor wide = at::full({r.batch * r.heads}, r.rows ? 0 : -1, at::kInt);
  const at::Tensor sums = at::zeros({r.batch * r.heads, cuda::kSums, r.tokens}, at::kFloat);
  auto params = params_of<cuda::TriangularForwardParams>(r, p, wide);
  params.token_values = reinterpret_cast<const ForwardToken*>(values.const_data_ptr<float>());
  params.references = references.const_data_ptr<float>();
  params.largest = largest.const_data_ptr<int>();
  const at::Tensor centers = r.rows ? center.to(at::kFloat) : at::full(center.sizes(), NAN, at::kFloat);
  params.centers = centers.mutable_data_ptr<float>();
  params.plain_heads = plain.mutable_data_ptr<int>();
  params.sums = sums.mutable_data_ptr<float>();
  const at::Tensor own_logits = at::full({r.batch * r.heads, r.tokens, 2}, NAN, at::kFloat);
  params.own = reinterpret_cast<cuda::OwnLogit*>(own_logits.mutable_data_ptr<float>());
  ASSERT_EQ(launch(r, params), cudaSuccess);

  EXPECT_TRUE(at::equal(centers, center.to(at::kFloat)));
  EXPECT_TRUE(wide.eq(0).all().item<bool>());
  if (!r.rows) {
    EXPECT_TRUE(plain.eq(r.plain ? 1 : 0).all().item<bool>());
  }
  EXPECT_LT((own_logits.select(2, 0).to(at::kDouble) - own).abs().max().item<double>(), 1e-4);
  EXPECT_LT((own_logits.select(2, 1).to(at::kDouble) - p.x.diagonal(0, 1, 2)).abs().max().item<double>(), 1e-4);
  const at::Tensor bias = values.select(2, 0).to(at::kDouble);
  const at::Tensor weight = values.select(2, 1).to(at::kDouble);
  const at::Tensor others = visible_pairs(r) - at::eye(r.tokens, at::kDouble);
  const at::Tensor e = at::exp2(p.t - bias.unsqueeze(1) - bias.unsqueeze(2)) * weight.unsqueeze(1) * others;
  const at::Tensor difference = p.x / static_cast<double>(p.factors.student);
  const at::Tensor nats = p.x * std::log(2.0);
  const double tolerance = 2e-5;
  EXPECT_LT(largest_relative_error(sums.select(1, 0), e.sum(2), e.sum(2)), tolerance);
  EXPECT_LT(largest_relative_error(sums.select(1, 1), (e * difference).sum(2), (e * difference.abs()).sum(2)),
            tolerance);
  const at::Tensor phi = (e * (at::expm1(nats) - nats)).sum(2);
  EXPECT_LT(largest_relative_error(sums.select(1, 2), phi, phi), 2 * tolerance);
}

/// H X. H is rounded to 16 bits: twice what that does to the exact result is allowed, and what rounding both
/// probabilities to float does.
TEST_P(TriangularSm90, Backward) {
  const Relation& r = GetParam();
  if (!r.rows && (r.dim > cuda::sm90::kLargestBackwardDim || r.dim % 32 != 0)) {
    GTEST_SKIP() << "no kernel of this dimension";
  }
  const Problem p = problem_of(r);
  const at::Tensor pairs = visible_pairs(r);
  const at::Tensor teacher = at::log2((at::exp2(p.t) * pairs).sum(2));
  const at::Tensor student = at::log2((at::exp2(p.t + p.x) * pairs).sum(2));
  const at::Tensor center = (teacher.amax(1, true) + teacher.amin(1, true)) / 4;
  const at::Tensor upstream = gaussian(1, 1, r.batch * r.heads, r.tokens, 3)[0][0];
  const at::Tensor reference = (teacher.amax(1, true) - cuda::kPlainHighest).expand_as(teacher);
  const at::Tensor bias = r.plain ? reference / 2 : teacher / 2 - cuda::kHeadroom / 2;
  const at::Tensor key = r.plain ? at::ones_like(teacher) : at::exp2(teacher / 2 - center - cuda::kHeadroom / 2);
  const at::Tensor row =
      upstream * at::exp2(r.plain ? reference - teacher : center - teacher / 2 - cuda::kHeadroom / 2);
  const at::Tensor values =
      at::stack({bias, key, row, row * at::exp2(teacher - student)}, 2).to(at::kFloat).contiguous();
  const at::Tensor plain = at::full({r.batch * r.heads}, r.plain ? 1 : 0, at::kInt);
  const at::Tensor wide = at::zeros({r.batch * r.heads}, at::kInt);
  at::Tensor gradient = at::zeros({r.batch * r.heads, r.tokens, r.dim}, at::kFloat);
  const at::Tensor result = at::full(gradient.sizes(), NAN, r.type);
  const at::Tensor marks = testing::clear_marks(r.batch * r.heads, r.tokens);
  auto params = params_of<cuda::TriangularBackwardParams>(r, p, wide);
  params.token_values = reinterpret_cast<const BackwardToken*>(values.const_data_ptr<float>());
  params.gradient = gradient.mutable_data_ptr<float>();
  params.plain_heads = plain.const_data_ptr<int>();
  params.result = result.mutable_data_ptr();
  params.output_scale = 1;
  params.redo = marks.mutable_data_ptr<int>();
  ASSERT_EQ(launch(r, params), cudaSuccess);
  // Row by row the result is written, in its own type.
  if (r.rows) gradient = result;
  EXPECT_EQ(marks.sum().item<int64_t>(), 0);

  // G_ij = upstream_i (Q_ij - P_ij), straight from its definition.
  const at::Tensor q = at::exp2(p.t + p.x - student.unsqueeze(2));
  const at::Tensor g = upstream.unsqueeze(2) * (q - at::exp2(p.t - teacher.unsqueeze(2))) * pairs;
  const at::Tensor h = g + g.mT();
  const at::Tensor exact = h.matmul(flat(p.student));
  const at::Tensor rounded = h.to(r.type).to(at::kDouble).matmul(flat(p.student));
  const at::Tensor p_of_row = upstream.abs().unsqueeze(2) * at::exp2(p.t - teacher.unsqueeze(2)) * pairs;
  const double own = (p.t.diagonal(0, 1, 2).mean() * std::log(2.0)).item<double>();
  const double of_probabilities = (p_of_row + p_of_row.mT()).matmul(flat(p.student)).norm().item<double>();
  const double of_result = r.rows ? (exact.to(r.type).to(at::kDouble) - exact).norm().item<double>() : 0;
  const double promise = 2 * (rounded - exact).norm().item<double>() + 5e-7 * (1 + own) * of_probabilities + of_result;
  EXPECT_LT((gradient.to(at::kDouble) - exact).norm().item<double>(), promise);
  EXPECT_FALSE(gradient.isnan().any().item<bool>());
}

constexpr at::ScalarType kHalf = at::kHalf;

INSTANTIATE_TEST_SUITE_P(
    Relations,
    TriangularSm90,
    ::testing::Values(
        Relation{.heads = 1, .tokens = 1},
        Relation{.tokens = 64},
        Relation{.tokens = 130, .dim = 64, .token_major = true},
        Relation{.heads = 3, .tokens = 400, .dim = 64, .type = kHalf, .noise = 0.5, .schedule = 1},
        Relation{.batch = 2, .tokens = 200, .dim = 32, .causal = true},
        Relation{.tokens = 200, .dim = 40, .type = kHalf},
        Relation{.tokens = 257, .dim = 128, .type = kHalf, .multiprocessors = 64, .schedule = 2},
        Relation{.batch = 2, .tokens = 193, .dim = 128, .causal = true, .noise = 0.5, .schedule = 3},
        Relation{.heads = 1, .tokens = 400, .dim = 128, .multiprocessors = 132, .schedule = 4},
        Relation{.heads = 1, .tokens = 300, .dim = 96, .type = kHalf, .causal = true, .schedule = 5},
        Relation{.heads = 1, .tokens = 150, .dim = 256, .noise = 0.2, .schedule = 6},
        Relation{.heads = 1, .tokens = 2060, .dim = 32},  // more blocks' largest than a warp reads at once
        Relation{.tokens = 330, .dim = 64, .plain = true},
        Relation{.heads = 3, .tokens = 400, .dim = 64, .type = kHalf, .plain = true, .noise = 0.5, .schedule = 13},
        Relation{.batch = 2, .tokens = 257, .dim = 96, .plain = true, .multiprocessors = 64, .schedule = 14},
        Relation{.heads = 1, .tokens = 300, .dim = 128, .causal = true, .plain = true, .noise = 0.5},
        Relation{.heads = 1, .tokens = 384, .dim = 128, .type = kHalf, .causal = true, .plain = true},
        Relation{.heads = 1, .tokens = 300, .dim = 256, .plain = true, .schedule = 15},
        Relation{.heads = 1, .tokens = 1, .rows = true},
        Relation{.batch = 2, .heads = 3, .tokens = 200, .dim = 40, .rows = true, .token_major = true},
        Relation{.tokens = 330, .dim = 64, .type = kHalf, .causal = true, .rows = true, .schedule = 7},
        Relation{.tokens = 300, .dim = 128, .rows = true, .noise = 0.5, .schedule = 8},
        Relation{.tokens = 257, .dim = 128, .type = kHalf, .rows = true, .schedule = 9},
        Relation{.batch = 2, .heads = 1, .tokens = 193, .dim = 120, .causal = true, .rows = true, .schedule = 10},
        Relation{.tokens = 260, .dim = 256, .rows = true, .schedule = 11},
        Relation{.heads = 1, .tokens = 200, .dim = 192, .type = kHalf, .causal = true, .rows = true, .schedule = 12}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

void expect_wide_heads_left_alone(const Relation& r) {
  const Problem p = problem_of(r);
  const at::Tensor wide = at::tensor({0, 1}, at::kInt);
  const at::Tensor values = at::ones({r.heads, r.tokens, 4}, at::kFloat);
  const at::Tensor sums = at::zeros({r.heads, cuda::kSums, r.tokens}, at::kFloat);
  auto forward = params_of<cuda::TriangularForwardParams>(r, p, wide);
  const at::Tensor references = at::ones({r.heads, r.tokens}, at::kFloat);
  const at::Tensor largest = largest_of_blocks(r, references.to(at::kDouble), 0);
  largest[1].copy_(largest_of_blocks(r, references.to(at::kDouble), cuda::kLargestSpread)[1]);
  const at::Tensor plain = at::full({r.heads}, -1, at::kInt);
  forward.references = references.const_data_ptr<float>();
  forward.largest = largest.const_data_ptr<int>();
  forward.plain_heads = plain.mutable_data_ptr<int>();
  forward.token_values = reinterpret_cast<const ForwardToken*>(values.const_data_ptr<float>());
  const at::Tensor centers = at::zeros({r.heads}, at::kFloat);
  forward.centers = centers.mutable_data_ptr<float>();
  forward.sums = sums.mutable_data_ptr<float>();
  const at::Tensor own_logits = at::empty({r.heads, r.tokens, 2}, at::kFloat);
  forward.own = reinterpret_cast<cuda::OwnLogit*>(own_logits.mutable_data_ptr<float>());
  ASSERT_EQ(launch(r, forward), cudaSuccess);
  EXPECT_TRUE(at::equal(wide, at::tensor({0, 1}, at::kInt)));
  EXPECT_NE(sums[0].abs().sum().item<float>(), 0);
  EXPECT_EQ(sums[1].abs().sum().item<float>(), 0);

  const at::Tensor gradient = at::zeros({r.heads, r.tokens, r.dim}, at::kFloat);
  auto backward = params_of<cuda::TriangularBackwardParams>(r, p, wide);
  backward.token_values = reinterpret_cast<const BackwardToken*>(values.const_data_ptr<float>());
  backward.gradient = gradient.mutable_data_ptr<float>();
  const at::Tensor result = at::zeros({r.heads, r.tokens, r.dim}, r.type);
  const at::Tensor marks = testing::clear_marks(r.heads, r.tokens);
  backward.result = result.mutable_data_ptr();
  backward.output_scale = 1;
  backward.redo = marks.mutable_data_ptr<int>();
  ASSERT_EQ(launch(r, backward), cudaSuccess);
  const at::Tensor& written = r.rows ? result : gradient;
  EXPECT_NE(written[0].abs().sum().item<float>(), 0);
  EXPECT_EQ(written[1].abs().sum().item<float>(), 0);
}

TEST(TriangularSm90Heads, WideHeadsAreLeftAlone) { expect_wide_heads_left_alone({.heads = 2, .tokens = 100}); }
TEST(TriangularSm90Heads, WideHeadsAreLeftAloneByRows) {
  expect_wide_heads_left_alone({.heads = 2, .tokens = 100, .rows = true});
}

}  // namespace
}  // namespace linearard
