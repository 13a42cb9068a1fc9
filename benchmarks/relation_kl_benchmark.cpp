#include "relation_kl_benchmark.h"

#include <algorithm>
#include <array>
#include <functional>
#include <string>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <linearard/linearard.h>

#include "memory.h"
#include "naive.h"
#include "stopwatch.h"

namespace linearard::benchmarks {
namespace {

constexpr double kMebibyte = 1024.0 * 1024.0;

enum class Pass { kForward, kBackward, kBoth };
constexpr std::array<std::pair<Pass, const char*>, 3> kPasses{
    {{Pass::kForward, "forward"}, {Pass::kBackward, "backward"}, {Pass::kBoth, "both"}}};

/// FLOP of the dense algorithm, the same yardstick for everybody: S and T forward, S, T and H X backward, each 2 N^2 D.
double counted_flop(const Shape& shape, Pass pass) {
  const double product = 2.0 * static_cast<double>(shape.tokens) * static_cast<double>(shape.tokens) *
                         static_cast<double>(shape.dimension * shape.heads * shape.batch);
  switch (pass) {
    case Pass::kForward:
      return 2.0 * product;
    case Pass::kBackward:
      return 3.0 * product;
    case Pass::kBoth:
      return 5.0 * product;
  }
  return 0.0;
}

/// One iteration in two parts: what has to be there, and what is measured. Outputs are dropped in between.
struct Work {
  std::function<void()> prepare;
  std::function<void()> measured;
  int64_t output_bytes = 0;  ///< of the results that the caller keeps: not counted as extra memory
};

Work library_work(const at::Tensor& student, const at::Tensor& teacher, bool causal, Pass pass) {
  const auto options = RelationOptions{}.causal(causal);
  const int64_t gradient_bytes = student.numel() * student.element_size();
  if (pass == Pass::kForward) {
    return {[] {},
            [=] {
              const at::NoGradGuard no_grad;
              benchmark::DoNotOptimize(relation_kl_forward(student, teacher, options));
            },
            3 * (student.numel() / student.size(3)) * 4};
  }
  if (pass == Pass::kBackward) {
    const at::NoGradGuard no_grad;
    const auto [kl, lse_student, lse_teacher] = relation_kl_forward(student, teacher, options);
    const at::Tensor grad_kl = at::full_like(kl, 1.0 / static_cast<double>(kl.numel()));
    return {
        [] {},
        [=, lse_student = lse_student, lse_teacher = lse_teacher] {
          const at::NoGradGuard inner_no_grad;
          benchmark::DoNotOptimize(relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, options));
        },
        gradient_bytes};
  }
  return {[student] { student.mutable_grad().reset(); }, [=] { relation_kl(student, teacher, options).backward(); },
          gradient_bytes};
}

Work naive_work(const at::Tensor& student, const at::Tensor& teacher, bool causal, Pass pass) {
  const int64_t gradient_bytes = student.numel() * student.element_size();
  const auto loss = std::make_shared<at::Tensor>();
  const auto reset = [student, loss] {
    student.mutable_grad().reset();
    loss->reset();
  };
  const auto forward = [=] { *loss = naive_relation_kl(student, teacher, causal); };
  if (pass == Pass::kForward) return {reset, forward, 0};
  if (pass == Pass::kBackward) {
    return {[=] {
              reset();
              forward();
            },
            [loss] { loss->backward(); }, gradient_bytes};
  }
  return {reset,
          [=] {
            forward();
            loss->backward();
          },
          gradient_bytes};
}

double naive_memory_limit(const Arguments& arguments) {
  constexpr double kOnTheCpu = 8.0;
  if (!arguments.naive_memory_limit_gib && !arguments.device.is_cpu()) return free_bytes(arguments.device);
  return arguments.naive_memory_limit_gib.value_or(kOnTheCpu) * 1024.0 * kMebibyte;
}

using MakeWork = Work (*)(const at::Tensor&, const at::Tensor&, bool, Pass);

void run(benchmark::State& state,
         const Shape& shape,
         at::ScalarType dtype,
         Pass pass,
         MakeWork make_work,
         const Arguments& arguments,
         std::optional<double> matrix_rate) {
  const std::array<int64_t, 4> size{shape.batch, shape.heads, shape.tokens, shape.dimension};
  const auto float32 = at::TensorOptions().dtype(at::kFloat).device(arguments.device);
  const at::Tensor teacher = at::randn(size, float32).to(dtype);
  const at::Tensor noise = at::randn(size, float32);
  const at::Tensor student = (teacher + 0.1 * noise).to(dtype).requires_grad_();
  const bool naive = make_work == naive_work;
  if (naive && naive_peak_bytes(student) > naive_memory_limit(arguments)) {
    state.SkipWithError("its N x N tensors would take more than --naive_memory_limit_gib, or than there is");
    return;
  }
  const Work work = make_work(student, teacher, arguments.causal, pass);
  // The run that is measured for memory warms up as well.
  work.prepare();
  const auto peak = peak_bytes(arguments.device, work.measured);
  Stopwatch stopwatch(arguments.device);
  for (auto _ : state) {
    work.prepare();
    stopwatch.start();
    work.measured();
    state.SetIterationTime(stopwatch.stop());
  }
  work.prepare();
  state.counters["GFLOP/s"] =
      benchmark::Counter(counted_flop(shape, pass) * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  if (matrix_rate) {
    state.counters["of_G"] =
        benchmark::Counter(counted_flop(shape, pass) / *matrix_rate, benchmark::Counter::kIsIterationInvariantRate);
  }
  if (peak) state.counters["extra_MiB"] = static_cast<double>(*peak - work.output_bytes) / kMebibyte;
}

}  // namespace

double matrix_rate(const at::Device& device) {
  constexpr int64_t kSize = 8192;
  constexpr int kWarmUp = 20;
  constexpr int kRepetitions = 200;
  const auto options = at::TensorOptions().dtype(at::kBFloat16).device(device);
  const at::Tensor left = at::randn({kSize, kSize}, options);
  const at::Tensor right = at::randn({kSize, kSize}, options);
  Stopwatch stopwatch(device);
  std::array<double, kRepetitions> seconds{};
  for (int i = 0; i < kWarmUp; ++i)
    at::mm(left, right);
  for (double& time : seconds) {
    stopwatch.start();
    at::mm(left, right);
    time = stopwatch.stop();
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRepetitions / 2, seconds.end());
  return 2.0 * kSize * kSize * kSize / seconds[kRepetitions / 2];
}

void register_relation_kl(const Arguments& arguments, std::optional<double> matrix_rate) {
  for (const at::ScalarType dtype : arguments.dtypes) {
    for (const Shape& shape : arguments.shapes) {
      for (const auto& [pass, pass_name] : kPasses) {
        for (const auto& [make_work, peer] :
             {std::pair<MakeWork, const char*>{library_work, "linearard"}, {naive_work, "naive"}}) {
          const std::string name = std::string("relation_kl/") + peer + "/" + pass_name + "/" + dtype_name(dtype) +
                                   (arguments.causal ? "/causal/" : "/dense/") + shape.name();
          benchmark::RegisterBenchmark(name.c_str(),
                                       [=, pass = pass, make_work = make_work](benchmark::State& state) {
                                         try {
                                           run(state, shape, dtype, pass, make_work, arguments, matrix_rate);
                                         } catch (const c10::OutOfMemoryError&) {
                                           state.SkipWithError("out of memory");
                                         }
                                       })
              ->UseManualTime()
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
}

}  // namespace linearard::benchmarks
