#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <launch.h>

#include "backends.h"
#include "cuda/problem.h"
#include "cuda/sets.h"
#include "cuda/tensors.h"
#include "cuda/triangular.h"
#include "kernel_scope.h"
#include "logit_form.h"

// Registered for CUDA tensors. A call runs in float first; blocks of rows that float cannot hold mark themselves on
// the device, and kernels in double, which find nothing to do otherwise, compute those again. So there is nothing for
// the host to wait for, and a call can be captured into a CUDA graph. Float64 inputs run in double at once; their
// sizes are looked at first, on the host.

namespace linearard::cuda {
namespace {

void set_outputs(ForwardParams& params, const RowTensors& to) {
  const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  params.kl = data(to.kl);
  params.lse_student = data(to.lse_student);
  params.lse_teacher = data(to.lse_teacher);
  params.wide_outputs = to.lse_teacher.scalar_type() == at::kDouble;
}

/// Runs the forward kernels: all in double for float64 inputs, otherwise in float and the marked blocks again in
/// double.
/// @param listed the rows that are left, where other kernels have written the others
void run_forward(ForwardParams params,
                 const RowTensors& to,
                 bool float64,
                 const at::Device& device,
                 const std::optional<ListedRows>& listed = std::nullopt) {
  constexpr const char* kAction = "forward";
  const cudaStream_t stream = current_stream(device);
  set_outputs(params, to);
  if (float64) {
    check_launch(forward_in_double(params, Blocks::kAll, stream), kAction, device);
    return;
  }
  at::Tensor marks;
  if (listed) {
    params.redo = listed->redo;
    params.row_counts = listed->counts;
    params.row_lists = listed->lists;
  } else {
    marks = clear_marks(int64_t{params.batch} * params.heads, params.visibility.rows, device);
    params.redo = marks.mutable_data_ptr<int>();
  }
  check_launch(forward(params, stream), kAction, device);
  check_launch(forward_in_double(params, Blocks::kMarked, stream), kAction, device);
}

at::Device device_of(const RelationArguments& arguments) { return arguments.student.device(); }
at::Device device_of(const AttentionArguments& arguments) { return arguments.query_student.device(); }

/// A forward call on its way, and where its kernels write.
struct ForwardCall {
  Problem problem;
  RowTensors to;
  LogitForm form;
  bool float64;
  bool exchanged;

  template <typename Arguments>
  ForwardCall(const Arguments& arguments, Problem of) : problem(std::move(of)) {
    const at::ScalarType dtype = statistics_dtype(arguments);
    to = {row_tensor(problem, dtype), row_tensor(problem, dtype), row_tensor(problem, dtype)};
    float64 = dtype == at::kDouble;
    exchanged = problem.divergence == linearard::Divergence::kReverseKL;
    if (problem.empty()) return;
    if (float64) form = choose_logit_form(arguments, nullptr);
    if (!exchanged) return;
    exchange_roles(problem);
    std::swap(form.scale_student, form.scale_teacher);
    std::swap(form.student_multiplier, form.teacher_multiplier);
  }

  /// @param listed what triangular_forward says of the problem
  ThreeTensors finish(const std::optional<ListedRows>& listed) {
    if (problem.empty()) return {to.kl.zero_(), to.lse_student.zero_(), to.lse_teacher.zero_()};
    const at::Tensor ratios = measured_ratios(problem);
    const ForwardParams params = forward_params(problem, float64 ? &form : nullptr, ratios);
    run_forward(params, to, float64, problem.device(), problem.relation ? listed : sets_forward(problem, params, to));
    if (exchanged) std::swap(to.lse_student, to.lse_teacher);
    return {to.kl, to.lse_student, to.lse_teacher};
  }
};

template <typename Arguments>
ThreeTensors forward_of(const Arguments& arguments) {
  const KernelScope scope;
  const c10::DeviceGuard guard(device_of(arguments));
  ForwardCall call(arguments, problem_of(arguments));
  return call.finish(triangular_forward({{&call.problem, call.to}})[0]);
}

/// A backward call: the problem, what its kernels read, and the statistics in double for marked blocks.
class BackwardCall {
 public:
  BackwardCall(Problem problem,
               LogitForm form,
               double scale_student,
               const at::Tensor& grad_kl,
               const at::Tensor& lse_student,
               const at::Tensor& lse_teacher)
      : problem_(std::move(problem)),
        form_(form),
        float64_(problem_.float64()),
        dtype_(float64_ ? at::kDouble : at::kFloat),
        output_scale_(float64_ ? form.gradient_scale(scale_student) / form.gradient_multiplier : scale_student),
        grad_kl_(grad_kl.to(dtype_)),
        lse_student_(contiguous_as(lse_student, dtype_)),
        lse_teacher_(contiguous_as(lse_teacher, dtype_)),
        ratios_(measured_ratios(problem_)) {
    if (problem_.divergence != linearard::Divergence::kForwardKL) {
      center_ = row_tensor(problem_, dtype_);
      const RowTensors to{center_, row_tensor(problem_, dtype_), row_tensor(problem_, dtype_)};
      run_forward(center_params(), to, float64_, problem_.device());
    }
    // The gradient of a mean is one number; only kernels that read a number of each row need more.
    const bool one_grad = is_expanded_scalar(grad_kl_);
    if (!problem_.relation || !one_grad) grad_kl_ = grad_kl_.contiguous();
    if (problem_.student_rows.scalar_type() == at::kHalf) {
      largest_grad_ = (one_grad ? grad_kl_ : largest_of_real_rows()).to(at::kFloat);
    }
  }

  /// A gradient on its way: what its kernels are given, write and mark.
  struct Pending {
    BackwardParams params;
    at::Tensor gradient;
    at::Tensor memory;  ///< marks, and the upstream gradient of each row where the triangular kernels write it out
    float* row_grads;   ///< null: not wanted
    int64_t mark_ints;
  };

  /// Gradient of the rows; of a self-relation: of the tokens as rows and as keys.
  at::Tensor rows() const {
    const Pending pending = begin_rows();
    auto left = triangular_backward({triangular(pending)});
    return finish(pending, std::move(left[0]));
  }

  Pending begin_rows() const {
    BackwardParams params = parameters();
    const int64_t heads = problem_.heads();
    params.owner_student = vectors_of(problem_.student_rows, heads);
    params.owner_teacher = vectors_of(problem_.teacher_rows, heads);
    params.other_student = vectors_of(problem_.student_keys, heads);
    params.other_teacher = vectors_of(problem_.teacher_keys, heads);
    params.heads = narrow(heads);
    params.other_heads = 1;
    params.row_term = true;
    params.column_term = problem_.relation;
    return begin(params, problem_.student_rows);
  }

  /// The same for the triangular kernels.
  TriangularGradient triangular(const Pending& pending) const {
    return {&problem_,     grad_kl_,         pending.row_grads,
            lse_student_,  lse_teacher_,     pending.params.largest_grad,
            output_scale_, pending.gradient, pending.params.redo};
  }

  /// Gradients of the pair form: of the rows, and of the keys, summed over the rows' heads that share them.
  TwoTensors rows_and_keys() const {
    Pending of_rows = begin_rows();
    Pending of_keys = begin_keys();
    of_rows.params.grad_kl = of_keys.params.grad_kl = grad_kl_.const_data_ptr();
    const bool at_once = takes_both_sets(problem_, of_rows.params, of_keys.params);
    if (at_once) {
      clear_marks(of_rows);
      clear_marks(of_keys);
      both_sets_backward(problem_, of_rows.params, of_keys.params);
    }
    // Of other kernels only, whose rows leave them for the keys.
    at::Tensor dominant_keys;
    at::Tensor dominant_gradients;
    if (problem_.divergence == linearard::Divergence::kForwardKL) {
      const at::Tensor like = row_tensor(problem_, at::kInt);
      dominant_keys = at::full(like.sizes(), -1, like.options());
      dominant_gradients = row_tensor(problem_, at::kDouble);
      for (Pending* pending : {&of_rows, &of_keys}) {
        pending->params.dominant_keys = dominant_keys.mutable_data_ptr<int>();
        pending->params.dominant_gradients = dominant_gradients.mutable_data_ptr<double>();
      }
    }
    at::Tensor rows = at_once ? finish_in_double(of_rows, of_rows.params) : finish(of_rows, std::nullopt);
    at::Tensor keys = at_once ? finish_in_double(of_keys, of_keys.params) : finish(of_keys, std::nullopt);
    return {std::move(rows), std::move(keys)};
  }

  Pending begin_keys() const {
    BackwardParams params = parameters();
    const int64_t heads = problem_.heads();
    params.owner_student = vectors_of(problem_.student_keys, heads);
    params.owner_teacher = vectors_of(problem_.teacher_keys, heads);
    params.other_student = vectors_of(problem_.student_rows, heads);
    params.other_teacher = vectors_of(problem_.teacher_rows, heads);
    params.heads = narrow(problem_.student_keys.size(1));
    params.other_heads = params.owner_student.group;
    params.column_term = true;
    return begin(params, problem_.student_keys);
  }

  /// @param left what triangular_backward says of the problem; its memory is given up before the steps in double
  at::Tensor finish(const Pending& pending, std::optional<LeftHeads> left) const {
    constexpr const char* kAction = "backward";
    const at::Device device = problem_.device();
    const cudaStream_t stream = current_stream(device);
    BackwardParams params = pending.params;
    const at::Tensor& gradient = pending.gradient;
    const bool expanded = left && pending.row_grads != nullptr;
    const at::Tensor grad_kl = expanded ? grad_kl_ : grad_kl_.contiguous();
    params.grad_kl = expanded ? pending.row_grads : grad_kl.const_data_ptr();
    if (float64_) {
      check_launch(backward_in_double(params, Blocks::kAll, stream), kAction, device);
      return gradient;
    }
    if (!left) clear_marks(pending);
    params.only_heads = left ? left->heads : nullptr;
    if (!sets_backward(problem_, params)) check_launch(backward(params, stream), kAction, device);
    left.reset();
    return finish_in_double(pending, params);
  }

 private:
  static void clear_marks(const Pending& pending) { pending.memory.narrow(0, 0, pending.mark_ints).zero_(); }

  /// Float statistics cannot hold what made the marks: all again in double.
  at::Tensor finish_in_double(const Pending& pending, BackwardParams params) const {
    constexpr const char* kAction = "backward";
    const at::Device device = problem_.device();
    const cudaStream_t stream = current_stream(device);
    const auto wide = [&] { return row_tensor(problem_, at::kDouble); };
    const RowTensors statistics{center_.defined() ? wide() : at::Tensor(), wide(), wide()};
    ForwardParams again = center_params();
    set_outputs(again, statistics);
    again.redo = params.redo;
    check_launch(forward_in_double(again, Blocks::kAllIfAnyIsMarked, stream), kAction, device);
    params.lse_student = statistics.lse_student.const_data_ptr();
    params.lse_teacher = statistics.lse_teacher.const_data_ptr();
    params.center = statistics.kl.defined() ? statistics.kl.const_data_ptr() : nullptr;
    params.wide_statistics = true;
    check_launch(backward_in_double(params, Blocks::kMarked, stream), kAction, device);
    return pending.gradient;
  }

  Problem problem_;
  LogitForm form_;
  bool float64_;
  at::ScalarType dtype_;
  double output_scale_;
  at::Tensor grad_kl_;
  at::Tensor lse_student_;
  at::Tensor lse_teacher_;
  at::Tensor ratios_;
  at::Tensor center_;
  at::Tensor largest_grad_;

  /// The largest |grad_kl| that is finite: one that is not, or stands at padding, must not decide about the other rows.
  at::Tensor largest_of_real_rows() const {
    at::Tensor counted = grad_kl_.isfinite();
    if (const at::Tensor& real = problem_.memory.row_mask; real.defined()) counted.logical_and_(real.unsqueeze(1));
    return at::linalg_vector_norm(at::where(counted, grad_kl_, 0), INFINITY);
  }

  ForwardParams center_params() const {
    ForwardParams params = forward_params(problem_, float64_ ? &form_ : nullptr, ratios_);
    params.center = problem_.divergence != linearard::Divergence::kForwardKL;
    return params;
  }

  BackwardParams parameters() const {
    BackwardParams params{};
    params.batch = narrow(problem_.batch());
    params.visibility = problem_.memory.visibility;
    params.scale_student = float64_ ? form_.scale_student : problem_.scale_student;
    params.scale_teacher = float64_ ? form_.scale_teacher : problem_.scale_teacher;
    params.student_multiplier = float64_ ? form_.student_multiplier : 1;
    params.teacher_multiplier = float64_ ? form_.teacher_multiplier : 1;
    params.difference_ratio = difference_ratio(problem_);
    params.difference_ratios = ratios_.defined() ? ratios_.const_data_ptr<double>() : nullptr;
    params.gradient_multiplier = float64_ ? form_.gradient_multiplier : 1;
    params.output_scale = output_scale_;
    params.divergence = kernel_divergence(problem_.divergence);
    params.beta = problem_.beta;
    params.lse_student = lse_student_.const_data_ptr();
    params.lse_teacher = lse_teacher_.const_data_ptr();
    params.center = center_.defined() ? center_.const_data_ptr() : nullptr;
    params.wide_grad = params.wide_statistics = float64_;
    params.largest_grad = largest_grad_.defined() ? largest_grad_.const_data_ptr<float>() : nullptr;
    return params;
  }

  Pending begin(BackwardParams params, const at::Tensor& owners) const {
    Pending pending{params, at::empty(owners.sizes(), owners.options()), {}, nullptr, 0};
    pending.params.gradient = pending.gradient.mutable_data_ptr();
    if (float64_) return pending;
    pending.mark_ints = mark_count(owners.size(0) * owners.size(1), owners.size(2));
    const bool expand = problem_.relation && !grad_kl_.is_contiguous();
    const int64_t row_floats = expand ? grad_kl_.numel() : 0;
    pending.memory = at::empty({pending.mark_ints + row_floats}, owners.options().dtype(at::kInt));
    pending.params.redo = pending.memory.mutable_data_ptr<int>();
    if (expand) pending.row_grads = reinterpret_cast<float*>(pending.params.redo + pending.mark_ints);
    return pending;
  }
};

template <typename Arguments>
BackwardCall backward_call(const at::Tensor& grad_kl,
                           const at::Tensor& lse_student,
                           const at::Tensor& lse_teacher,
                           const Arguments& arguments,
                           Problem problem) {
  LogitForm form;
  if (problem.float64()) form = choose_logit_form(arguments, &grad_kl);
  return {std::move(problem), form, arguments.scale_student, grad_kl, lse_student, lse_teacher};
}

struct CudaBackend {
  static constexpr bool kHasValues = true;

  static ThreeTensors relation_forward(const RelationArguments& arguments) { return forward_of(arguments); }
  static ThreeTensors attention_forward(const AttentionArguments& arguments) { return forward_of(arguments); }

  static at::Tensor relation_backward(const at::Tensor& grad_kl,
                                      const at::Tensor& lse_student,
                                      const at::Tensor& lse_teacher,
                                      const RelationArguments& arguments) {
    const KernelScope scope;
    const c10::DeviceGuard guard(device_of(arguments));
    Problem problem = problem_of(arguments);
    if (problem.empty()) return at::zeros(arguments.student.sizes(), arguments.student.options());
    return backward_call(grad_kl, lse_student, lse_teacher, arguments, std::move(problem)).rows();
  }

  /// All relations of one call see the same, and those that the same triangular kernels take share their launches.
  static ThreeTensorVectors layer_forward(const std::vector<RelationArguments>& relations) {
    const KernelScope scope;
    const c10::DeviceGuard guard(device_of(relations[0]));
    std::optional<VisibilityMemory> visibility;
    std::vector<ForwardCall> calls;
    calls.reserve(relations.size());
    std::vector<TriangularRows> rows;
    for (const RelationArguments& arguments : relations) {
      const ForwardCall& call = calls.emplace_back(arguments, problem_of(arguments, &visibility));
      rows.push_back({&call.problem, call.to});
    }
    const std::vector<std::optional<ListedRows>> listed = triangular_forward(rows);
    ThreeTensorVectors results;
    for (size_t i = 0; i < calls.size(); ++i) {
      auto [kl, lse_student, lse_teacher] = calls[i].finish(listed[i]);
      std::get<0>(results).push_back(std::move(kl));
      std::get<1>(results).push_back(std::move(lse_student));
      std::get<2>(results).push_back(std::move(lse_teacher));
    }
    return results;
  }

  static TensorVector layer_backward(at::TensorList grad_kl,
                                     at::TensorList lse_student,
                                     at::TensorList lse_teacher,
                                     const std::vector<RelationArguments>& relations) {
    const KernelScope scope;
    const c10::DeviceGuard guard(device_of(relations[0]));
    std::optional<VisibilityMemory> visibility;
    std::vector<std::optional<BackwardCall>> calls(relations.size());
    std::vector<BackwardCall::Pending> pending(relations.size());
    std::vector<TriangularGradient> gradients;
    std::vector<size_t> places;
    TensorVector results(relations.size());
    for (size_t i = 0; i < relations.size(); ++i) {
      const RelationArguments& arguments = relations[i];
      Problem problem = problem_of(arguments, &visibility);
      if (problem.empty()) {
        results[i] = at::zeros(arguments.student.sizes(), arguments.student.options());
        continue;
      }
      calls[i].emplace(backward_call(grad_kl[i], lse_student[i], lse_teacher[i], arguments, std::move(problem)));
      pending[i] = calls[i]->begin_rows();
      gradients.push_back(calls[i]->triangular(pending[i]));
      places.push_back(i);
    }
    std::vector<std::optional<LeftHeads>> left = triangular_backward(gradients);
    for (size_t i = 0; i < places.size(); ++i)
      results[places[i]] = calls[places[i]]->finish(pending[places[i]], std::move(left[i]));
    return results;
  }

  static TwoTensors attention_backward(const at::Tensor& grad_kl,
                                       const at::Tensor& lse_student,
                                       const at::Tensor& lse_teacher,
                                       const AttentionArguments& arguments) {
    const KernelScope scope;
    const c10::DeviceGuard guard(device_of(arguments));
    Problem problem = problem_of(arguments);
    if (problem.empty()) {
      const auto zeros = [](const at::Tensor& like) { return at::zeros(like.sizes(), like.options()); };
      return {zeros(arguments.query_student), zeros(arguments.key_student)};
    }
    return backward_call(grad_kl, lse_student, lse_teacher, arguments, std::move(problem)).rows_and_keys();
  }

  static at::Tensor relation_lse(const RelationArguments& arguments) {
    const KernelScope scope;
    const c10::DeviceGuard guard(device_of(arguments));
    const Problem problem = problem_of(arguments);
    const at::ScalarType dtype = statistics_dtype(arguments);
    RowTensors to{{}, {}, row_tensor(problem, dtype)};
    if (problem.empty()) return to.lse_teacher.zero_();
    const bool float64 = dtype == at::kDouble;
    LogitForm form;
    if (float64) form = choose_logit_form(arguments, nullptr);
    ForwardParams params = forward_params(problem, float64 ? &form : nullptr, {});
    params.teacher_only = true;
    params.divergence = Divergence::kForwardKL;
    run_forward(params, to, float64, problem.device());
    return to.lse_teacher;
  }
};

}  // namespace

}  // namespace linearard::cuda

TORCH_LIBRARY_IMPL(linearard, CUDA, m) { linearard::Kernels<linearard::cuda::CudaBackend>::register_in(m); }
