#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include <ATen/core/Tensor.h>

#include "arguments.h"

namespace linearard {

/// How inner products of packed rows become the logits of a call: chosen once, so that nothing can overflow in a tile
/// and so that delta = s - t keeps its relative precision.
struct LogitForm {
  at::ScalarType compute = at::kFloat;  ///< of tiles and packed rows: float, or double
  bool wide = false;                    ///< double although no input is: their size would overflow float
  /// delta may be computed as scale_teacher (d_i . x_j + y_i . d_j) rather than as s - t: see ScaledDifference.
  bool difference = false;
  double student_multiplier = 1;  ///< power of two on packed student rows, against overflow of the products
  double teacher_multiplier = 1;
  double scale_student = 1;  ///< of the products of packed student rows
  double scale_teacher = 1;
  double student_ratio = 1;        ///< sqrt(scale_student / scale_teacher): brings x into the teacher's scale
  double gradient_multiplier = 1;  ///< power of two on the upstream gradient, against overflow of its products
  bool finite = true;              ///< whether all inputs are

  /// Factor on H X of the packed student rows that makes it the gradient.
  double gradient_scale(double scale_of_student) const {
    constexpr double kLargest = std::numeric_limits<double>::max();
    return std::clamp(scale_of_student / student_multiplier, -kLargest, kLargest);
  }
};

/// @param grad_kl upstream gradient in a backward, null in a forward
LogitForm choose_logit_form(const RelationArguments& arguments, const at::Tensor* grad_kl);
LogitForm choose_logit_form(const AttentionArguments& arguments, const at::Tensor* grad_kl);

/// The operands of the difference form: d = x - y with x in the teacher's scale, [..., n, D] of the compute dtype.
/// Undefined where the form does not allow it, and where student and teacher are so far apart that s - t is better.
struct ScaledDifference {
  at::Tensor scaled_student;
  at::Tensor difference;
};

/// @param student, teacher packed rows
ScaledDifference scaled_difference(const at::Tensor& student, const at::Tensor& teacher, const LogitForm& form);

/// Upper bound on what that takes on the CPU beyond its results.
/// @param elements of student
int64_t scaled_difference_bytes(int64_t elements, const LogitForm& form);

}  // namespace linearard
