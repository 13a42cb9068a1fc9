#include "../triangular/launch.h"
#include "instantiations.h"
#include "launch.h"
#include "rows_params.h"
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

/// Both sides of a set.
bool can_map_both(const Vectors& student, const Vectors& teacher, int batch, int heads) {
  return student.type == teacher.type && student.dim == teacher.dim && student.group == teacher.group &&
         sm90::can_map(sm90::by_own_heads(student), batch, heads / student.group) &&
         sm90::can_map(sm90::by_own_heads(teacher), batch, heads / teacher.group);
}

/// Of a call on two sets.
template <typename Params>
bool takes_sets(const Params& p, const Vectors& rows, const Vectors& keys) {
  const bool is_16_bit = rows.type == Scalar::kHalf || rows.type == Scalar::kBFloat16;
  return is_16_bit && keys.type == rows.type && keys.dim == rows.dim && rows.dim > 0 && rows.dim % 8 == 0 &&
         rows.dim <= sm90::kLargestRowsDim && rows.group == 1 && p.divergence == Divergence::kForwardKL &&
         p.visibility.row_ranges == nullptr && p.visibility.key_mask == nullptr && p.visibility.row_mask == nullptr &&
         p.scale_student == p.scale_teacher && p.scale_student > 1e-6 && p.scale_student < 1e6 && multiprocessors() > 0;
}

template <typename T>
cudaError_t forward_of(const sm90::RowsForwardParams& p, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.own_student.dim <= kDim) return sm90::launch_pairs_forward<T, kDim>(p, multiprocessors(), stream);
  LINEARARD_FOR_EACH_SM90_ROWS(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t backward_of(const sm90::RowsBackwardParams& p, sm90::Pairs pairs, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.own_student.dim <= kDim) return sm90::launch_pairs_backward<T, kDim>(p, pairs, multiprocessors(), stream);
  LINEARARD_FOR_EACH_SM90_ROWS(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t both_of(const sm90::RowsBackwardParams& p, float* key_sums, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.own_student.dim <= kDim) return sm90::launch_sets_backward<T, kDim>(p, key_sums, multiprocessors(), stream);
  LINEARARD_FOR_EACH_SM90_BACKWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t forward_of(const TriangularForwardParams& p, cudaStream_t stream) {
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return sm90::launch_rows_forward<T, kDim>(p, multiprocessors(), stream);
  if (p.traversal == Traversal::kRows) {
    LINEARARD_FOR_EACH_SM90_ROWS(LINEARARD_TRY, T)
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
    LINEARARD_FOR_EACH_SM90_ROWS(LINEARARD_TRY, T)
  }
#undef LINEARARD_TRY
#define LINEARARD_TRY(T, kDim) \
  if (p.student.dim <= kDim) return sm90::launch_backward<T, kDim>(p, multiprocessors(), stream);
  LINEARARD_FOR_EACH_SM90_BACKWARD(LINEARARD_TRY, T)
#undef LINEARARD_TRY
  return cudaErrorInvalidValue;
}

}  // namespace

bool sm90_takes(const TriangularForwardParams& p) {
  static_assert(sm90::kLargestForwardDim == sm90::kLargestRowsDim);
  return takes(p, sm90::kLargestForwardDim);
}

bool sm90_takes(const TriangularBackwardParams& p) {
  if (p.traversal == Traversal::kRows) return takes(p, sm90::kLargestRowsDim);
  return p.student.dim % sm90::kFloatLineDims == 0 && takes(p, sm90::kLargestBackwardDim);
}

cudaError_t launch_triangular_forward_sm90(const TriangularForwardParams& p, cudaStream_t stream) {
  return p.student.type == Scalar::kHalf ? forward_of<__half>(p, stream) : forward_of<__nv_bfloat16>(p, stream);
}

cudaError_t launch_triangular_backward_sm90(const TriangularBackwardParams& p, cudaStream_t stream) {
  return p.student.type == Scalar::kHalf ? backward_of<__half>(p, stream) : backward_of<__nv_bfloat16>(p, stream);
}

bool sm90_takes_sets(const ForwardParams& p) {
  return takes_sets(p, p.student_rows, p.student_keys) && !p.teacher_only && !p.center && !p.wide_outputs &&
         p.row_counts == nullptr && can_map_both(p.student_rows, p.teacher_rows, p.batch, p.heads) &&
         can_map_both(p.student_keys, p.teacher_keys, p.batch, p.heads);
}

bool sm90_takes_sets(const BackwardParams& p) {
  if (p.row_term == p.column_term || p.wide_grad || p.wide_statistics || p.only_heads != nullptr) return false;
  const int row_heads = p.row_term ? p.heads : p.heads * p.other_heads;
  return takes_sets(p, p.row_term ? p.owner_student : p.other_student,
                    p.row_term ? p.other_student : p.owner_student) &&
         can_map_both(p.owner_student, p.owner_teacher, p.batch, row_heads) &&
         can_map_both(p.other_student, p.other_teacher, p.batch, row_heads);
}

cudaError_t launch_sets_forward_sm90(
    const ForwardParams& p, int* row_counts, int* row_lists, bool ordered, cudaStream_t stream) {
  const sm90::RowsForwardParams rows = sm90::rows_params_of(p, row_counts, row_lists, ordered);
  return p.student_rows.type == Scalar::kHalf ? forward_of<__half>(rows, stream)
                                              : forward_of<__nv_bfloat16>(rows, stream);
}

cudaError_t launch_sets_backward_sm90(const BackwardParams& p, void* row_values, cudaStream_t stream) {
  auto* const values = static_cast<sm90::RowToken*>(row_values);
  const cudaError_t error = sm90::prepare_row_tokens(sm90::row_token_params_of(p, values), stream);
  if (error != cudaSuccess) return error;
  const sm90::RowsBackwardParams rows = sm90::rows_params_of(p, values);
  const sm90::Pairs pairs = p.row_term ? sm90::Pairs::kQueries : sm90::Pairs::kKeys;
  return p.owner_student.type == Scalar::kHalf ? backward_of<__half>(rows, pairs, stream)
                                               : backward_of<__nv_bfloat16>(rows, pairs, stream);
}

bool sm90_takes_both_sets(const BackwardParams& rows, const BackwardParams& keys) {
  return sm90_takes_sets(rows) && sm90_takes_sets(keys) && rows.owner_student.dim <= sm90::kLargestBackwardDim &&
         rows.owner_student.dim % sm90::kFloatLineDims == 0;
}

cudaError_t launch_both_sets_backward_sm90(
    const BackwardParams& rows, const BackwardParams& keys, void* row_values, float* key_sums, cudaStream_t stream) {
  auto* const values = static_cast<sm90::RowToken*>(row_values);
  const sm90::RowTokenParams prepare = sm90::row_token_params_of(rows, values, key_sums, sm90::sum_floats_of(keys));
  cudaError_t error = sm90::prepare_row_tokens(prepare, stream);
  if (error != cudaSuccess) return error;
  const sm90::RowsBackwardParams p = sm90::rows_params_of(rows, values);
  error = rows.owner_student.type == Scalar::kHalf ? both_of<__half>(p, key_sums, stream)
                                                   : both_of<__nv_bfloat16>(p, key_sums, stream);
  if (error != cudaSuccess) return error;
  return triangular::finish_backward(sm90::finish_params_of(keys, key_sums), stream);
}

}  // namespace linearard::cuda
