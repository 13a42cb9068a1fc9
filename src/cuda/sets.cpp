#include "cuda/sets.h"

#include <ATen/ops/empty.h>

#include <sm90/launch.h>
#include <triangular/launch.h>

namespace linearard::cuda {

std::optional<ListedRows> sets_forward(const Problem& problem, ForwardParams params, const RowTensors& to) {
  if (problem.relation || problem.float64() || !hopper_is_enabled()) return std::nullopt;
  params.kl = to.kl.mutable_data_ptr();
  params.lse_student = to.lse_student.mutable_data_ptr();
  params.lse_teacher = to.lse_teacher.mutable_data_ptr();
  if (!sm90_takes_sets(params)) return std::nullopt;

  const at::Device device = problem.device();
  const int64_t problems = problem.batch() * problem.heads();
  const int64_t zeros = problems + mark_count(problems, problem.rows());
  const at::Tensor memory =
      at::empty({zeros + problems * problem.rows()}, at::TensorOptions().device(device).dtype(at::kInt));
  memory.narrow(0, 0, zeros).zero_();
  int* const counts = memory.mutable_data_ptr<int>();
  int* const lists = counts + zeros;
  constexpr const char* kAction = "forward";
  const cudaStream_t stream = current_stream(device);
  check_launch(launch_sets_forward_sm90(params, counts, lists, problem.deterministic, stream), kAction, device);
  if (problem.deterministic) {
    check_launch(triangular::order_rows({narrow(problems), narrow(problem.rows()), counts, lists}, stream), kAction,
                 device);
  }
  return ListedRows{memory, counts, lists, counts + problems};
}

bool sets_backward(const Problem& problem, const BackwardParams& params) {
  if (problem.relation || problem.float64() || !hopper_is_enabled() || !sm90_takes_sets(params)) return false;
  const at::Device device = problem.device();
  const int64_t bytes = problem.batch() * problem.heads() * problem.rows() * kSetsRowBytes;
  const at::Tensor memory = at::empty({bytes}, at::TensorOptions().device(device).dtype(at::kByte));
  check_launch(launch_sets_backward_sm90(params, memory.mutable_data_ptr(), current_stream(device)), "backward",
               device);
  return true;
}

bool takes_both_sets(const Problem& problem, const BackwardParams& rows, const BackwardParams& keys) {
  // Sums of the keys in float are within the memory that is promised where the keys are not more than the rows.
  return !problem.relation && !problem.float64() && !problem.deterministic && hopper_is_enabled() &&
         problem.student_keys.size(1) * problem.keys() <= problem.heads() * problem.rows() &&
         sm90_takes_both_sets(rows, keys);
}

void both_sets_backward(const Problem& problem, const BackwardParams& rows, const BackwardParams& keys) {
  const int64_t row_count = problem.batch() * problem.heads() * problem.rows();
  const int64_t value_floats = row_count * kSetsRowBytes / static_cast<int64_t>(sizeof(float));
  const int64_t sum_floats = problem.student_keys.numel();
  const at::Device device = problem.device();
  const at::Tensor memory =
      at::empty({value_floats + sum_floats}, at::TensorOptions().device(device).dtype(at::kFloat));
  auto* const values = memory.mutable_data_ptr<float>();
  check_launch(launch_both_sets_backward_sm90(rows, keys, values, values + value_floats, current_stream(device)),
               "backward", device);
}

}  // namespace linearard::cuda
