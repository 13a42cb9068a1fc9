#include "instantiations.h"
#include "launch.h"
#include "tensor_map.h"

namespace linearard::cuda {
namespace {

/// Of the current device; 0 where the kernels do not run on it.
int multiprocessors() {
#ifdef LINEARARD_WITH_SM90A
  int device = 0;
  int major = 0;
  int minor = 0;
  int count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 0;
  }
  return major == 9 && minor == 0 ? count : 0;
#else
  return 0;
#endif
}

template <typename Params>
bool takes(const Params& p, int largest_dim) {
  const bool is_16_bit = p.student.type == Scalar::kHalf || p.student.type == Scalar::kBFloat16;
  return is_16_bit && p.teacher.type == p.student.type && p.teacher.dim == p.student.dim && p.student.dim > 0 &&
         p.student.dim % 8 == 0 && p.student.dim <= largest_dim && p.mask == nullptr && p.factors.excess == 0 &&
         sm90::can_map(p.student, p.batch, p.heads) && sm90::can_map(p.teacher, p.batch, p.heads) &&
         multiprocessors() > 0;
}

template <typename T>
cudaError_t forward_of(const TriangularForwardParams& p, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return sm90::launch_rows_forward<T, kDim>(p, multiprocessors(), stream);
  if (p.causal || p.traversal == Traversal::kRows) {
    LINEARARD_FOR_EACH_SM90_FORWARD(LINEARARD_TRY, T)
  }
#undef LINEARARD_TRY
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return sm90::launch_forward<T, kDim>(p, multiprocessors(), stream);
  LINEARARD_FOR_EACH_SM90_FORWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t backward_of(const TriangularBackwardParams& p, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return sm90::launch_rows_backward<T, kDim>(p, multiprocessors(), stream);
  if (p.traversal == Traversal::kRows) {
    LINEARARD_FOR_EACH_SM90_BACKWARD(LINEARARD_TRY, T)
  }
#undef LINEARARD_TRY
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return sm90::launch_backward<T, kDim>(p, multiprocessors(), stream);
  LINEARARD_FOR_EACH_SM90_BACKWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

}  // namespace

bool sm90_takes(const TriangularForwardParams& p) { return takes(p, sm90::kLargestForwardDim); }

bool sm90_takes(const TriangularBackwardParams& p) { return takes(p, sm90::kLargestBackwardDim); }

cudaError_t launch_triangular_forward_sm90(const TriangularForwardParams& p, cudaStream_t stream) {
  return p.student.type == Scalar::kHalf ? forward_of<__half>(p, stream) : forward_of<__nv_bfloat16>(p, stream);
}

cudaError_t launch_triangular_backward_sm90(const TriangularBackwardParams& p, cudaStream_t stream) {
  return p.student.type == Scalar::kHalf ? backward_of<__half>(p, stream) : backward_of<__nv_bfloat16>(p, stream);
}

}  // namespace linearard::cuda
