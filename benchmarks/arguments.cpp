#include "arguments.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <utility>

#include <ATen/Context.h>

namespace linearard::benchmarks {
namespace {

constexpr std::array<std::pair<const char*, at::ScalarType>, 4> kDtypes{{
    {"float32", at::kFloat},
    {"float64", at::kDouble},
    {"bfloat16", at::kBFloat16},
    {"float16", at::kHalf},
}};

/// What stands behind "--name=", or nothing when the argument is another one.
std::optional<std::string> value_of(std::string_view argument, std::string_view name) {
  if (!argument.starts_with("--") || !argument.substr(2).starts_with(name)) return std::nullopt;
  argument.remove_prefix(2 + name.size());
  if (!argument.starts_with("=")) return std::nullopt;
  return std::string(argument.substr(1));
}

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "linearard_benchmark: %s\n", message.c_str());
  std::exit(2);
}

Shape parse_shape(const std::string& text) {
  Shape shape;
  const int fields =
      std::sscanf(text.c_str(), "%ldx%ldx%ldx%ld", &shape.batch, &shape.heads, &shape.tokens, &shape.dimension);
  if (fields != 4 || shape.batch < 1 || shape.heads < 1 || shape.tokens < 1 || shape.dimension < 1) {
    fail("--shape must be BxHxNxD, for example 1x9x2048x64, got '" + text + "'");
  }
  return shape;
}

at::ScalarType parse_dtype(const std::string& text) {
  for (const auto& [name, dtype] : kDtypes) {
    if (text == name) return dtype;
  }
  fail("--dtype must be float32, float64, bfloat16 or float16, got '" + text + "'");
}

at::Device parse_device(const std::string& text) {
  if (text == "cpu") return at::kCPU;
  if (text != "cuda") fail("--device must be cpu or cuda, got '" + text + "'");
#ifndef LINEARARD_WITH_CUDA
  fail("--device=cuda: this build has no CUDA kernels; configure with -DLINEARARD_CUDA=ON");
#endif
  if (!at::hasCUDA()) fail("--device=cuda: torch finds no GPU that it can use");
  return {at::kCUDA, 0};
}

}  // namespace

std::string Shape::name() const {
  // A string first: GCC 12 warns about memcpy in literal + string (its bug 105651).
  return std::string("B") + std::to_string(batch) + "/H" + std::to_string(heads) + "/N" + std::to_string(tokens) +
         "/D" + std::to_string(dimension);
}

const char* dtype_name(at::ScalarType dtype) {
  for (const auto& [name, candidate] : kDtypes) {
    if (candidate == dtype) return name;
  }
  return "unknown";
}

Arguments parse_arguments(int& argc, char** argv) {
  Arguments arguments;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (const auto device = value_of(argument, "device")) {
      arguments.device = parse_device(*device);
    } else if (const auto shape = value_of(argument, "shape")) {
      arguments.shapes.push_back(parse_shape(*shape));
    } else if (const auto dtype = value_of(argument, "dtype")) {
      arguments.dtypes.push_back(parse_dtype(*dtype));
    } else if (const auto threads = value_of(argument, "threads")) {
      arguments.threads = std::atoi(threads->c_str());
    } else if (const auto limit = value_of(argument, "naive_memory_limit_gib")) {
      arguments.naive_memory_limit_gib = std::atof(limit->c_str());
    } else if (argument == "--causal") {
      arguments.causal = true;
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  const bool gpu = !arguments.device.is_cpu();
  if (arguments.dtypes.empty()) arguments.dtypes = {gpu ? at::kBFloat16 : at::kFloat};
  if (arguments.shapes.empty()) {
    for (int64_t tokens = 512; gpu && tokens <= 16384; tokens *= 2)
      arguments.shapes.push_back({1, 32, tokens, 128});
    for (int64_t tokens = 512; tokens <= 32768; tokens *= 2)
      arguments.shapes.push_back({1, 9, tokens, 64});
  }
  return arguments;
}

}  // namespace linearard::benchmarks
