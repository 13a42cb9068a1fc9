#include <algorithm>
#include <cmath>

#include "instantiations/declarations.h"
#include "instantiations/generic.h"
#include "launch.h"

namespace linearard::cuda {
namespace {

constexpr int kLargestDim = 256;

bool fits(Scalar type, const Vectors& v) { return v.type == type && v.dim <= kLargestDim; }

bool is_ordinary(double scale) { return std::abs(scale) < 1e30; }

template <typename T>
cudaError_t tensor_core_forward(const ForwardParams& p, cudaStream_t stream) {
  const int dim = std::max(p.student_rows.dim, p.teacher_rows.dim);
#define LINEARARD_TRY(T, kDim) \
  if (dim <= kDim) return mma::launch_forward<T, kDim>(p, stream);
  LINEARARD_FOR_EACH_DIM(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t tensor_core_backward(const BackwardParams& p, cudaStream_t stream) {
  const int dim = std::max(p.owner_student.dim, p.owner_teacher.dim);
#define LINEARARD_TRY(T, kDim) \
  if (dim <= kDim) return mma::launch_backward<T, kDim>(p, stream);
  LINEARARD_FOR_EACH_DIM(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

}  // namespace

bool uses_tensor_cores(const ForwardParams& p) {
  const Scalar type = p.teacher_rows.type;
  return (type == Scalar::kHalf || type == Scalar::kBFloat16) && fits(type, p.teacher_rows) &&
         fits(type, p.teacher_keys) && fits(type, p.student_rows) && fits(type, p.student_keys) &&
         is_ordinary(p.scale_student) && is_ordinary(p.scale_teacher) && p.divergence == Divergence::kForwardKL &&
         !p.center && !p.wide_outputs;
}

bool uses_tensor_cores(const BackwardParams& p) {
  const Scalar type = p.owner_student.type;
  return (type == Scalar::kHalf || type == Scalar::kBFloat16) && fits(type, p.owner_student) &&
         fits(type, p.owner_teacher) && fits(type, p.other_student) && fits(type, p.other_teacher) &&
         is_ordinary(p.scale_student) && is_ordinary(p.scale_teacher) && p.divergence == Divergence::kForwardKL &&
         !p.wide_grad && !p.wide_statistics && p.owner_student.group == p.owner_teacher.group;
}

cudaError_t forward(const ForwardParams& p, cudaStream_t stream) {
  if (!uses_tensor_cores(p)) return generic::launch_forward<float>(p, Blocks::kAll, stream);
  return p.teacher_rows.type == Scalar::kHalf ? tensor_core_forward<__half>(p, stream)
                                              : tensor_core_forward<__nv_bfloat16>(p, stream);
}

cudaError_t backward(const BackwardParams& p, cudaStream_t stream) {
  if (!uses_tensor_cores(p)) return generic::launch_backward<float>(p, Blocks::kAll, stream);
  return p.owner_student.type == Scalar::kHalf ? tensor_core_backward<__half>(p, stream)
                                               : tensor_core_backward<__nv_bfloat16>(p, stream);
}

cudaError_t forward_in_double(const ForwardParams& p, Blocks blocks, cudaStream_t stream) {
  return generic::launch_forward<double>(p, blocks, stream);
}

cudaError_t backward_in_double(const BackwardParams& p, Blocks blocks, cudaStream_t stream) {
  return generic::launch_backward<double>(p, blocks, stream);
}

TileShape tiles_of(const ForwardParams& p) {
  if (!uses_tensor_cores(p)) return {64, 64};
  return {std::max(p.student_rows.dim, p.teacher_rows.dim) <= 128 ? 128 : 64, 32};
}

}  // namespace linearard::cuda
