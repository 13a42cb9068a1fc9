#include "cuda/triangular.h"

#include <cstdlib>
#include <string_view>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <sm90/launch.h>
#include <triangular/launch.h>

namespace linearard::cuda {
namespace {

/// The allocator rounds every block up to 512 bytes.
constexpr int64_t kRounding = 512;

enum class Kernels { kNone, kPortable, kAll };

/// LINEARARD_TRIANGULAR, read once, is for comparisons of kernels: "0" turns these off, "portable" leaves those that do
/// not need Hopper.
Kernels enabled_kernels() {
  static const Kernels enabled = [] {
    const char* value = std::getenv("LINEARARD_TRIANGULAR");
    if (value == nullptr) return Kernels::kAll;
    if (std::string_view(value) == "0") return Kernels::kNone;
    return std::string_view(value) == "portable" ? Kernels::kPortable : Kernels::kAll;
  }();
  return enabled;
}

template <typename Params>
bool runs_on_hopper(const Params& params) {
  return enabled_kernels() == Kernels::kAll && sm90_takes(params);
}

bool is_eligible(const Problem& p) {
  return enabled_kernels() != Kernels::kNone && p.relation && !p.packed && !p.float64() &&
         p.divergence == linearard::Divergence::kForwardKL && p.scale_student > 0 && p.scale_teacher > 0;
}

LogitFactors factors_of(const Problem& p) {
  constexpr double kUnit = 1.4426950408889634;  // log2(e)
  return {static_cast<float>(p.scale_teacher * kUnit), static_cast<float>(p.scale_student * kUnit),
          static_cast<float>((p.scale_student - p.scale_teacher) / p.scale_student)};
}

/// What both directions have in common.
template <typename Params>
Params params_of(const Problem& p) {
  Params params{};
  params.student = vectors_of(p.student_rows, p.heads());
  params.teacher = vectors_of(p.teacher_rows, p.heads());
  params.batch = narrow(p.batch());
  params.heads = narrow(p.heads());
  params.tokens = narrow(p.rows());
  params.causal = p.memory.visibility.causal;
  params.traversal = p.deterministic ? Traversal::kRows : Traversal::kTriangular;
  params.mask = p.memory.visibility.row_mask;
  params.factors = factors_of(p);
  return params;
}

/// One block of memory, given away part by part.
class Arena {
 public:
  explicit Arena(at::Tensor memory) : memory_(std::move(memory)), next_(memory_.mutable_data_ptr<float>()) {}

  template <typename T>
  T* take(int64_t count) {
    static_assert(sizeof(T) % sizeof(float) == 0 && alignof(T) <= 16);
    T* begin = reinterpret_cast<T*>(next_);
    next_ += count * static_cast<int64_t>(sizeof(T) / sizeof(float));
    return begin;
  }

  const at::Tensor& memory() const { return memory_; }

 private:
  at::Tensor memory_;
  float* next_;
};

at::TensorOptions floats(const at::Device& device) { return at::TensorOptions().device(device).dtype(at::kFloat); }

template <typename T>
constexpr int64_t kFloats = static_cast<int64_t>(sizeof(T) / sizeof(float));

/// Floats that the kernels of a call work on, beside marks.
int64_t forward_floats(int64_t problems, int64_t tokens) {
  return problems * ((kFloats<ForwardToken> + kFloats<OwnLogit> + kSums + 1) * tokens + 3) +
         mark_count(problems, tokens);
}
int64_t backward_floats(int64_t problems, int64_t tokens, int64_t dim) {
  return problems * ((dim + kFloats<BackwardToken>)*tokens + 1);
}

/// Whether the kernels write the gradient itself, and no sums in float.
bool writes_result(const TriangularBackwardParams& params) {
  return params.traversal == Traversal::kRows && runs_on_hopper(params);
}

/// Of the kernels that take the problem, if any. Where the gradients of a tile's rows and columns do not fit into
/// registers together, Hopper visits it row by row.
std::optional<TriangularBackwardParams> backward_params_of(const Problem& problem) {
  auto params = params_of<TriangularBackwardParams>(problem);
  if (triangular::takes(params)) return params;
  params.traversal = Traversal::kRows;
  if (runs_on_hopper(params)) return params;
  return std::nullopt;
}

}  // namespace

bool hopper_is_enabled() { return enabled_kernels() == Kernels::kAll; }

bool is_expanded_scalar(const at::Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) != 0) return false;
  return tensor.numel() > 0;
}

std::optional<ListedRows> triangular_forward(const Problem& problem, const RowTensors& to) {
  if (!is_eligible(problem)) return std::nullopt;
  auto params = params_of<TriangularForwardParams>(problem);
  if (!triangular::takes(params)) return std::nullopt;

  const at::Device device = problem.device();
  const int64_t tokens = problem.rows();
  const int64_t problems = problem.batch() * problem.heads();
  const int64_t marks = mark_count(problems, tokens);
  Arena arena(at::empty({forward_floats(problems, tokens) + marks}, floats(device)));
  auto* token_values = arena.take<ForwardToken>(problems * tokens);
  auto* own = arena.take<OwnLogit>(problems * tokens);
  auto* sums = arena.take<float>(problems * kSums * tokens);
  auto* lists = arena.take<int>(problems * tokens);
  auto* counts = arena.take<int>(problems);
  auto* centers = arena.take<float>(problems);
  auto* wide_heads = arena.take<int>(problems);
  auto* largest = arena.take<int>(marks);
  auto* redo = arena.take<int>(marks);

  constexpr const char* kAction = "forward";
  const cudaStream_t stream = current_stream(device);
  check_launch(triangular::prepare_forward({params.student, params.teacher, params.batch, params.heads, params.tokens,
                                            params.mask, problem.scale_student, problem.scale_teacher, largest,
                                            token_values, own, centers, wide_heads, sums, counts, redo},
                                           stream),
               kAction, device);
  params.token_values = token_values;
  params.centers = centers;
  params.wide_heads = wide_heads;
  params.sums = sums;
  params.own = own;
  check_launch(
      runs_on_hopper(params) ? launch_triangular_forward_sm90(params, stream) : triangular::forward(params, stream),
      kAction, device);
  check_launch(triangular::finish_forward(
                   {params.batch, params.heads, problem.memory.visibility, params.factors, token_values, own, centers,
                    wide_heads, sums, to.kl.mutable_data_ptr<float>(), to.lse_student.mutable_data_ptr<float>(),
                    to.lse_teacher.mutable_data_ptr<float>(), counts, lists, problem.deterministic},
                   stream),
               kAction, device);
  return ListedRows{arena.memory(), counts, lists, redo};
}

std::optional<LeftHeads> triangular_backward(const Problem& problem, const TriangularGradient& to) {
  if (!is_eligible(problem)) return std::nullopt;
  const auto taken = backward_params_of(problem);
  if (!taken) return std::nullopt;
  TriangularBackwardParams params = *taken;

  const at::Device device = problem.device();
  const int64_t tokens = problem.rows();
  const int64_t problems = problem.batch() * problem.heads();
  const int64_t dim = writes_result(params) ? 0 : params.student.dim;  // of sums
  Arena arena(at::empty({backward_floats(problems, tokens, dim)}, floats(device)));
  const int64_t elements = problems * tokens * dim;
  auto* sums = arena.take<float>(elements);
  auto* token_values = arena.take<BackwardToken>(problems * tokens);
  auto* wide_heads = arena.take<int>(problems);

  constexpr const char* kAction = "backward";
  const cudaStream_t stream = current_stream(device);
  check_launch(
      triangular::prepare_backward({params.batch, params.heads, problem.memory.visibility,
                                    to.grad_kl.const_data_ptr<float>(), is_expanded_scalar(to.grad_kl),
                                    to.lse_student.const_data_ptr<float>(), to.lse_teacher.const_data_ptr<float>(),
                                    to.largest_grad, token_values, wide_heads, to.row_grads, sums, elements, to.redo},
                                   stream),
      kAction, device);
  params.token_values = token_values;
  params.wide_heads = wide_heads;
  params.gradient = sums;
  params.result = to.gradient.mutable_data_ptr();
  params.output_scale = to.output_scale;
  params.largest_grad = to.largest_grad;
  params.redo = to.redo;
  check_launch(
      runs_on_hopper(params) ? launch_triangular_backward_sm90(params, stream) : triangular::backward(params, stream),
      kAction, device);
  if (!writes_result(params)) {
    check_launch(triangular::finish_backward({params.student.type, params.batch, params.heads, params.tokens,
                                              params.student.dim, to.output_scale, to.largest_grad, wide_heads,
                                              params.gradient, to.gradient.mutable_data_ptr(), to.redo},
                                             stream),
                 kAction, device);
  }
  return LeftHeads{arena.memory(), wide_heads};
}

TriangularWorkspace triangular_workspace(const Problem& problem) {
  if (!is_eligible(problem)) return {0, 0, false};
  const int64_t tokens = problem.rows();
  const int64_t problems = problem.batch() * problem.heads();
  TriangularWorkspace bytes{0, 0, false};
  const auto forward = params_of<TriangularForwardParams>(problem);
  if (triangular::takes(forward)) {
    bytes.on_hopper = runs_on_hopper(forward);
    bytes.forward = forward_floats(problems, tokens) * 4 + kRounding;
  }
  if (const auto backward = backward_params_of(problem)) {
    const int64_t dim = writes_result(*backward) ? 0 : problem.student_rows.size(3);
    bytes.backward = (backward_floats(problems, tokens, dim) + problems * tokens) * 4 + kRounding;
  }
  return bytes;
}

}  // namespace linearard::cuda
