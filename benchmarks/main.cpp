#include <fstream>
#include <string>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <linearard/linearard.h>
#include <torch/version.h>

#include "arguments.h"
#include "relation_kl_benchmark.h"

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
void add_context() {
  benchmark::AddCustomContext("cpu", cpu_model());
  benchmark::AddCustomContext("torch", TORCH_VERSION);
  benchmark::AddCustomContext("linearard", LINEARARD_VERSION);
  benchmark::AddCustomContext("threads", std::to_string(at::get_num_threads()));
  const at::Tensor x = at::zeros({1, 9, 2048, 64});
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
  add_context();
  linearard::benchmarks::register_relation_kl(arguments);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
