#include <fstream>
#include <optional>
#include <string>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <linearard/linearard.h>
#include <torch/version.h>

#include "arguments.h"
#include "relation_kl_benchmark.h"
#ifdef LINEARARD_WITH_CUDA
#include <device.h>
#endif

namespace {

/// "model name" of /proc/cpuinfo; "unknown" elsewhere.
std::string cpu_model() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

/// A number without its surroundings is not a measurement: they go into the result file.
void add_context(const at::Device& device, std::optional<double> matrix_rate) {
  benchmark::AddCustomContext("cpu", cpu_model());
#ifdef LINEARARD_WITH_CUDA
  if (device.is_cuda()) {
    benchmark::AddCustomContext("gpu", linearard::cuda::query_devices().at(device.index()).name);
    benchmark::AddCustomContext("cuda_toolkit", linearard::cuda::toolkit_version());
  }
#endif
  if (matrix_rate) benchmark::AddCustomContext("G_TFLOP/s", std::to_string(*matrix_rate * 1e-12));
  benchmark::AddCustomContext("torch", TORCH_VERSION);
  benchmark::AddCustomContext("linearard", LINEARARD_VERSION);
  benchmark::AddCustomContext("threads", std::to_string(at::get_num_threads()));
  const at::Tensor x = at::zeros({1, 9, 2048, 64}, at::TensorOptions().device(device));
  const linearard::ExecutionPlan plan = linearard::plan_relation_kl(x, x);
  benchmark::AddCustomContext("instruction_set", plan.instruction_set);
  benchmark::AddCustomContext("traversal", plan.traversal);
  benchmark::AddCustomContext("tile", std::to_string(plan.tile_rows) + "x" + std::to_string(plan.tile_columns));
}

}  // namespace

int main(int argc, char** argv) {
  const linearard::benchmarks::Arguments arguments = linearard::benchmarks::parse_arguments(argc, argv);
  if (arguments.threads > 0) at::set_num_threads(arguments.threads);
  at::manual_seed(1);
  std::optional<double> matrix_rate;
  if (!arguments.device.is_cpu()) matrix_rate = linearard::benchmarks::matrix_rate(arguments.device);
  add_context(arguments.device, matrix_rate);
  linearard::benchmarks::register_relation_kl(arguments, matrix_rate);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
