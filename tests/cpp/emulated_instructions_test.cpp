#include <emulation/cuda_runtime_shim.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mma/instructions.cuh>

// The emulated instructions against their definitions, and what the emulation finds wrong with a kernel.

namespace linearard::emulation {
namespace {

using cuda::shared_address;

std::vector<__half> random_matrix(int rows, int columns, unsigned seed) {
  std::minstd_rand generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<__half> matrix(static_cast<size_t>(rows) * columns);
  for (__half& x : matrix)
    x = __float2half(uniform(generator));
  return matrix;
}

/// The message of the error that a kernel of one block ends with.
std::string error_of(int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  try {
    run_grid(dim3(1), dim3(static_cast<unsigned>(threads)), shared_bytes, kernel);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void expect_error(int threads, size_t shared_bytes, const std::function<void()>& kernel, const std::string& part) {
  const std::string message = error_of(threads, shared_bytes, kernel);
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

/// a [16, 16] by rows times b [16, 8] by rows, whose columns come through ldmatrix.trans.
TEST(EmulatedInstructions, MatrixLoadsFeedTheMatrixProduct) {
  const std::vector<__half> a = random_matrix(16, 16, 1);
  const std::vector<__half> b = random_matrix(16, 16, 2);
  std::vector<float> d(16 * 16);
  run_grid(dim3(1), dim3(32), 1024, [&] {
    char* const memory = cuda::dynamic_shared_memory();
    const unsigned lane = threadIdx.x;
    auto* const a_shared = reinterpret_cast<__half*>(memory);
    auto* const b_shared = a_shared + 256;
    for (unsigned i = lane; i < 256; i += 32) {
      a_shared[i] = a[i];
      b_shared[i] = b[i];
    }
    __syncwarp();
    uint32_t a_registers[4];
    uint32_t b_registers[4];
    // Rows 0-15 of the left half, then of the right half: the order of the product's first operand.
    cuda::load_matrices(a_registers, shared_address(a_shared + lane % 16 * 16 + lane / 16 * 8));
    cuda::load_matrices_transposed(b_registers, shared_address(b_shared + lane % 16 * 16 + lane / 16 * 8));
    for (unsigned half = 0; half < 2; ++half) {
      float sum[4] = {};
      cuda::multiply_add<__half>(sum, a_registers, b_registers[2 * half], b_registers[2 * half + 1]);
      for (unsigned c = 0; c < 4; ++c)
        d[(lane / 4 + c / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + c % 2] = sum[c];
    }
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      double exact = 0;
      for (int k = 0; k < 16; ++k)
        exact += static_cast<double>(__half2float(a[i * 16 + k])) * __half2float(b[k * 16 + j]);
      EXPECT_NEAR(d[i * 16 + j], exact, 1e-6) << i << ", " << j;
    }
  }
}

TEST(EmulatedInstructions, MatrixStoresUndoLoadsAndMovesTranspose) {
  const std::vector<__half> matrix = random_matrix(8, 32, 3);
  std::vector<__half> same(matrix.size());
  std::vector<__half> transpose(matrix.size());
  run_grid(dim3(1), dim3(32), 2048, [&] {
    auto* const from = reinterpret_cast<__half*>(cuda::dynamic_shared_memory());
    auto* const to = from + 256;
    auto* const to_transposed = to + 256;
    const unsigned lane = threadIdx.x;
    for (unsigned i = lane; i < 256; i += 32)
      from[i] = matrix[i];
    __syncwarp();
    uint32_t registers[4];
    const auto at = Location::current();
    load_matrices(registers, shared_address(from + lane * 8), false, at);
    store_matrices(shared_address(to + lane * 8), registers, false, at);
    for (uint32_t& r : registers)
      r = transpose_matrix(r, at);
    store_matrices(shared_address(to_transposed + lane * 8), registers, false, at);
    __syncwarp();
    for (unsigned i = lane; i < 256; i += 32) {
      same[i] = to[i];
      transpose[i] = to_transposed[i];
    }
  });
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) {
        const float x = __half2float(matrix[m * 64 + i * 8 + j]);
        EXPECT_EQ(__half2float(same[m * 64 + i * 8 + j]), x);
        EXPECT_EQ(__half2float(transpose[m * 64 + j * 8 + i]), x);
      }
    }
  }
}

TEST(EmulatedInstructions, ShufflesAndVotes) {
  run_grid(dim3(1), dim3(64), 0, [] {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    EXPECT_EQ(__shfl_xor_sync(~0u, lane, 5), lane ^ 5);
    EXPECT_EQ(__shfl_sync(~0u, lane, 3, 8), lane / 8 * 8 + 3);
    EXPECT_EQ(__shfl_up_sync(~0u, lane, 1), lane == 0 ? 0 : lane - 1);
    EXPECT_EQ(__shfl_down_sync(~0u, lane, 2), lane > 29 ? lane : lane + 2);
    EXPECT_EQ(__ballot_sync(~0u, lane < 3), 7u);
    EXPECT_FALSE(__all_sync(~0u, lane < 31));
    EXPECT_TRUE(__any_sync(~0u, lane == 31));
  });
}

TEST(EmulatedInstructions, CopiesFillWithZerosAndLandWhenWaitedFor) {
  alignas(16) const int source[4] = {1, 2, 3, 4};
  run_grid(dim3(1), dim3(1), 32, [&] {
    const auto* const memory = reinterpret_cast<const int*>(cuda::dynamic_shared_memory());
    cuda::copy_async(shared_address(memory), source, true);
    cuda::copy_commit();
    cuda::copy_async(shared_address(memory + 4), source, false);
    cuda::copy_commit();
    cuda::copy_wait<1>();
    EXPECT_EQ(memory[3], 4);
    EXPECT_NE(memory[4], 0);
    cuda::copy_wait<0>();
    EXPECT_EQ(memory[4], 0);
  });
}

TEST(EmulationErrors, NameWhatIsWrong) {
  const auto in_memory = [](int offset) { return shared_address(cuda::dynamic_shared_memory() + offset); };
  expect_error(32, 64, [&] { cuda::load_shared_16(in_memory(0) + 64); }, "2 bytes at offset 64 of shared memory of 64");
  expect_error(32, 64, [&] { cuda::load_shared_16(in_memory(1)); }, "not aligned to 2");
  alignas(16) static const char source[16] = {};
  expect_error(
      32, 64,
      [&] {
        if (threadIdx.x == 0) cuda::copy_async(in_memory(0), source, true);
        cuda::load_shared_16(in_memory(8));
      },
      "wait for an asynchronous copy");
  expect_error(
      64, 0,
      [] {
        if (threadIdx.x % 2 == 0) {
          __syncwarp();
        } else {
          __any_sync(~0u, true);
        }
      },
      "diverge");
}

TEST(EmulationErrors, ADeadlockSaysWhereThreadsWait) {
  const std::string message = error_of(96, 0, [] {
    if (threadIdx.x < 32) {
      named_barrier(1, 64, true, Location::current());
    } else {
      __syncthreads();
    }
  });
  EXPECT_NE(message.find("deadlock"), std::string::npos) << message;
  EXPECT_NE(message.find("threads 0-31 wait for a barrier"), std::string::npos) << message;
  EXPECT_NE(message.find("threads 32-95 wait for a barrier"), std::string::npos) << message;
}

TEST(EmulationErrors, AMissingBarrierShowsUnderSomeSchedule) {
  int wrong = 0;
  for (uint32_t seed = 0; seed < 8; ++seed) {
    set_schedule(seed);
    run_grid(dim3(1), dim3(128), 512, [&] {
      auto* const memory = reinterpret_cast<unsigned*>(cuda::dynamic_shared_memory());
      memory[threadIdx.x] = threadIdx.x;
      __syncwarp();
      if (memory[(threadIdx.x + 32) % 128] != (threadIdx.x + 32) % 128) ++wrong;
    });
  }
  set_schedule(0);
  EXPECT_GT(wrong, 0);
}

}  // namespace
}  // namespace linearard::emulation
