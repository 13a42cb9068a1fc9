#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace linearard::benchmarks {

/// One problem: [batch, heads, tokens, dimension] for student and teacher.
struct Shape {
  int64_t batch = 1;
  int64_t heads = 9;
  int64_t tokens = 2048;
  int64_t dimension = 64;

  std::string name() const;
};

struct Arguments {
  at::Device device = at::kCPU;
  std::vector<Shape> shapes;
  std::vector<at::ScalarType> dtypes;
  bool causal = false;
  int threads = 0;  ///< 0: as many as torch takes by itself
  /// The N x N computation is skipped where its tensors take more; unset: 8 on the CPU, what is free on a GPU.
  std::optional<double> naive_memory_limit_gib;
};

/// Take our own options out of argc and argv, so that Google Benchmark parses the rest:
///   --device=cpu|cuda  --shape=BxHxNxD (repeatable)  --dtype=float32 (repeatable)  --causal  --threads=n
///   --naive_memory_limit_gib=x
/// Without a shape: B=1, H=9, D=64 (SmolLM2-135M) and N = 512 .. 32768, on a GPU also B=1, H=32, D=128 and
/// N = 512 .. 16384. Without a dtype: float32, on a GPU bfloat16.
Arguments parse_arguments(int& argc, char** argv);

const char* dtype_name(at::ScalarType dtype);

}  // namespace linearard::benchmarks
