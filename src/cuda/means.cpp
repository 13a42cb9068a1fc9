#include <algorithm>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <means.h>

#include "cuda/tensors.h"
#include "operators.h"

// The reductions of losses: means over rows, for CUDA tensors.

namespace linearard::cuda {
namespace {

/// The means of `lists`, of one dtype, into means [lists] and, if defined, their inverse lengths.
void launch_means(at::TensorList lists, const at::Tensor& to, const at::Tensor& inverse_counts) {
  const auto count = static_cast<int64_t>(lists.size());
  const at::Tensor partial =
      at::empty({std::min<int64_t>(count, kLargestMeans) * kMeanPartials}, to.options().dtype(at::kDouble));
  const int64_t element = to.element_size();
  for (int64_t first = 0; first < count; first += kLargestMeans) {
    MeansParams params{};
    params.lists = static_cast<int>(std::min<int64_t>(count - first, kLargestMeans));
    params.type = to.scalar_type() == at::kDouble ? Scalar::kDouble : Scalar::kFloat;
    for (int i = 0; i < params.lists; ++i) {
      const at::Tensor& values = lists[first + i];
      params.values[i] = values.const_data_ptr();
      params.counts[i] = values.numel();
    }
    const auto at = [&](const at::Tensor& results) -> void* {
      return results.defined() ? static_cast<char*>(results.mutable_data_ptr()) + first * element : nullptr;
    };
    params.partial = partial.mutable_data_ptr<double>();
    params.means = at(to);
    params.inverse_counts = at(inverse_counts);
    check_launch(means(params, current_stream(to.device())), "mean of rows", to.device());
  }
}

void check_real(const char* name, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble || tensor.scalar_type() == at::kFloat, name, ": ", argument,
              " must be float32 or float64, got ", tensor.scalar_type());
}

void check_rows(const char* name, const at::Tensor& kl) {
  check_real(name, "kl", kl);
  TORCH_CHECK(kl.numel() > 0, name, ": kl must not be empty");
}

at::Tensor mean_of_rows(const at::Tensor& kl) {
  const c10::DeviceGuard guard(kl.device());
  check_rows("mean_of_rows", kl);
  at::Tensor result = at::empty({}, kl.options());
  launch_means(kl.contiguous(), result, {});
  return result;
}

at::Tensor mean_of_rows_backward(const at::Tensor& grad, int64_t count) {
  const c10::DeviceGuard guard(grad.device());
  check_real("mean_of_rows_backward", "grad", grad);
  TORCH_CHECK(grad.numel() == 1, "mean_of_rows_backward: grad must be one number, got ", grad.numel());
  at::Tensor result = at::empty_like(grad);
  const Scalar type = grad.scalar_type() == at::kDouble ? Scalar::kDouble : Scalar::kFloat;
  check_launch(quotient({type, grad.const_data_ptr(), static_cast<double>(count), result.mutable_data_ptr()},
                        current_stream(grad.device())),
               "gradient of a mean", grad.device());
  return result;
}

TwoTensors means_of_rows(at::TensorList kl) {
  const c10::DeviceGuard guard(kl[0].device());
  at::ScalarType dtype = at::kFloat;
  for (const at::Tensor& rows : kl) {
    check_rows("means_of_rows", rows);
    if (rows.scalar_type() == at::kDouble) dtype = at::kDouble;
  }
  TensorVector lists;
  for (const at::Tensor& rows : kl)
    lists.push_back(contiguous_as(rows, dtype));
  const auto one_each = [&] { return at::empty({static_cast<int64_t>(kl.size())}, kl[0].options().dtype(dtype)); };
  const TwoTensors results{one_each(), one_each()};
  launch_means(lists, std::get<0>(results), std::get<1>(results));
  return results;
}

}  // namespace
}  // namespace linearard::cuda

TORCH_LIBRARY_IMPL(linearard, CUDA, m) {
  m.impl("mean_of_rows", &linearard::cuda::mean_of_rows);
  m.impl("mean_of_rows_backward", &linearard::cuda::mean_of_rows_backward);
  m.impl("means_of_rows", &linearard::cuda::means_of_rows);
}
