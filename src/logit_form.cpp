#include "logit_form.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/nan_to_num.h>

namespace linearard {
namespace {

// Products, logits and sums of float tiles stay below 1e30, so that phi, delta times a probability and the row sums
// (at most 2^31 terms) stay finite as well.
constexpr double kFloatLimit = 1e30;
// Products of double tiles stay below 1e280 and so do their scales; the kernels cut logits at 1e150. Upstream gradients
// times 1e150 must be finite too.
constexpr double kDoubleLimit = 1e280;
constexpr double kGradientLimit = 1e100;

bool fits_float(double magnitude, int64_t dimension, double scale) {
  const double product = magnitude * magnitude * static_cast<double>(dimension);
  const double size = std::abs(scale);
  return product < kFloatLimit && product * size < kFloatLimit && size < kFloatLimit &&
         (size == 0 || size > 1 / kFloatLimit);
}

/// A power of two that brings `magnitude` near 1, or 1 where products cannot overflow.
double overflow_multiplier(double magnitude, int64_t dimension) {
  if (magnitude * magnitude * static_cast<double>(dimension) < kDoubleLimit) return 1;
  return std::exp2(-std::ceil(std::log2(magnitude)));
}

double scale_of_products(double scale, double multiplier) {
  return std::clamp(scale / multiplier / multiplier, -kDoubleLimit, kDoubleLimit);
}

/// Largest finite absolute value (0 if there is none), and whether there are no others.
struct Magnitude {
  double largest = 0;
  bool finite = true;
};

/// @param padding undefined, or broadcasts to the tokens of `tensor` [..., N, D]: those do not count
double largest_absolute(const at::Tensor& tensor, const at::Tensor& padding) {
  if (!padding.defined()) return at::linalg_vector_norm(tensor, INFINITY).item<double>();
  // One number for each token: a copy of the tensor without its padding would be as large as the input.
  const at::Tensor tokens = at::maximum(tensor.amax(-1), tensor.amin(-1).neg_());
  return at::linalg_vector_norm(tokens.masked_fill_(padding, 0), INFINITY).item<double>();
}

/// @param tensor [B, ...], @param padding undefined, or [B, 1, N] for a tensor [B, H, N, D]
Magnitude magnitude_of(const at::Tensor& tensor, const at::Tensor& padding) {
  if (tensor.numel() == 0) return {};
  const double largest = largest_absolute(tensor, padding);
  if (std::isfinite(largest)) return {largest, true};
  Magnitude magnitude{0, false};
  for (int64_t batch = 0; batch < tensor.size(0); ++batch) {  // a copy of the whole would be as large as the input
    const at::Tensor finite = at::nan_to_num(tensor.select(0, batch), 0, 0, 0);
    const at::Tensor rows = padding.defined() ? padding.select(0, batch) : at::Tensor();
    magnitude.largest = std::max(magnitude.largest, largest_absolute(finite, rows));
  }
  return magnitude;
}

/// What decides. Padding does not.
struct InputSizes {
  bool float64 = false;           ///< whether an input is
  int64_t student_dimension = 1;  ///< Ds
  int64_t teacher_dimension = 1;  ///< Dt
  double student = 0;             ///< largest finite |x|
  double teacher = 0;             ///< largest finite |y|
  double gradient = 0;            ///< largest finite |grad_kl| x number of rows; 0 in the forward
  bool finite = true;             ///< no NaN and no infinity in x and y

  using Mask = std::optional<at::Tensor>;  ///< [B, N]

  void add_student(const at::Tensor& x, const Mask& mask) { add(x, mask, student, student_dimension); }
  void add_teacher(const at::Tensor& y, const Mask& mask) { add(y, mask, teacher, teacher_dimension); }
  void add_gradient(const at::Tensor& grad_kl, int64_t rows) {
    const double largest = magnitude_of(grad_kl, {}).largest * static_cast<double>(rows);
    gradient = std::min(largest, std::numeric_limits<double>::max());
  }

 private:
  void add(const at::Tensor& tensor, const Mask& mask, double& magnitude, int64_t& dimension) {
    const auto [largest, all_finite] = magnitude_of(tensor, mask ? mask->logical_not().unsqueeze(1) : at::Tensor());
    magnitude = std::max(magnitude, largest);
    dimension = tensor.size(-1);
    finite = finite && all_finite;
    float64 = float64 || tensor.scalar_type() == at::kDouble;
  }
};

LogitForm choose(const InputSizes& sizes, double scale_student, double scale_teacher) {
  LogitForm form;
  form.scale_student = scale_student;
  form.scale_teacher = scale_teacher;
  form.finite = sizes.finite;
  if (!sizes.float64) {
    const double gradient = sizes.gradient * std::max(1.0, sizes.student) * std::max(1.0, std::abs(scale_student));
    form.wide = !fits_float(sizes.student, sizes.student_dimension, scale_student) ||
                !fits_float(sizes.teacher, sizes.teacher_dimension, scale_teacher) || gradient > kFloatLimit;
    if (!form.wide) {
      const double ratio = scale_student / scale_teacher;  // NaN or infinite for a zero scale: no difference form
      form.difference = sizes.student_dimension == sizes.teacher_dimension && ratio > 1e-6 && ratio < 1e6;
      if (form.difference) form.student_ratio = std::sqrt(ratio);
      return form;
    }
  }
  form.compute = at::kDouble;
  if (sizes.gradient > kGradientLimit) form.gradient_multiplier = std::exp2(-std::ceil(std::log2(sizes.gradient)));
  form.student_multiplier = overflow_multiplier(sizes.student, sizes.student_dimension);
  form.teacher_multiplier = overflow_multiplier(sizes.teacher, sizes.teacher_dimension);
  form.scale_student = scale_of_products(scale_student, form.student_multiplier);
  form.scale_teacher = scale_of_products(scale_teacher, form.teacher_multiplier);
  return form;
}

}  // namespace

LogitForm choose_logit_form(const RelationArguments& arguments, const at::Tensor* grad_kl) {
  InputSizes sizes;
  sizes.add_student(arguments.student, arguments.key_padding_mask);
  sizes.add_teacher(arguments.teacher, arguments.key_padding_mask);
  if (grad_kl != nullptr) sizes.add_gradient(*grad_kl, arguments.student.size(2));
  return choose(sizes, arguments.scale_student, arguments.scale_teacher);
}

LogitForm choose_logit_form(const AttentionArguments& arguments, const at::Tensor* grad_kl) {
  InputSizes sizes;
  sizes.add_student(arguments.query_student, arguments.query_padding_mask);
  sizes.add_student(arguments.key_student, arguments.key_padding_mask);
  sizes.add_teacher(arguments.query_teacher, arguments.query_padding_mask);
  sizes.add_teacher(arguments.key_teacher, arguments.key_padding_mask);
  if (grad_kl != nullptr) {
    // A key collects the gradients of the queries of all heads that share it.
    const int64_t queries = arguments.query_student.size(1) * arguments.query_student.size(2);
    sizes.add_gradient(*grad_kl, std::max(queries, arguments.key_student.size(2)));
  }
  return choose(sizes, arguments.scale_student, arguments.scale_teacher);
}

namespace {

/// Elements that are in double at once, where a difference needs that. Fewer on the CPU, where nothing is launched.
constexpr int64_t kExactElementsCpu = int64_t{1} << 16;
constexpr int64_t kExactElements = int64_t{1} << 24;

}  // namespace

int64_t scaled_difference_bytes(int64_t elements, const LogitForm& form) {
  if (!form.difference || form.student_ratio == 1) return 0;
  return 3 * static_cast<int64_t>(sizeof(double)) * std::min(elements, kExactElementsCpu);
}

ScaledDifference scaled_difference(const at::Tensor& student, const at::Tensor& teacher, const LogitForm& form) {
  if (!form.difference) return {};
  ScaledDifference result{student, {}};
  if (form.student_ratio == 1) {
    result.difference = student - teacher;
  } else {
    // In double: the rounding of ratio * x would otherwise be of the size of a small difference.
    result.scaled_student = at::empty_like(student, at::MemoryFormat::Contiguous);
    result.difference = at::empty_like(student, at::MemoryFormat::Contiguous);
    const int64_t rows = student.size(-2);
    const int64_t elements = student.is_cpu() ? kExactElementsCpu : kExactElements;
    const int64_t step =
        std::max<int64_t>(1, elements / std::max<int64_t>(1, student.numel() / std::max<int64_t>(1, rows)));
    for (int64_t begin = 0; begin < rows; begin += step) {
      const int64_t count = std::min(step, rows - begin);
      const at::Tensor exact = student.narrow(-2, begin, count).to(at::kDouble).mul_(form.student_ratio);
      result.scaled_student.narrow(-2, begin, count).copy_(exact);
      result.difference.narrow(-2, begin, count).copy_(exact.sub_(teacher.narrow(-2, begin, count)));
    }
  }
  // Far apart, s = t + delta would carry the rounding of a teacher's logit that may be much larger than s.
  const at::Tensor close = at::linalg_vector_norm(result.difference).lt(at::linalg_vector_norm(teacher).mul(0.5));
  return close.item<bool>() ? result : ScaledDifference{};
}

}  // namespace linearard
