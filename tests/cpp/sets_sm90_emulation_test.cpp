#include <ostream>
#include <string>
#include <tuple>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <emulation/block.h>
#include <sm90/instantiations.h>
#include <sm90/rows_params.h>
#include <triangular/launch.h>

#include "kernel_parameters.h"
#include "reference.h"

// The Hopper kernels of two sets, run on the CPU by tests/emulation, against float64.

namespace linearard {
namespace {

using testing::gaussian;
using testing::gradient_promise;
using testing::KernelProblem;
using testing::relative_error;
using testing::row_excess;

struct Sets {
  int64_t batch = 1;
  int64_t heads = 2;
  int64_t key_heads = 2;
  int64_t rows = 200;
  int64_t keys = 200;
  int64_t dim = 64;
  at::ScalarType type = at::kBFloat16;
  bool causal = false;
  double noise = 0.05;  ///< student = teacher + noise
  double grown = 1;     ///< the keys' size at the end, of that at the beginning
  double shift = 0;     ///< along one direction of the teacher's queries, which moves a row's logits alike
  uint32_t schedule = 0;
};

std::ostream& operator<<(std::ostream& out, const Sets& s) {
  return out << s.batch << "x" << s.heads << "/" << s.key_heads << " " << s.rows << "x" << s.keys << "x" << s.dim << " "
             << s.type << " causal=" << s.causal << " noise=" << s.noise << " grown=" << s.grown;
}

template <typename T>
cudaError_t launch_of(const cuda::sm90::RowsForwardParams& p) {
  if (p.own_student.dim <= 64) return cuda::sm90::launch_pairs_forward<T, 64>(p, 4, nullptr);
  if (p.own_student.dim <= 128) return cuda::sm90::launch_pairs_forward<T, 128>(p, 4, nullptr);
  return cuda::sm90::launch_pairs_forward<T, 256>(p, 4, nullptr);
}
template <typename T>
cudaError_t launch_of(const cuda::sm90::RowsBackwardParams& p, cuda::sm90::Pairs pairs) {
  if (p.own_student.dim <= 64) return cuda::sm90::launch_pairs_backward<T, 64>(p, pairs, 4, nullptr);
  if (p.own_student.dim <= 128) return cuda::sm90::launch_pairs_backward<T, 128>(p, pairs, 4, nullptr);
  return cuda::sm90::launch_pairs_backward<T, 256>(p, pairs, 4, nullptr);
}

template <typename T>
cudaError_t launch_both(const cuda::sm90::RowsBackwardParams& p, float* key_sums) {
  if (p.own_student.dim <= 64) return cuda::sm90::launch_sets_backward<T, 64>(p, key_sums, 4, nullptr);
  return cuda::sm90::launch_sets_backward<T, 128>(p, key_sums, 4, nullptr);
}

at::Tensor marks_of(const at::Tensor& owners) {
  return testing::clear_marks(owners.size(0) * owners.size(1), owners.size(2));
}

/// Of both sets, and the marks.
struct Gradients {
  at::Tensor of_queries;
  at::Tensor of_keys;
  at::Tensor query_marks;
  at::Tensor key_marks;
};

class SetsSm90 : public ::testing::TestWithParam<Sets> {
 protected:
  void SetUp() override {
    const Sets& s = GetParam();
    emulation::set_schedule(s.schedule);
    const auto growth = at::linspace(1, s.grown, s.keys, at::kDouble).unsqueeze(1);
    const at::Tensor queries = gaussian(s.batch, s.heads, s.rows, s.dim, 1);
    at::Tensor keys = gaussian(s.batch, s.key_heads, s.keys, s.dim, 2) * growth;
    keys.select(3, 0).fill_(1);
    at::Tensor moved = queries + s.noise * gaussian(s.batch, s.heads, s.rows, s.dim, 3);
    moved.select(3, 0).add_(s.shift);
    query_teacher_ = queries.to(s.type);
    key_teacher_ = keys.to(s.type);
    query_ = moved.to(s.type);
    key_ = (keys + s.noise * gaussian(s.batch, s.key_heads, s.keys, s.dim, 4)).to(s.type);
    problem_ = testing::attention_problem(query_, key_, query_teacher_, key_teacher_, s.causal);
  }
  void TearDown() override { emulation::set_schedule(0); }

  at::Tensor query_;
  at::Tensor key_;
  at::Tensor query_teacher_;
  at::Tensor key_teacher_;
  KernelProblem problem_;

  at::Tensor run_backward(cuda::BackwardParams params, const at::Tensor& owners, const at::Tensor& grad_kl) const {
    const at::Tensor gradient = at::full_like(owners, std::numeric_limits<double>::quiet_NaN());
    const at::Tensor marks = marks_of(owners);
    const at::Tensor largest = grad_kl.abs().max();
    params.gradient = gradient.mutable_data_ptr();
    params.redo = marks.mutable_data_ptr<int>();
    if (owners.scalar_type() == at::kHalf) params.largest_grad = largest.const_data_ptr<float>();
    const at::Tensor memory = at::empty({grad_kl.numel(), 4}, at::kFloat);
    auto* const values = reinterpret_cast<cuda::sm90::RowToken*>(memory.mutable_data_ptr<float>());
    EXPECT_EQ(cuda::sm90::prepare_row_tokens(cuda::sm90::row_token_params_of(params, values), nullptr), cudaSuccess);
    const auto rows = cuda::sm90::rows_params_of(params, values);
    const auto pairs = params.row_term ? cuda::sm90::Pairs::kQueries : cuda::sm90::Pairs::kKeys;
    EXPECT_EQ(
        owners.scalar_type() == at::kHalf ? launch_of<__half>(rows, pairs) : launch_of<__nv_bfloat16>(rows, pairs),
        cudaSuccess);
    EXPECT_EQ(marks.sum().item<int64_t>(), 0);
    return gradient;
  }

  /// The steps of launch_both_sets_backward_sm90.
  Gradients run_both(const at::Tensor& grad_kl, const testing::ForwardResult& statistics) const {
    const auto unwritten = [](const at::Tensor& like) {
      return at::full_like(like, std::numeric_limits<double>::quiet_NaN());
    };
    Gradients gradients{unwritten(query_), unwritten(key_), marks_of(query_), marks_of(key_)};
    cuda::BackwardParams rows = testing::row_gradient_params(problem_, grad_kl, statistics);
    cuda::BackwardParams keys = testing::key_gradient_params(problem_, grad_kl, statistics);
    const at::Tensor largest = grad_kl.abs().max();
    if (query_.scalar_type() == at::kHalf) rows.largest_grad = keys.largest_grad = largest.const_data_ptr<float>();
    rows.gradient = gradients.of_queries.mutable_data_ptr();
    keys.gradient = gradients.of_keys.mutable_data_ptr();
    rows.redo = gradients.query_marks.mutable_data_ptr<int>();
    keys.redo = gradients.key_marks.mutable_data_ptr<int>();
    const at::Tensor values = at::empty({grad_kl.numel(), 4}, at::kFloat);
    const at::Tensor sums = unwritten(key_.to(at::kFloat));
    auto* const row_values = reinterpret_cast<cuda::sm90::RowToken*>(values.mutable_data_ptr<float>());
    auto* const key_sums = sums.mutable_data_ptr<float>();
    EXPECT_EQ(cuda::sm90::sum_floats_of(keys), sums.numel());
    EXPECT_EQ(cuda::sm90::prepare_row_tokens(cuda::sm90::row_token_params_of(rows, row_values, key_sums, sums.numel()),
                                             nullptr),
              cudaSuccess);
    EXPECT_EQ(sums.abs().sum().item<double>(), 0);
    const auto params = cuda::sm90::rows_params_of(rows, row_values);
    EXPECT_EQ(query_.scalar_type() == at::kHalf ? launch_both<__half>(params, key_sums)
                                                : launch_both<__nv_bfloat16>(params, key_sums),
              cudaSuccess);
    EXPECT_EQ(cuda::triangular::finish_backward(cuda::sm90::finish_params_of(keys, key_sums), nullptr), cudaSuccess);
    return gradients;
  }
};

TEST_P(SetsSm90, AgreesWithFloat64) {
  const Sets& s = GetParam();
  const testing::ForwardResult result = testing::empty_result(problem_);
  const at::Tensor counts = at::zeros({s.batch * s.heads}, at::kInt);
  const at::Tensor lists = at::zeros({s.batch * s.heads, s.rows}, at::kInt);
  const auto params = cuda::sm90::rows_params_of(testing::forward_params(problem_, result),
                                                 counts.mutable_data_ptr<int>(), lists.mutable_data_ptr<int>(), false);
  ASSERT_EQ(s.type == at::kHalf ? launch_of<__half>(params) : launch_of<__nv_bfloat16>(params), cudaSuccess);
  EXPECT_LE(counts.sum().item<int64_t>(), s.batch * s.heads * s.rows / 50) << "rows left to other kernels";

  const at::Tensor exact_query = query_.to(at::kDouble).requires_grad_();
  const at::Tensor exact_key = key_.to(at::kDouble).requires_grad_();
  const auto exact = testing::reference_attention(exact_query, exact_key, query_teacher_, key_teacher_,
                                                  AttentionOptions{}.causal(s.causal));
  // Listed rows are not promised.
  at::Tensor kept = at::ones({s.batch * s.heads, s.rows}, at::kBool);
  for (int64_t head = 0; head < kept.size(0); ++head)
    for (int64_t i = 0; i < counts[head].item<int64_t>(); ++i)
      kept[head][lists[head][i].item<int64_t>()] = false;
  kept = kept.view(result.kl.sizes());
  const auto chosen = [&](const at::Tensor& x) {
    return at::where(kept, x.to(at::kDouble), at::zeros({}, at::kDouble));
  };
  EXPECT_LE(row_excess(chosen(result.kl), chosen(std::get<0>(exact))), 0.0);
  const auto farthest = [](const at::Tensor& x, const at::Tensor& exact) {
    return ((x - exact).abs() / (1 + exact.abs())).max().item<double>();
  };
  EXPECT_LT(farthest(result.lse_student, std::get<1>(exact)), 1e-5);
  EXPECT_LT(farthest(result.lse_teacher, std::get<2>(exact)), 1e-5);

  const at::Tensor weights = at::linspace(-0.5, 1.0, result.kl.numel(), at::kFloat).view_as(result.kl);
  result.lse_student.copy_(std::get<1>(exact).detach());
  result.lse_teacher.copy_(std::get<2>(exact).detach());
  (std::get<0>(exact) * weights).sum().backward();
  EXPECT_LE(relative_error(run_backward(testing::row_gradient_params(problem_, weights, result), query_, weights),
                           exact_query.grad()),
            gradient_promise(s.type));
  EXPECT_LE(relative_error(run_backward(testing::key_gradient_params(problem_, weights, result), key_, weights),
                           exact_key.grad()),
            gradient_promise(s.type));
  if (s.dim > 128 || s.dim % 32 != 0) return;
  const Gradients both = run_both(weights, result);
  EXPECT_LE(relative_error(both.of_queries, exact_query.grad()), gradient_promise(s.type));
  EXPECT_LE(relative_error(both.of_keys, exact_key.grad()), gradient_promise(s.type));
  EXPECT_EQ(both.query_marks.sum().item<int64_t>(), 0);
  EXPECT_EQ(both.key_marks.sum().item<int64_t>(), 0);

  if (s.keys == 1) return;
  // What float cannot hold is marked in both.
  result.lse_student.fill_(-300);
  const Gradients marked = run_both(weights, result);
  EXPECT_GT(marked.query_marks.sum().item<int64_t>(), 0);
  EXPECT_GT(marked.key_marks.sum().item<int64_t>(), 0);
}

INSTANTIATE_TEST_SUITE_P(
    ,
    SetsSm90,
    ::testing::Values(
        Sets{},
        Sets{.heads = 4, .rows = 75, .keys = 110, .causal = true, .schedule = 1},
        Sets{.heads = 1, .key_heads = 1, .rows = 150, .keys = 90, .causal = true, .schedule = 2},
        Sets{.batch = 2, .heads = 4, .key_heads = 1, .rows = 130, .keys = 300, .dim = 128},
        Sets{.heads = 4, .key_heads = 1, .rows = 257, .keys = 257, .dim = 128, .causal = true, .schedule = 3},
        Sets{.rows = 129, .keys = 350, .dim = 40, .type = at::kHalf, .noise = 0.5, .schedule = 4},
        Sets{.heads = 2, .key_heads = 1, .rows = 129, .keys = 200, .dim = 96, .schedule = 11},
        Sets{.rows = 100, .keys = 200, .dim = 128, .type = at::kHalf, .causal = true, .noise = 0.2},
        Sets{.rows = 64, .keys = 400, .grown = 30, .schedule = 5},
        Sets{.rows = 64, .keys = 300, .noise = 0.02, .shift = 4},
        Sets{.rows = 140, .keys = 200, .dim = 256, .causal = true, .schedule = 6},
        Sets{.heads = 1, .key_heads = 1, .rows = 3, .keys = 1},
        Sets{.heads = 2, .key_heads = 1, .rows = 300, .keys = 100, .causal = true, .schedule = 7},
        Sets{.batch = 2,
             .heads = 3,
             .key_heads = 1,
             .rows = 190,
             .keys = 260,
             .dim = 120,
             .causal = true,
             .schedule = 8},
        Sets{.heads = 6,
             .key_heads = 2,
             .rows = 140,
             .keys = 140,
             .dim = 64,
             .type = at::kHalf,
             .causal = true,
             .noise = 1,
             .schedule = 9},
        Sets{.heads = 2, .key_heads = 1, .rows = 64, .keys = 600, .dim = 128, .grown = 30, .schedule = 10}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

}  // namespace
}  // namespace linearard
