#include "cuda/triangular.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <vector>

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
  return enabled_kernels() != Kernels::kNone && p.relation && !p.empty() && !p.packed && !p.float64() &&
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

/// Of the kernels that take the problem, if any.
std::optional<TriangularForwardParams> forward_params_of(const Problem& problem) {
  auto params = params_of<TriangularForwardParams>(problem);
  if (triangular::takes(params)) return params;
  return std::nullopt;
}

/// Likewise. Where the gradients of a tile's rows and columns do not fit into registers together, or into whole lines
/// of the copy engine, Hopper goes row by row.
std::optional<TriangularBackwardParams> backward_params_of(const Problem& problem) {
  const auto params = params_of<TriangularBackwardParams>(problem);
  const bool taken = triangular::takes(params);
  if (taken && runs_on_hopper(params)) return params;
  auto by_rows = params;
  by_rows.traversal = Traversal::kRows;
  if (runs_on_hopper(by_rows)) return by_rows;
  if (taken) return params;
  return std::nullopt;
}

/// Whether the kernels write the gradient itself, and no sums in float.
bool writes_result(const TriangularBackwardParams& params) {
  return params.traversal == Traversal::kRows && runs_on_hopper(params);
}

/// Whether the kernels of a call serve one relation only: those of Hopper that go row by row.
bool stands_alone(const TriangularForwardParams& p) { return p.traversal == Traversal::kRows && runs_on_hopper(p); }
bool stands_alone(const TriangularBackwardParams& p) { return writes_result(p); }

/// Whether one launch serves both.
template <typename Params>
bool can_share(const Params& a, const Params& b) {
  return a.student.type == b.student.type && a.student.dim == b.student.dim && a.batch == b.batch &&
         a.tokens == b.tokens && a.causal == b.causal && a.traversal == b.traversal && a.mask == b.mask &&
         a.factors.student == b.factors.student && a.factors.teacher == b.factors.teacher &&
         runs_on_hopper(a) == runs_on_hopper(b);
}

/// Relations of a call that one set of launches serves.
template <typename Params>
struct Group {
  Params params;
  std::vector<size_t> places;  ///< in the call

  int64_t tokens() const { return params.tokens; }
  int64_t problems() const { return params.group.problems; }
  int64_t heads(size_t r) const { return int64_t{params.batch} * params.group.heads[r]; }  ///< of all batch entries
};

/// @param relations with a member `problem`; those that the kernels do not take are in no group
/// @param params_of_taken forward_params_of or backward_params_of
template <typename Params, typename Relation>
std::vector<Group<Params>> groups_of(const std::vector<Relation>& relations,
                                     std::optional<Params> (*params_of_taken)(const Problem&)) {
  std::vector<Group<Params>> groups;
  for (size_t i = 0; i < relations.size(); ++i) {
    const Problem& problem = *relations[i].problem;
    if (!is_eligible(problem)) continue;
    const std::optional<Params> taken = params_of_taken(problem);
    if (!taken) continue;
    const Params& params = *taken;
    const auto has_room = [&](const Group<Params>& group) {
      return group.places.size() < kLargestGroup && can_share(group.params, params);
    };
    auto group = stands_alone(params) ? groups.end() : std::find_if(groups.begin(), groups.end(), has_room);
    if (group == groups.end()) group = groups.insert(groups.end(), {params, {}});
    group->params.vectors.student[group->places.size()] = params.student;
    group->params.vectors.teacher[group->places.size()] = params.teacher;
    group->places.push_back(i);
  }
  for (Group<Params>& group : groups) {
    std::vector<int> heads;
    int64_t problems = 0;
    for (const size_t place : group.places) {
      heads.push_back(narrow(relations[place].problem->heads()));
      problems += int64_t{group.params.batch} * heads.back();
    }
    narrow(problems);
    group.params.group = RelationGroup::of(group.params.batch, heads.data(), static_cast<int>(heads.size()));
  }
  return groups;
}

/// One block of memory, given away part by part: those of the strictest alignment first.
class Arena {
 public:
  explicit Arena(at::Tensor memory) : memory_(std::move(memory)), next_(memory_.mutable_data_ptr<float>()) {}

  template <typename T>
  T* take(int64_t count) {
    static_assert(sizeof(T) % sizeof(float) == 0 && alignof(T) <= 16);
    TORCH_INTERNAL_ASSERT(reinterpret_cast<uintptr_t>(next_) % alignof(T) == 0);
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
  return problems * ((kFloats<ForwardToken> + kFloats<OwnLogit> + kSums + 1) * tokens + 4) +
         mark_count(problems, tokens);
}
int64_t backward_floats(int64_t problems, int64_t tokens, int64_t dim) {
  return problems * ((dim + kFloats<BackwardToken>)*tokens + 2);
}

}  // namespace

bool hopper_is_enabled() { return enabled_kernels() == Kernels::kAll; }

bool is_expanded_scalar(const at::Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) != 0) return false;
  return tensor.numel() > 0;
}

namespace {

void run_group(const Group<TriangularForwardParams>& group,
               const std::vector<TriangularRows>& relations,
               std::vector<std::optional<ListedRows>>& results) {
  const Problem& first = *relations[group.places[0]].problem;
  const at::Device device = first.device();
  const int64_t tokens = group.tokens();
  const int64_t problems = group.problems();
  const size_t count = group.places.size();
  int64_t marks = 0;
  for (size_t r = 0; r < count; ++r)
    marks += mark_count(group.heads(r), tokens);
  Arena arena(at::empty({forward_floats(problems, tokens) + marks}, floats(device)));
  TriangularForwardParams params = group.params;
  PrepareForwardParams prepare{};
  FinishForwardParams finish{};
  prepare.group = finish.group = params.group;
  prepare.vectors = params.vectors;
  prepare.tokens = params.tokens;
  prepare.mask = params.mask;
  prepare.scale_student = first.scale_student;
  prepare.scale_teacher = first.scale_teacher;
  finish.visibility = first.memory.visibility;
  finish.factors = params.factors;
  finish.ordered = first.deterministic;
  params.own = prepare.own = arena.take<OwnLogit>(problems * tokens);
  finish.own = params.own;
  if (runs_on_hopper(params) && !stands_alone(params)) {
    params.references = finish.references = prepare.references = arena.take<float>(problems * tokens);
    finish.plain_heads = params.plain_heads = arena.take<int>(problems);
  } else {
    params.token_values = finish.token_values = prepare.token_values = arena.take<ForwardToken>(problems * tokens);
  }
  params.sums = prepare.sums = arena.take<float>(problems * kSums * tokens);
  finish.sums = params.sums;
  finish.row_lists = arena.take<int>(problems * tokens);
  finish.row_counts = prepare.row_counts = arena.take<int>(problems);
  finish.centers = params.centers = prepare.centers = arena.take<float>(problems);
  finish.wide_heads = params.wide_heads = prepare.wide_heads = arena.take<int>(problems);
  params.largest = prepare.largest = arena.take<int>(mark_count(problems, tokens));
  for (size_t r = 0; r < count; ++r) {
    const RowTensors& to = relations[group.places[r]].to;
    prepare.redo[r] = arena.take<int>(mark_count(group.heads(r), tokens));
    finish.rows[r] = {to.kl.mutable_data_ptr<float>(), to.lse_student.mutable_data_ptr<float>(),
                      to.lse_teacher.mutable_data_ptr<float>()};
  }

  constexpr const char* kAction = "forward";
  const cudaStream_t stream = current_stream(device);
  check_launch(triangular::prepare_forward(prepare, stream), kAction, device);
  check_launch(
      runs_on_hopper(params) ? launch_triangular_forward_sm90(params, stream) : triangular::forward(params, stream),
      kAction, device);
  check_launch(triangular::finish_forward(finish, stream), kAction, device);
  for (size_t r = 0; r < count; ++r) {
    const int64_t before = params.group.first[r];
    results[group.places[r]] =
        ListedRows{arena.memory(), finish.row_counts + before, finish.row_lists + before * tokens, prepare.redo[r]};
  }
}

void run_group(const Group<TriangularBackwardParams>& group,
               const std::vector<TriangularGradient>& relations,
               std::vector<std::optional<LeftHeads>>& results) {
  const TriangularGradient& first = relations[group.places[0]];
  const at::Device device = first.problem->device();
  const int64_t tokens = group.tokens();
  const int64_t problems = group.problems();
  TriangularBackwardParams params = group.params;
  const int64_t dim = writes_result(params) ? 0 : params.student.dim;  // of sums
  const int64_t elements = problems * tokens * dim;
  Arena arena(at::empty({backward_floats(problems, tokens, dim)}, floats(device)));
  PrepareBackwardParams prepare{};
  FinishBackwardParams finish{};
  prepare.group = finish.group = params.group;
  prepare.visibility = first.problem->memory.visibility;
  finish.type = params.student.type;
  finish.tokens = params.tokens;
  finish.dim = params.student.dim;
  finish.output_scale = first.output_scale;
  params.gradient = prepare.gradient = arena.take<float>(elements);
  finish.sums = params.gradient;
  params.token_values = prepare.token_values = arena.take<BackwardToken>(problems * tokens);
  params.wide_heads = finish.wide_heads = prepare.wide_heads = arena.take<int>(problems);
  if (runs_on_hopper(params) && !stands_alone(params)) {
    params.plain_heads = prepare.plain_heads = arena.take<int>(problems);
  }
  prepare.gradient_floats = elements;
  params.result = first.gradient.mutable_data_ptr();
  params.output_scale = first.output_scale;
  params.largest_grad = first.largest_grad;
  params.redo = first.redo;
  for (size_t r = 0; r < group.places.size(); ++r) {
    const TriangularGradient& to = relations[group.places[r]];
    prepare.rows[r] = {to.grad_kl.const_data_ptr<float>(),
                       is_expanded_scalar(to.grad_kl),
                       to.lse_student.const_data_ptr<float>(),
                       to.lse_teacher.const_data_ptr<float>(),
                       to.largest_grad,
                       to.row_grads,
                       to.redo};
    finish.relations[r] = {to.gradient.mutable_data_ptr(), to.largest_grad, to.redo};
  }

  constexpr const char* kAction = "backward";
  const cudaStream_t stream = current_stream(device);
  check_launch(triangular::prepare_backward(prepare, stream), kAction, device);
  check_launch(
      runs_on_hopper(params) ? launch_triangular_backward_sm90(params, stream) : triangular::backward(params, stream),
      kAction, device);
  if (!writes_result(params)) check_launch(triangular::finish_backward(finish, stream), kAction, device);
  for (size_t r = 0; r < group.places.size(); ++r)
    results[group.places[r]] = LeftHeads{arena.memory(), finish.wide_heads + params.group.first[r]};
}

}  // namespace

std::vector<std::optional<ListedRows>> triangular_forward(const std::vector<TriangularRows>& relations) {
  std::vector<std::optional<ListedRows>> results(relations.size());
  for (const auto& group : groups_of(relations, &forward_params_of))
    run_group(group, relations, results);
  return results;
}

std::vector<std::optional<LeftHeads>> triangular_backward(const std::vector<TriangularGradient>& relations) {
  std::vector<std::optional<LeftHeads>> results(relations.size());
  for (const auto& group : groups_of(relations, &backward_params_of))
    run_group(group, relations, results);
  return results;
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
