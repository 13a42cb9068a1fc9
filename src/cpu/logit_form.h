#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace linearard::cpu {

/// How inner products of packed rows become the logits of a call: chosen once, so that nothing can overflow in a tile
/// and so that delta = s - t keeps its relative precision.
struct LogitForm {
  at::ScalarType compute = at::kFloat;  ///< of tiles and packed rows: float, or double
  bool wide = false;                    ///< double although no input is: their size would overflow float
  /// delta by scale_teacher (d_i . x_j + y_i . d_j), d = x - y with x in the teacher's scale, rather than by s - t.
  bool difference = false;
  double student_multiplier = 1;  ///< power of two on packed student rows, against overflow of the products
  double teacher_multiplier = 1;
  double scale_student = 1;  ///< of the products of packed student rows
  double scale_teacher = 1;
  double student_ratio = 1;  ///< sqrt(scale_student / scale_teacher): brings x into the teacher's scale
  bool finite = true;        ///< whether all inputs are
};

/// What decides.
struct InputSizes {
  bool float64 = false;           ///< whether an input is
  int64_t student_dimension = 1;  ///< Ds
  int64_t teacher_dimension = 1;  ///< Dt
  double student = 0;             ///< largest finite |x|
  double teacher = 0;             ///< largest finite |y|
  double gradient = 0;            ///< largest finite |grad_kl| x number of rows; 0 in the forward
  bool finite = true;             ///< no NaN and no infinity in x and y

  void add_student(const at::Tensor& x);
  void add_teacher(const at::Tensor& y);
  void add_gradient(const at::Tensor& grad_kl, int64_t rows);
};

LogitForm choose_logit_form(const InputSizes& sizes, double scale_student, double scale_teacher);

}  // namespace linearard::cpu
