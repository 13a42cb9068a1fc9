#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/half_range.cuh"
#include "../common/instructions.cuh"
#include "../common/launch.cuh"
#include "../common/rounding.cuh"
#include "../common/visibility.cuh"
#include "divergence.cuh"
#include "group.cuh"
#include "head.cuh"
#include "launch.h"

// The steps after the triangular kernels.

namespace linearard::cuda::triangular {
namespace {

constexpr int kThreads = 256;

struct Row {
  double kl;
  double lse_student;
  double lse_teacher;
  double error;  ///< what the rounding of the sums may have done to kl
};

/// log(1 + e^x)
__device__ double log1p_exp(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

/// A row whose only key with a probability is its own.
__device__ Row own_row(const OwnLogit& own) {
  const double teacher = static_cast<double>(own.teacher) * kLn2Wide;
  return {0, teacher + static_cast<double>(own.difference) * kLn2Wide, teacher, 0};
}

/// A row out of its own logit and the sums over the others. With R the probability of the others,
///   KL(P || Q) = KL of own against others + R KL of the others among themselves,
/// a sum of two non-negative terms: the own logit, which moves differently from all others, cancels nowhere.
__device__ Row row_of(double mass, double moment, double phi_sum, const OwnLogit& own, double log2_unit) {
  // Few rows at a time: what these functions cost is how they wait for each other, so each is called once.
  const double own_teacher = static_cast<double>(own.teacher) * kLn2Wide;
  const double own_difference = static_cast<double>(own.difference) * kLn2Wide;
  const double inverse = 1 / mass;
  const double a = (moment + phi_sum) * inverse;
  const double c = phi_sum * inverse;
  const double m = moment * inverse;
  const double shift = log1p(a);  // of the others' log-sum-exp
  const double rest = tilted_divergence(a, c, m, shift);
  const double rest_error = tilted_error(a, c, m);

  // Log-odds of the others against the token itself.
  const double odds = log(mass) + log2_unit * kLn2Wide - own_teacher;
  const double smaller = exp(-fabs(odds));
  const double larger = 1 / (1 + smaller);
  const double others = odds > 0 ? larger : smaller * larger;
  const double teacher = (odds > 0 ? odds : 0) + log1p(smaller);  // log(1 + e^odds)
  const double moved = shift - own_difference;
  const double excess = expm1(moved);
  const double own_a = others * excess;
  double own_shift = log1p(own_a);
  // Where the own token takes nearly everything, what is left has no digits in own_a.
  if (!(own_a > -0.9)) own_shift = log1p_exp(odds + moved) - teacher;
  const double binary = tilted_divergence(own_a, others * phi_of(moved, excess), others * moved, own_shift);
  return {binary + others * rest, own_teacher + own_difference + teacher + own_shift, own_teacher + teacher,
          others * rest_error};
}

__device__ float bias_of(const FinishForwardParams& p, int problem, int64_t index) {
  if (p.references == nullptr) return p.token_values[index].bias;
  return token_bias(p.references[index], p.plain_heads[problem] != 0);
}

__global__ void __launch_bounds__(kThreads) finish_forward_kernel(const __grid_constant__ FinishForwardParams p) {
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  const int tokens = p.visibility.rows;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.group.problems) * tokens) return;
  const int problem = static_cast<int>(index / tokens);
  const int token = static_cast<int>(index % tokens);
  const Place place = place_of(p.group, problem);
  const int keys = is_real(p.visibility.row_mask, tokens, place.batch, token)
                       ? keys_of_row(p.visibility, place.batch, token).count
                       : 0;
  Row row{0, 0, 0, 0};
  bool refine = false;
  if (keys > 1) {
    const float* sums = p.sums + static_cast<int64_t>(problem) * kSums * tokens + token;
    const double mass = sums[0];
    const double moment = sums[tokens] * static_cast<double>(p.factors.student) * kLn2;
    const double phi_sum = sums[2 * static_cast<int64_t>(tokens)];
    const double log2_unit = bias_of(p, problem, index) - kHeadroom / 2 + static_cast<double>(p.centers[problem]);
    // All others underflowed, on both sides: the row is its own token.
    row = mass == 0 && phi_sum == 0 ? own_row(p.own[index]) : row_of(mass, moment, phi_sum, p.own[index], log2_unit);
    // Not below: NaN is refined. A student that has lost nearly all of the others' mass: 1 + a has no digits.
    refine = p.wide_heads[problem] != 0 || !(row.error < allowed_error(row.kl)) || !(moment + phi_sum >= -0.98 * mass);
  } else if (keys == 1) {
    row = own_row(p.own[index]);
  }
  refine = refine || !(fabs(row.lse_student) + fabs(row.lse_teacher) < Base<float>::kHuge);
  const RowResults& results = p.rows[place.relation];
  const int64_t at = static_cast<int64_t>(place.problem) * tokens + token;
  results.kl[at] = static_cast<float>(fmax(row.kl, 0.0));
  results.lse_student[at] = static_cast<float>(row.lse_student);
  results.lse_teacher[at] = static_cast<float>(row.lse_teacher);
  int* const list = p.row_lists + static_cast<int64_t>(problem) * tokens;
  if (p.ordered) {
    list[token] = refine ? 1 : 0;
  } else if (refine) {
    list[atomicAdd(p.row_counts + problem, 1)] = token;
  }
}

/// Makes lists of rows out of their marks, in place. A warp serves a head: what it writes it has read.
__global__ void __launch_bounds__(32) order_rows_kernel(const __grid_constant__ OrderRowsParams p) {
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  const int problem = static_cast<int>(blockIdx.x);
  const int tokens = p.rows;
  const int lane = static_cast<int>(threadIdx.x);
  int* const list = p.row_lists + static_cast<int64_t>(problem) * tokens;
  int count = 0;
#pragma unroll 4
  for (int first = 0; first < tokens; first += 32) {
    const bool listed = first + lane < tokens && list[first + lane] != 0;
    const uint32_t lanes = __ballot_sync(0xffffffffu, listed);
    if (listed) list[count + __popc(lanes & ((1u << lane) - 1))] = first + lane;
    count += __popc(lanes);
  }
  if (lane == 0) p.row_counts[problem] = count;
}

// The gradient's elements that a thread, and a block, take: whole chunks of 16 bytes of the result. A vector is made of
// whole chunks.
constexpr int kChunk = 8;
constexpr int kChunksOfThread = 4;
constexpr int kBlockChunks = kChunksOfThread * kThreads;

int64_t finish_blocks_of_head(int tokens, int dim) {
  const int64_t chunks = int64_t{tokens} * (dim / kChunk);
  return (chunks + kBlockChunks - 1) / kBlockChunks;
}

/// Two elements in a register.
template <typename T>
__device__ uint32_t packed(float low, float high) {
  const T pair[2] = {saturated_to<T>(low), saturated_to<T>(high)};
  return *reinterpret_cast<const uint16_t*>(&pair[0]) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&pair[1])) << 16;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_backward_kernel(const __grid_constant__ FinishBackwardParams p, int blocks) {
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  const int64_t problem = static_cast<int>(blockIdx.x) / blocks;
  if (p.wide_heads != nullptr && p.wide_heads[problem] != 0) return;
  const Place place = place_of(p.group, static_cast<int>(problem));
  const VectorGradient& result = p.relations[place.relation];
  const int chunks_of_vector = p.dim / kChunk;
  const int64_t chunks = static_cast<int64_t>(p.tokens) * chunks_of_vector;
  const int64_t first = static_cast<int64_t>(static_cast<int>(blockIdx.x) % blocks) * kBlockChunks + threadIdx.x;
  const auto* from = reinterpret_cast<const float4*>(p.sums) + 2 * problem * chunks;
  auto* to = static_cast<uint4*>(result.gradient) + place.problem * chunks;
  const float scale = static_cast<float>(p.output_scale) / half_range_scale(result.largest_grad);
  float4 sums[kChunksOfThread][2];
#pragma unroll
  for (int i = 0; i < kChunksOfThread; ++i) {
    const int64_t chunk = first + i * kThreads;
    if (chunk >= chunks) break;
    sums[i][0] = from[2 * chunk];
    sums[i][1] = from[2 * chunk + 1];
  }
#pragma unroll
  for (int i = 0; i < kChunksOfThread; ++i) {
    const int64_t chunk = first + i * kThreads;
    if (chunk >= chunks) break;
    const float4& a = sums[i][0];
    const float4& b = sums[i][1];
    const float x[kChunk] = {a.x * scale, a.y * scale, a.z * scale, a.w * scale,
                             b.x * scale, b.y * scale, b.z * scale, b.w * scale};
    to[chunk] = {packed<T>(x[0], x[1]), packed<T>(x[2], x[3]), packed<T>(x[4], x[5]), packed<T>(x[6], x[7])};
    bool held = true;
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      held = held && fabsf(x[e]) < Base<float>::kHuge;
    if (!held) mark_redo(result.redo, place.problem, static_cast<int>(chunk / chunks_of_vector), p.tokens);
  }
}

}  // namespace

cudaError_t finish_forward(const FinishForwardParams& params, cudaStream_t stream) {
  const int64_t rows = int64_t{params.group.problems} * params.visibility.rows;
  const cudaError_t error =
      launch_overlapping_blocks(finish_forward_kernel, params, (rows + kThreads - 1) / kThreads, kThreads, 0, stream);
  if (error != cudaSuccess || !params.ordered) return error;
  return order_rows({params.group.problems, params.visibility.rows, params.row_counts, params.row_lists}, stream);
}

cudaError_t order_rows(const OrderRowsParams& params, cudaStream_t stream) {
  return launch_overlapping_blocks(order_rows_kernel, params, params.problems, 32, 0, stream);
}

cudaError_t finish_backward(const FinishBackwardParams& params, cudaStream_t stream) {
  const int64_t per_head = finish_blocks_of_head(params.tokens, params.dim);
  const int64_t blocks = per_head * params.group.problems;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel =
      params.type == Scalar::kHalf ? finish_backward_kernel<__half> : finish_backward_kernel<__nv_bfloat16>;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, params,
                            static_cast<int>(per_head));
}

}  // namespace linearard::cuda::triangular
