#include <algorithm>
#include <cmath>

#include "instantiations.h"
#include "launch.h"

namespace linearard::cuda::triangular {
namespace {

/// Dynamic shared memory that a block may have on the current device.
int shared_bytes_of_device() {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes;
}

template <typename T>
int forward_bytes(int dim) {
#define LINEARARD_TRY(T, kDim) \
  if (dim <= kDim) return forward_shared_bytes<T, kDim>();
  LINEARARD_FOR_EACH_TRIANGULAR_FORWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return 0;
}

template <typename T>
int backward_bytes(int dim) {
#define LINEARARD_TRY(T, kDim) \
  if (dim <= kDim) return backward_shared_bytes<T, kDim>();
  LINEARARD_FOR_EACH_TRIANGULAR_BACKWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return 0;
}

template <typename T>
cudaError_t forward_of(const TriangularForwardParams& p, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return launch_forward<T, kDim>(p, stream);
  LINEARARD_FOR_EACH_TRIANGULAR_FORWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t backward_of(const TriangularBackwardParams& p, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return launch_backward<T, kDim>(p, stream);
  LINEARARD_FOR_EACH_TRIANGULAR_BACKWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename Params>
bool is_a_16_bit_relation(const Params& p) {
  // The coefficients of phi are powers of the scale, up to the fifth.
  const auto ordinary = [](float factor) { return factor > 1e-6f && factor < 1e6f; };
  return (p.student.type == Scalar::kHalf || p.student.type == Scalar::kBFloat16) && p.teacher.type == p.student.type &&
         p.teacher.dim == p.student.dim && p.student.aligned && p.teacher.aligned && ordinary(p.factors.student) &&
         ordinary(p.factors.teacher);
}

}  // namespace

bool takes(const TriangularForwardParams& p) {
  if (!is_a_16_bit_relation(p)) return false;
  const int bytes = p.student.type == Scalar::kHalf ? forward_bytes<__half>(p.student.dim)
                                                    : forward_bytes<__nv_bfloat16>(p.student.dim);
  return bytes > 0 && bytes <= shared_bytes_of_device();
}

bool takes(const TriangularBackwardParams& p) {
  if (!is_a_16_bit_relation(p)) return false;
  const int bytes = p.student.type == Scalar::kHalf ? backward_bytes<__half>(p.student.dim)
                                                    : backward_bytes<__nv_bfloat16>(p.student.dim);
  return bytes > 0 && bytes <= shared_bytes_of_device();
}

cudaError_t forward(const TriangularForwardParams& p, cudaStream_t stream) {
  return p.student.type == Scalar::kHalf ? forward_of<__half>(p, stream) : forward_of<__nv_bfloat16>(p, stream);
}

cudaError_t backward(const TriangularBackwardParams& p, cudaStream_t stream) {
  return p.student.type == Scalar::kHalf ? backward_of<__half>(p, stream) : backward_of<__nv_bfloat16>(p, stream);
}

}  // namespace linearard::cuda::triangular
