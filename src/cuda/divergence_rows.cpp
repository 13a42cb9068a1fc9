#include "cuda/divergence_rows.h"

#include <divergence_rows.h>

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace linearard::aten {
namespace {

/// The current stream, through c10's device interface: the library does not link torch's CUDA libraries.
cudaStream_t current_stream(const at::Device& device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

cuda::LogitRows rows_of(const at::Tensor& teacher, const at::Tensor& delta) {
  return {teacher.const_data_ptr<float>(), delta.const_data_ptr<float>(), teacher.size(0) * teacher.size(1),
          teacher.size(2)};
}

void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "linearard: a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace

bool fused_rows_available(const at::Tensor& teacher, const at::Tensor& delta) {
  return teacher.is_cuda() && teacher.scalar_type() == at::kFloat && teacher.is_contiguous() && delta.is_contiguous();
}

RowValues fused_forward_kl(const at::Tensor& teacher, const at::Tensor& delta) {
  const c10::DeviceGuard device(teacher.device());
  const auto empty = [&] { return at::empty({teacher.size(0), teacher.size(1)}, teacher.options()); };
  const RowValues values{empty(), empty(), empty()};
  check_launch(cuda::forward_kl_rows(rows_of(teacher, delta),
                                     {values.kl.mutable_data_ptr<float>(), values.lse_student.mutable_data_ptr<float>(),
                                      values.lse_teacher.mutable_data_ptr<float>()},
                                     current_stream(teacher.device())));
  return values;
}

at::Tensor fused_forward_kl_gradient(const at::Tensor& teacher,
                                     const at::Tensor& delta,
                                     const at::Tensor& lse_teacher,
                                     const at::Tensor& lse_difference,
                                     const at::Tensor& weight,
                                     int64_t diagonal) {
  const c10::DeviceGuard device(teacher.device());
  const at::Tensor lse = lse_teacher.contiguous();
  const at::Tensor difference = lse_difference.contiguous();
  const at::Tensor row_weight = weight.contiguous();
  check_launch(cuda::forward_kl_gradient_rows(
      rows_of(teacher, delta),
      {lse.const_data_ptr<float>(), difference.const_data_ptr<float>(), row_weight.const_data_ptr<float>(),
       teacher.mutable_data_ptr<float>(), teacher.size(1), diagonal},
      current_stream(teacher.device())));
  return teacher;
}

}  // namespace linearard::aten
