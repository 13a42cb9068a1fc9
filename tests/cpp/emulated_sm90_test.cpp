#include <emulation/cuda_runtime_shim.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <emulation/sm90_instructions.h>

// The emulated instructions of sm_90 against their definitions: the copy engine, mbarriers, wgmma.

namespace linearard::emulation {
namespace {

namespace sm90 = cuda::sm90;

constexpr int kTokens = 128;
constexpr int kDims = 128;
constexpr uint32_t kChunkBytes = kTokens * 128;  ///< of 64 dimensions of all tokens
constexpr uint32_t kTileBytes = kDims / 64 * kChunkBytes;

uint32_t memory_at(uint32_t offset) { return shared_address_of(dynamic_shared_memory(), Location::current()) + offset; }

/// Of eight sums below 256 in float.
constexpr double kRounding = 8 * 0x1p-17;

/// Vectors [tokens][dims].
std::vector<__half> random_vectors(int tokens, int dims, unsigned seed) {
  std::minstd_rand generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<__half> vectors(static_cast<size_t>(tokens) * dims);
  for (__half& x : vectors)
    x = __float2half(uniform(generator));
  return vectors;
}

/// The map of [tokens][dims] in boxes of 64 dimensions and kTokens tokens, as the driver's function makes it.
CUtensorMap map_of(const std::vector<__half>& vectors, int tokens, int dims) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  EXPECT_EQ(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, 0, &found), cudaSuccess);
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(dims), static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(dims) * 2};
  const cuuint32_t box[2] = {64, kTokens};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  EXPECT_EQ(encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<__half*>(vectors.data()), sizes, strides, box,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
            CUDA_SUCCESS);
  return map;
}

/// Both tiles into shared memory at 0 and at kTileBytes; all threads wait for them.
void load_tiles(const CUtensorMap& a, const CUtensorMap& b) {
  const uint32_t barrier = memory_at(2 * kTileBytes);
  if (threadIdx.x == 0) {
    sm90::mbarrier_init(barrier, 1);
    sm90::mbarrier_arrive_expect(barrier, 2 * kTileBytes);
    for (int chunk = 0; chunk < kDims / 64; ++chunk) {
      sm90::tma_load_4d(memory_at(chunk * kChunkBytes), &a, barrier, chunk * 64, 0, 0, 0);
      sm90::tma_load_4d(memory_at(kTileBytes + chunk * kChunkBytes), &b, barrier, chunk * 64, 0, 0, 0);
    }
  }
  __syncthreads();
  sm90::mbarrier_wait(barrier, 0);
}

/// 128-byte swizzle, eight lines of 128 bytes in 1024, chunks of 64 dimensions one after the other.
uint64_t descriptor(uint32_t shared) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{kChunkBytes / 16} << 16 | shared >> 4;
}

constexpr size_t kSharedBytes = 2 * kTileBytes + 16;

/// Calls value(row, column, register) for the thread's accumulators of a product with `columns` columns.
template <typename Value>
void for_each_accumulator(int columns, const Value& value) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = 0; i < columns / 2; ++i) {
    value(thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2, i);
  }
}

class EmulatedWgmma : public ::testing::Test {
 protected:
  static constexpr int kValidTokens = 117;
  const std::vector<__half> a_ = random_vectors(kValidTokens, kDims, 1);
  const std::vector<__half> b_ = random_vectors(kValidTokens, kDims, 2);
  const CUtensorMap a_map_ = map_of(a_, kValidTokens, kDims);
  const CUtensorMap b_map_ = map_of(b_, kValidTokens, kDims);

  /// Tokens that do not exist are zeros.
  static double element(const std::vector<__half>& vectors, int token, int dim) {
    return token < kValidTokens ? __half2float(vectors[token * kDims + dim]) : 0.0;
  }
};

/// Tokens 64-127 of a times all of b: sums over dimensions, lines contiguous along them.
TEST_F(EmulatedWgmma, ProductsOfVectors) {
  run_grid(dim3(1), dim3(128), kSharedBytes, [&] {
    load_tiles(a_map_, b_map_);
    float d[64];
    for (int step = 0; step < kDims / 16; ++step) {
      const uint32_t offset = step / 4 * kChunkBytes + step % 4 * 32;
      sm90::wgmma<__half, false, false>(d, descriptor(memory_at(64 * 128 + offset)),
                                        descriptor(memory_at(kTileBytes + offset)), step > 0);
    }
    sm90::warpgroup_commit();
    EXPECT_TRUE(std::isnan(d[5]));
    sm90::warpgroup_wait<0>();
    for_each_accumulator(128, [&](int row, int column, int i) {
      double exact = 0;
      for (int k = 0; k < kDims; ++k)
        exact += element(a_, 64 + row, k) * element(b_, column, k);
      EXPECT_NEAR(d[i], exact, kRounding) << row << ", " << column;
    });
  });
}

/// a^T b for dimensions 0-63 of a and all of b: sums over tokens, lines contiguous along rows and columns. In groups
/// that are waited for one by one, on top of what the accumulators held.
TEST_F(EmulatedWgmma, TransposedProducts) {
  run_grid(dim3(1), dim3(128), kSharedBytes, [&] {
    load_tiles(a_map_, b_map_);
    float d[64];
    for_each_accumulator(128, [&](int row, int column, int i) { d[i] = static_cast<float>(row - column); });
    sm90::warpgroup_fence();
    for (int step = 0; step < kTokens / 16; ++step) {
      sm90::wgmma<__half, true, true>(d, descriptor(memory_at(step * 16 * 128)),
                                      descriptor(memory_at(kTileBytes + step * 16 * 128)), true);
      sm90::warpgroup_commit();
      sm90::warpgroup_wait<1>();
    }
    sm90::warpgroup_wait<0>();
    sm90::pin(d);
    for_each_accumulator(128, [&](int row, int column, int i) {
      double exact = row - column;
      for (int k = 0; k < kTokens; ++k)
        exact += element(a_, k, row) * element(b_, k, column);
      EXPECT_NEAR(d[i], exact, kRounding) << row << ", " << column;
    });
  });
}

/// A in registers, loaded by ldmatrix from lines that were exchanged by the swizzle.
TEST_F(EmulatedWgmma, RegistersTimesVectors) {
  run_grid(dim3(1), dim3(128), kSharedBytes, [&] {
    load_tiles(a_map_, b_map_);
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t row_of_lane = threadIdx.x / 32 * 16 + lane % 16;
    uint32_t a[4][4];
    float d[32];
    for (uint32_t step = 0; step < 4; ++step) {
      const uint32_t piece = 2 * step + lane / 16;
      load_matrices(a[step], memory_at(row_of_lane * 128 + (piece ^ row_of_lane % 8) * 16), false, Location::current());
      sm90::wgmma<__half, true>(d, a[step], descriptor(memory_at(kTileBytes + step * 16 * 128)), step > 0);
    }
    sm90::warpgroup_commit();
    sm90::warpgroup_wait<0>();
    for_each_accumulator(64, [&](int row, int column, int i) {
      double exact = 0;
      for (int k = 0; k < 64; ++k)
        exact += element(a_, row, k) * element(b_, k, column);
      EXPECT_NEAR(d[i], exact, kRounding) << row << ", " << column;
    });
  });
}

/// A ring of buffers between a warp that copies and one that adds up, under several schedules.
TEST(EmulatedSm90, RingOfBuffers) {
  constexpr int kTiles = 7;
  constexpr int kStages = 2;
  constexpr uint32_t kBoxBytes = 256;
  alignas(16) float source[kTiles * 64];
  for (int i = 0; i < kTiles * 64; ++i)
    source[i] = static_cast<float>(i);
  CUtensorMap map;
  TensorMap{reinterpret_cast<const char*>(source), 4, {64, kTiles, 1, 1}, {64, 1, 1, 1}, {256, 16, 16}, false}.store(
      map);
  for (uint32_t seed = 0; seed < 5; ++seed) {
    set_schedule(seed);
    float sums[64] = {};
    run_grid(dim3(1), dim3(64), kStages * (kBoxBytes + 16), [&] {
      const auto full = [](int stage) { return memory_at(kStages * kBoxBytes + stage * 16); };
      const auto empty = [&](int stage) { return full(stage) + 8; };
      if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
          sm90::mbarrier_init(full(s), 1);
          sm90::mbarrier_init(empty(s), 32);
        }
      }
      __syncthreads();
      for (int tile = 0; tile < kTiles; ++tile) {
        const int stage = tile % kStages;
        const auto parity = static_cast<uint32_t>(tile / kStages % 2);
        if (threadIdx.x < 32) {
          if (!sm90::elect_one()) continue;
          sm90::mbarrier_wait(empty(stage), parity ^ 1);
          sm90::mbarrier_arrive_expect(full(stage), kBoxBytes);
          sm90::tma_load_4d(memory_at(stage * kBoxBytes), &map, full(stage), 0, tile, 0, 0);
        } else {
          sm90::mbarrier_wait(full(stage), parity);
          for (uint32_t i = threadIdx.x - 32; i < 64; i += 32)
            sums[i] += read_shared<float>(memory_at(stage * kBoxBytes + i * 4), Location::current());
          sm90::mbarrier_arrive(empty(stage));
        }
      }
    });
    for (int i = 0; i < 64; ++i)
      EXPECT_EQ(sums[i], kTiles * i + 64 * kTiles * (kTiles - 1) / 2) << "seed " << seed;
  }
  set_schedule(0);
}

TEST(EmulatedSm90, AdditionsDropWhatLiesOutside) {
  constexpr int kTokens = 10;
  constexpr int kDims = 40;
  constexpr int kBoxTokens = 8;
  constexpr int kBoxDims = 32;
  std::vector<float> sums(static_cast<size_t>(kTokens) * kDims);
  std::iota(sums.begin(), sums.end(), 0.f);
  CUtensorMap map;
  TensorMap{reinterpret_cast<const char*>(sums.data()),
            4,
            {kDims, kTokens, 1, 1},
            {kBoxDims, kBoxTokens, 1, 1},
            {kDims * 4, 16, 16},
            true}
      .store(map);
  run_grid(dim3(1), dim3(1), kBoxTokens * kBoxDims * 4, [&] {
    for (int token = 0; token < kBoxTokens; ++token) {
      for (int dim = 0; dim < kBoxDims; ++dim) {
        const int piece = token * kBoxDims / 4 + (dim / 4 ^ token % 8);
        reinterpret_cast<float*>(dynamic_shared_memory())[4 * piece + dim % 4] = 1000.f * token + dim;
      }
    }
    sm90::fence_async_proxy();
    sm90::tma_reduce_add_4d(&map, memory_at(0), 32, 5, 0, 0);
    sm90::bulk_commit();
    sm90::bulk_wait_read<0>();
  });
  for (int token = 0; token < kTokens; ++token) {
    for (int dim = 0; dim < kDims; ++dim) {
      const float before = static_cast<float>(token * kDims + dim);
      const float added = token >= 5 && dim >= 32 ? 1000.f * (token - 5) + (dim - 32) : 0.f;
      EXPECT_EQ(sums[static_cast<size_t>(token * kDims + dim)], before + added) << token << ' ' << dim;
    }
  }
}

void expect_error(int threads, const std::function<void()>& kernel, const std::string& part) {
  try {
    run_grid(dim3(1), dim3(static_cast<unsigned>(threads)), kSharedBytes, kernel);
    FAIL() << "no error, expected: " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(EmulatedSm90Errors, AnMbarrierThatMissesBytes) {
  expect_error(
      32,
      [] {
        if (threadIdx.x == 0) {
          sm90::mbarrier_init(memory_at(0), 1);
          sm90::mbarrier_arrive_expect(memory_at(0), 64);
        }
        __syncwarp();
        sm90::mbarrier_wait(memory_at(0), 0);
      },
      "mbarrier at offset 0 in phase 0 misses 0 arrivals and 64 bytes");
}

TEST(EmulatedSm90Errors, TooManyArrivals) {
  expect_error(
      32,
      [] {
        if (threadIdx.x == 0) sm90::mbarrier_init(memory_at(0), 16);
        __syncwarp();
        if (threadIdx.x == 0) sm90::mbarrier_arrive_expect(memory_at(0), 64);
        if (threadIdx.x < 16) sm90::mbarrier_arrive(memory_at(0));
      },
      "more than the 16 arrivals");
}

TEST_F(EmulatedWgmma, MistakesAreFound) {
  float d[16];
  const auto product = [](float (&to)[16], uint32_t a) {
    sm90::wgmma<__half, false, false>(to, descriptor(memory_at(a)), descriptor(memory_at(kTileBytes)), false);
  };
  expect_error(
      128,
      [&] {
        load_tiles(a_map_, b_map_);
        float mine[16];
        product(mine, 0);
        sm90::warpgroup_commit();
        sm90::pin(mine);
      },
      "not done");
  expect_error(
      128,
      [&] {
        load_tiles(a_map_, b_map_);
        product(d, threadIdx.x < 64 ? 0 : 1024);
      },
      "different matrices");
  expect_error(
      128,
      [&] {
        load_tiles(a_map_, b_map_);
        float mine[16];
        const uint32_t zeros[4] = {};
        const uint32_t row = threadIdx.x / 32 * 16 + threadIdx.x % 16;
        sm90::store_matrices(memory_at(row * 128 + threadIdx.x % 32 / 16 * 16), zeros);
        __syncthreads();
        product(mine, 0);
        sm90::warpgroup_commit();
        sm90::warpgroup_wait<0>();
      },
      "no fence.proxy.async");
}

}  // namespace
}  // namespace linearard::emulation
