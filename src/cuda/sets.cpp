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

}  // namespace linearard::cuda
