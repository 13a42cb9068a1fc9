#include "cuda/tensors.h"

#include <limits>

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <device.h>
#include <launch.h>

namespace linearard::cuda {

cudaStream_t current_stream(const at::Device& device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

void check_launch(cudaError_t error, const char* action, const at::Device& device) {
  if (error == cudaSuccess) return;
  TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction,
              "linearard: this build has CUDA kernels for the architectures ", compiled_architectures(), ", and ",
              device, " needs others: build it again with -DLINEARARD_CUDA_ARCHITECTURES=<architecture>, or with ",
              "LINEARARD_CUDA=AUTO on the machine that has the GPU");
  TORCH_CHECK(error != cudaErrorInvalidConfiguration, "linearard: ", action,
              ": more blocks of rows than one CUDA launch takes (2^31)");
  TORCH_CHECK(false, "linearard: ", action, ": a CUDA kernel could not be launched on ", device, ": ",
              cudaGetErrorString(error));
}

int narrow(int64_t size) {
  TORCH_CHECK(size < std::numeric_limits<int>::max() - 256,
              "linearard: a dimension must be smaller than 2^31 - 256, got ", size);
  return static_cast<int>(size);
}

namespace {

Scalar scalar_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Scalar::kDouble;
    case at::kHalf:
      return Scalar::kHalf;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    default:
      return Scalar::kFloat;
  }
}

at::Tensor bytes_of(const std::optional<at::Tensor>& mask) { return mask ? mask->contiguous() : at::Tensor(); }

const uint8_t* data_of(const at::Tensor& mask) {
  return mask.defined() ? reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()) : nullptr;
}

at::Tensor boundaries_of(const std::optional<at::Tensor>& boundaries, const at::Device& device) {
  return boundaries ? boundaries->to(device, at::kLong).contiguous() : at::Tensor();
}

}  // namespace

Vectors vectors_of(const at::Tensor& tensor, int64_t heads) {
  constexpr int64_t kChunkBytes = 16;
  const auto whole = [&](int64_t elements) { return elements * tensor.element_size() % kChunkBytes == 0; };
  const bool aligned = whole(tensor.size(3)) && whole(tensor.stride(0)) && whole(tensor.stride(1)) &&
                       whole(tensor.stride(2)) &&
                       reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kChunkBytes == 0;
  return {tensor.const_data_ptr(),
          scalar_of(tensor.scalar_type()),
          narrow(tensor.size(3)),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.size(1) == 0 ? 1 : narrow(heads / tensor.size(1)),
          aligned};
}

VisibilityMemory visibility_of(const VisibilityOptions& options, const at::Device& device) {
  VisibilityMemory memory;
  memory.row_mask = bytes_of(options.row_mask);
  memory.key_mask = bytes_of(options.key_mask);
  Visibility& visibility = memory.visibility;
  visibility.rows = narrow(options.rows);
  visibility.keys = narrow(options.keys);
  visibility.causal = options.causal;
  visibility.row_mask = data_of(memory.row_mask);
  visibility.key_mask = data_of(memory.key_mask);
  if (!options.row_mask && !options.key_mask && !options.row_boundaries) return memory;

  const auto integers = at::TensorOptions().device(device).dtype(at::kInt);
  memory.ranges = at::empty({options.batch * (options.rows + options.keys), 3}, integers);
  at::Tensor prefix;
  if (memory.key_mask.defined()) {
    prefix = at::zeros({options.batch, options.keys + 1}, integers);
    at::Tensor counts = prefix.narrow(1, 1, options.keys);
    at::cumsum_out(counts, memory.key_mask, 1, at::kInt);
  }
  const at::Tensor row_boundaries = boundaries_of(options.row_boundaries, device);
  const at::Tensor key_boundaries = boundaries_of(options.key_boundaries, device);
  auto* ranges = reinterpret_cast<Range*>(memory.ranges.mutable_data_ptr<int>());
  visibility.row_ranges = ranges;
  visibility.key_ranges = ranges + options.batch * options.rows;
  RangeParams params{};
  params.batch = narrow(options.batch);
  params.rows = visibility.rows;
  params.keys = visibility.keys;
  params.causal = options.causal;
  if (row_boundaries.defined()) {
    params.row_boundaries = row_boundaries.const_data_ptr<int64_t>();
    params.key_boundaries = key_boundaries.const_data_ptr<int64_t>();
    params.sequences = narrow(row_boundaries.numel() - 1);
  }
  params.row_mask = visibility.row_mask;
  params.key_prefix = prefix.defined() ? prefix.const_data_ptr<int>() : nullptr;
  params.row_ranges = ranges;
  params.key_ranges = ranges + options.batch * options.rows;
  check_launch(compute_ranges(params, current_stream(device)), "ranges of packed or padded sequences", device);
  return memory;
}

int64_t mark_count(int64_t heads, int64_t rows) { return 1 + heads * ((rows + kRedoRows - 1) / kRedoRows); }

at::Tensor clear_marks(int64_t heads, int64_t rows, const at::Device& device) {
  return at::zeros({mark_count(heads, rows)}, at::TensorOptions().device(device).dtype(at::kInt));
}

}  // namespace linearard::cuda
