#include "checks.h"

#include <cmath>
#include <string>

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>

namespace linearard {
namespace {

constexpr int64_t kMaxHeadDimension = 512;

/// A tensor of a list, in errors.
std::string place_of(const char* list, size_t i) { return c10::str(list, "[", i, "]"); }

void check_dense(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, ": ", argument, " must be a tensor, got an undefined one");
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", argument, " must be a dense (strided) tensor, got layout ",
              tensor.layout());
}

/// [B, H, N, D] of a supported dtype with a contiguous last dimension.
void check_vectors(const char* op, const char* argument, const at::Tensor& tensor) {
  check_dense(op, argument, tensor);
  TORCH_CHECK(tensor.dim() == 4, op, ": ", argument, " must have 4 dimensions [B, H, N, D], got ", tensor.dim(),
              " (shape ", tensor.sym_sizes(), ")");
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op, ": ",
              argument, " must be float32, float64, bfloat16 or float16, got ", dtype);
  const c10::SymInt& dimension = tensor.sym_size(3);
  TORCH_CHECK(dimension >= 1 && dimension <= kMaxHeadDimension, op, ": ", argument,
              " must have a head dimension (last) from 1 to ", kMaxHeadDimension, ", got ", dimension, " (shape ",
              tensor.sym_sizes(), ")");
  TORCH_CHECK(dimension == 1 || tensor.sym_stride(3) == 1, op, ": ", argument,
              " must have a contiguous last dimension (stride 1), got stride ", tensor.sym_stride(3), " (strides ",
              tensor.sym_strides(), "); call .contiguous() first");
}

void check_same_device(const char* op,
                       const char* argument,
                       const at::Tensor& tensor,
                       const char* other_argument,
                       const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), op, ": ", argument, " must be on the device of ", other_argument, " (",
              other.device(), "), got ", tensor.device());
}

void check_same_size(const char* op,
                     const char* argument,
                     const at::Tensor& tensor,
                     const char* other_argument,
                     const at::Tensor& other,
                     int64_t dimension,
                     const char* dimension_name) {
  TORCH_CHECK(tensor.sym_size(dimension) == other.sym_size(dimension), op, ": ", argument, " must have the ",
              dimension_name, " of ", other_argument, " (", other.sym_size(dimension), "), got ",
              tensor.sym_size(dimension), " (shapes ", tensor.sym_sizes(), " and ", other.sym_sizes(), ")");
}

double check_scale(const char* op, const char* argument, const std::optional<double>& scale, const at::Tensor& x) {
  if (!scale) return 1.0 / std::sqrt(static_cast<double>(x.sym_size(3).guard_int(__FILE__, __LINE__)));
  TORCH_CHECK(std::isfinite(*scale), op, ": ", argument, " must be a finite number, got ", *scale);
  return *scale;
}

/// [B, N] bool like the rows of x.
void check_mask(const char* op, const char* argument, const std::optional<at::Tensor>& mask, const at::Tensor& x) {
  if (!mask) return;
  check_dense(op, argument, *mask);
  TORCH_CHECK(mask->scalar_type() == at::kBool, op, ": ", argument, " must be bool (true = a real token), got ",
              mask->scalar_type());
  TORCH_CHECK(mask->dim() == 2 && mask->sym_size(0) == x.sym_size(0) && mask->sym_size(1) == x.sym_size(2), op, ": ",
              argument, " must have shape [B, N] = [", x.sym_size(0), ", ", x.sym_size(2), "], got ",
              mask->sym_sizes());
  TORCH_CHECK(mask->device() == x.device(), op, ": ", argument, " must be on the device of the inputs (", x.device(),
              "), got ", mask->device());
}

void check_boundaries(const char* op,
                      const char* argument,
                      const std::optional<at::Tensor>& cu_seqlens,
                      const at::Tensor& x) {
  if (!cu_seqlens) return;
  check_dense(op, argument, *cu_seqlens);
  TORCH_CHECK(cu_seqlens->scalar_type() == at::kInt || cu_seqlens->scalar_type() == at::kLong, op, ": ", argument,
              " must be int32 or int64, got ", cu_seqlens->scalar_type());
  TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->sym_size(0) >= 1, op, ": ", argument,
              " must have shape [number of sequences + 1], got ", cu_seqlens->sym_sizes());
  TORCH_CHECK(cu_seqlens->device() == x.device(), op, ": ", argument, " must be on the device of the inputs (",
              x.device(), "), got ", cu_seqlens->device());
  TORCH_CHECK(x.sym_size(0) == 1, op, ": ", argument,
              " packs sequences into one batch entry and needs B = 1, got B = ", x.sym_size(0));
}

void check_beta(const char* op, double beta) {
  TORCH_CHECK(beta > 0 && beta < 1, op, ": beta must lie inside (0, 1), got ", beta);
}

bool resolve_deterministic(const std::optional<bool>& deterministic) {
  return deterministic ? *deterministic : at::globalContext().deterministicAlgorithms();
}

}  // namespace

RelationArguments check_relation(const char* op,
                                 const at::Tensor& student,
                                 const at::Tensor& teacher,
                                 const RelationOptions& options,
                                 const char* student_name,
                                 const char* teacher_name) {
  check_vectors(op, student_name, student);
  check_vectors(op, teacher_name, teacher);
  check_same_device(op, teacher_name, teacher, student_name, student);
  check_same_size(op, teacher_name, teacher, student_name, student, 0, "batch size");
  check_same_size(op, teacher_name, teacher, student_name, student, 1, "number of heads");
  check_same_size(op, teacher_name, teacher, student_name, student, 2, "sequence length");
  check_mask(op, "key_padding_mask", options.key_padding_mask(), student);
  check_boundaries(op, "cu_seqlens", options.cu_seqlens(), student);
  check_beta(op, options.beta());
  if (options.lse_teacher()) check_row_tensor(op, "lse_teacher", *options.lse_teacher(), student);
  return {student,
          teacher,
          options.key_padding_mask(),
          options.cu_seqlens(),
          check_scale(op, "scale_student", options.scale_student(), student),
          check_scale(op, "scale_teacher", options.scale_teacher(), teacher),
          options.causal(),
          options.divergence(),
          options.beta(),
          resolve_deterministic(options.deterministic())};
}

std::vector<RelationArguments> check_relations(const char* op,
                                               at::TensorList students,
                                               at::TensorList teachers,
                                               const RelationOptions& options) {
  TORCH_CHECK(!students.empty(), op, ": students must hold at least one tensor, got none");
  TORCH_CHECK(teachers.size() == students.size(), op, ": teachers must hold as many tensors as students (",
              students.size(), "), got ", teachers.size());
  TORCH_CHECK(!options.lse_teacher(), op, ": lse_teacher must not be given, it is an option of one relation");
  std::vector<RelationArguments> relations;
  relations.reserve(students.size());
  for (size_t i = 0; i < students.size(); ++i) {
    const std::string student = place_of("students", i);
    const std::string teacher = place_of("teachers", i);
    if (i > 0) {
      check_vectors(op, student.c_str(), students[i]);
      check_same_device(op, student.c_str(), students[i], "students[0]", students[0]);
      check_same_size(op, student.c_str(), students[i], "students[0]", students[0], 0, "batch size");
      check_same_size(op, student.c_str(), students[i], "students[0]", students[0], 2, "sequence length");
    }
    relations.push_back(check_relation(op, students[i], teachers[i], options, student.c_str(), teacher.c_str()));
  }
  return relations;
}

RelationArguments check_lse(const char* op, const at::Tensor& x, const RelationOptions& options) {
  check_vectors(op, "x", x);
  check_mask(op, "key_padding_mask", options.key_padding_mask(), x);
  check_boundaries(op, "cu_seqlens", options.cu_seqlens(), x);
  RelationArguments arguments;
  arguments.student = arguments.teacher = x;
  arguments.key_padding_mask = options.key_padding_mask();
  arguments.cu_seqlens = options.cu_seqlens();
  arguments.scale_student = arguments.scale_teacher = check_scale(op, "scale", options.scale_teacher(), x);
  arguments.causal = options.causal();
  arguments.deterministic = resolve_deterministic(options.deterministic());
  return arguments;
}

AttentionArguments check_attention(const char* op,
                                   const at::Tensor& query_student,
                                   const at::Tensor& key_student,
                                   const at::Tensor& query_teacher,
                                   const at::Tensor& key_teacher,
                                   const AttentionOptions& options) {
  check_vectors(op, "query_student", query_student);
  check_vectors(op, "key_student", key_student);
  check_vectors(op, "query_teacher", query_teacher);
  check_vectors(op, "key_teacher", key_teacher);
  check_same_device(op, "key_student", key_student, "query_student", query_student);
  check_same_device(op, "query_teacher", query_teacher, "query_student", query_student);
  check_same_device(op, "key_teacher", key_teacher, "query_student", query_student);
  check_same_size(op, "key_student", key_student, "query_student", query_student, 0, "batch size");
  check_same_size(op, "key_student", key_student, "query_student", query_student, 3, "head dimension");
  check_same_size(op, "query_teacher", query_teacher, "query_student", query_student, 0, "batch size");
  check_same_size(op, "query_teacher", query_teacher, "query_student", query_student, 1, "number of heads");
  check_same_size(op, "query_teacher", query_teacher, "query_student", query_student, 2, "sequence length");
  check_same_size(op, "key_teacher", key_teacher, "query_student", query_student, 0, "batch size");
  check_same_size(op, "key_teacher", key_teacher, "key_student", key_student, 2, "sequence length");
  check_same_size(op, "key_teacher", key_teacher, "query_teacher", query_teacher, 3, "head dimension");
  const c10::SymInt& heads = query_student.sym_size(1);
  for (const auto& [argument, key] : {std::pair{"key_student", &key_student}, std::pair{"key_teacher", &key_teacher}}) {
    const c10::SymInt& key_heads = key->sym_size(1);
    TORCH_CHECK(heads == key_heads || (key_heads > 0 && heads % key_heads == 0), op, ": ", argument,
                " must have a number of heads that divides the number of query heads (", heads, "), got ", key_heads);
  }
  check_mask(op, "query_padding_mask", options.query_padding_mask(), query_student);
  check_mask(op, "key_padding_mask", options.key_padding_mask(), key_student);
  check_boundaries(op, "cu_seqlens", options.cu_seqlens(), query_student);
  check_boundaries(op, "cu_seqlens_key", options.cu_seqlens_key(), key_student);
  TORCH_CHECK(options.cu_seqlens() || !options.cu_seqlens_key(), op,
              ": cu_seqlens_key must come with cu_seqlens, got cu_seqlens_key alone");
  check_beta(op, options.beta());
  AttentionArguments arguments{query_student,
                               key_student,
                               query_teacher,
                               key_teacher,
                               options.query_padding_mask(),
                               options.key_padding_mask(),
                               options.cu_seqlens(),
                               options.cu_seqlens_key(),
                               check_scale(op, "scale_student", options.scale_student(), query_student),
                               check_scale(op, "scale_teacher", options.scale_teacher(), query_teacher),
                               options.causal(),
                               options.divergence(),
                               options.beta(),
                               resolve_deterministic(options.deterministic())};
  const bool square = query_student.sym_size(2) == key_student.sym_size(2);
  if (!arguments.query_padding_mask && square) arguments.query_padding_mask = arguments.key_padding_mask;
  if (arguments.cu_seqlens && !arguments.cu_seqlens_key) {
    arguments.cu_seqlens_key = arguments.cu_seqlens;
    TORCH_CHECK(square, op, ": cu_seqlens alone needs as many keys as queries, got ", query_student.sym_size(2),
                " queries and ", key_student.sym_size(2), " keys; give cu_seqlens_key");
  }
  if (arguments.cu_seqlens) {
    TORCH_CHECK(arguments.cu_seqlens->sym_size(0) == arguments.cu_seqlens_key->sym_size(0), op,
                ": cu_seqlens_key must have as many boundaries as cu_seqlens (", arguments.cu_seqlens->sym_size(0),
                "), got ", arguments.cu_seqlens_key->sym_size(0));
  }
  return arguments;
}

void check_row_tensor(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& rows_of) {
  check_dense(op, argument, tensor);
  TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, op, ": ", argument,
              " must be float32 or float64, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.dim() == 3 && tensor.sym_size(0) == rows_of.sym_size(0) &&
                  tensor.sym_size(1) == rows_of.sym_size(1) && tensor.sym_size(2) == rows_of.sym_size(2),
              op, ": ", argument, " must have shape [B, H, N] = ", rows_of.sym_sizes().slice(0, 3), ", got ",
              tensor.sym_sizes());
  TORCH_CHECK(tensor.device() == rows_of.device(), op, ": ", argument, " must be on the device of the inputs (",
              rows_of.device(), "), got ", tensor.device());
}

void check_row_tensors(const char* op, const char* argument, at::TensorList tensors, at::TensorList rows_of) {
  TORCH_CHECK(tensors.size() == rows_of.size(), op, ": ", argument, " must hold as many tensors as students (",
              rows_of.size(), "), got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = place_of(argument, i);
    check_row_tensor(op, name.c_str(), tensors[i], rows_of[i]);
  }
}

void check_reduction(const char* op,
                     const at::Tensor& rows_of,
                     const std::optional<at::Tensor>& row_weight,
                     Reduction reduction,
                     const std::optional<at::Tensor>& num_items) {
  if (row_weight) {
    check_dense(op, "row_weight", *row_weight);
    TORCH_CHECK(at::isFloatingType(row_weight->scalar_type()), op, ": row_weight must be floating point, got ",
                row_weight->scalar_type());
    TORCH_CHECK(row_weight->dim() == 2 && row_weight->sym_size(0) == rows_of.sym_size(0) &&
                    row_weight->sym_size(1) == rows_of.sym_size(2),
                op, ": row_weight must have shape [B, N] = [", rows_of.sym_size(0), ", ", rows_of.sym_size(2),
                "], got ", row_weight->sym_sizes());
    TORCH_CHECK(row_weight->device() == rows_of.device(), op, ": row_weight must be on the device of the inputs (",
                rows_of.device(), "), got ", row_weight->device());
  }
  if (num_items) {
    check_dense(op, "num_items", *num_items);
    TORCH_CHECK(num_items->sym_numel() == 1, op, ": num_items must hold one number, got shape ",
                num_items->sym_sizes());
    TORCH_CHECK(reduction == Reduction::kMean, op, ": num_items is the divisor of reduction 'mean', got reduction '",
                to_string(reduction), "'");
  }
}

void check_frozen(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(
      !(at::GradMode::is_enabled() && tensor.requires_grad()), op, ": ", argument,
      " must not require grad (the teacher is frozen and gets no gradient), got a tensor that does; detach it: ",
      argument, ".detach()");
}

void check_frozen(const char* op, const char* argument, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = place_of(argument, i);
    check_frozen(op, name.c_str(), tensors[i]);
  }
}

void check_sequence_boundaries(const char* op, const char* argument, const at::Tensor& cu_seqlens, int64_t length) {
  const at::Tensor host = cu_seqlens.to(at::kCPU, at::kLong).contiguous();
  const int64_t* values = host.const_data_ptr<int64_t>();
  const int64_t count = host.numel();
  TORCH_CHECK(values[0] == 0, op, ": ", argument, " must start at 0, got ", values[0]);
  for (int64_t i = 1; i < count; ++i) {
    TORCH_CHECK(values[i] > values[i - 1], op, ": ", argument, " must be strictly increasing, got ", values[i - 1],
                " followed by ", values[i], " at index ", i);
  }
  TORCH_CHECK(values[count - 1] == length, op, ": ", argument, " must end at the sequence length N = ", length,
              ", got ", values[count - 1]);
}

}  // namespace linearard
