#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/device_math.cuh"
#include "../common/half_range.cuh"
#include "../common/instructions.cuh"
#include "../common/launch.cuh"
#include "../common/visibility.cuh"
#include "../common/zeros.cuh"
#include "group.cuh"
#include "head.cuh"
#include "launch.h"

// The steps before the triangular kernels: what a token contributes to all its pairs. It depends on extremes of the
// head. None lets the next kernel begin before its own wait: where that one begins, what came before these steps has
// ended, and it may read vectors at once.

namespace linearard::cuda::triangular {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsOfBlock = kThreads / 32;

__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ int larger(int a, int b) { return max(a, b); }

/// The largest of the block's threads of each of some numbers; NaN does not count. Once in a kernel: what is in
/// `scratch` stays there.
template <typename Number, int kNumbers>
__device__ void take_largest_of_block(Number (&x)[kNumbers], Number (&scratch)[kWarpsOfBlock][kNumbers]) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      x[i] = larger(x[i], __shfl_xor_sync(0xffffffffu, x[i], lane));
  }
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      scratch[threadIdx.x / 32][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarpsOfBlock; ++w) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      x[i] = larger(x[i], scratch[w][i]);
  }
}

template <typename Number>
__device__ Number largest_of_block(Number x, Number (&scratch)[kWarpsOfBlock][1]) {
  Number numbers[1] = {x};
  take_largest_of_block(numbers, scratch);
  return numbers[0];
}

// --- before the forward ----------------------------------------------------------------------------------------------

constexpr int kLanes = kThreads / kRedoRows;  ///< threads that share a token: a block takes as many as marks stand for
constexpr int kChunk = 8;                     ///< elements of 16 bytes
static_assert(kLanes == 4);

/// The squares of the elements of one register.
template <typename T>
__device__ double squares_of(uint32_t word) {
  const T* pair = reinterpret_cast<const T*>(&word);
  const auto low = static_cast<double>(static_cast<float>(pair[0]));
  const auto high = static_cast<double>(static_cast<float>(pair[1]));
  return low * low + high * high;
}

/// |x|^2 of one vector by kLanes threads, exact but for the last rounding: it cancels against other logits.
/// @tparam kAtOnce chunks of a thread that are on their way together
template <typename T, int kAtOnce>
struct Square {
  uint4 chunks[kAtOnce];

  __device__ void load(const T* x, int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      chunks[i] = *reinterpret_cast<const uint4*>(x + (first + i * kLanes) * kChunk);
  }
  __device__ double sum() const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      sum += squares_of<T>(chunks[i].x) + squares_of<T>(chunks[i].y);
      sum += squares_of<T>(chunks[i].z) + squares_of<T>(chunks[i].w);
    }
    return sum;
  }
};

__device__ double sum_of_token(double x) {
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2)
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

/// Logits of kRedoRows tokens of a head with themselves, and the largest of them. A vector is made of whole chunks;
/// with kAtOnce > 1 of a multiple of kLanes kAtOnce.
template <typename T, int kAtOnce>
__global__ void __launch_bounds__(kThreads) own_logits_kernel(const __grid_constant__ PrepareForwardParams p) {
  __shared__ int scratch[kWarpsOfBlock][1];
  const int blocks = blocks_of_head(p.tokens);
  const int problem = static_cast<int>(blockIdx.x) / blocks;
  const int block = static_cast<int>(blockIdx.x) % blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const Place place = place_of(p.group, problem);
  const int first = block * kRedoRows;
  const int token = first + thread / kLanes;
  wait_for_kernels_ahead();
  let_next_kernel_begin();
  const bool real = is_real(p.mask, p.tokens, place.batch, token);

  double t = 0;
  double s = 0;
  if (real) {
    const int64_t at = token;
    const Vectors& of_student = p.vectors.student[place.relation];
    const Vectors& of_teacher = p.vectors.teacher[place.relation];
    const T* student = head_of<T>(of_student, place.batch, place.head) + at * of_student.token_stride;
    const T* teacher = head_of<T>(of_teacher, place.batch, place.head) + at * of_teacher.token_stride;
    const int chunks = p.vectors.teacher[0].dim / kChunk;
    for (int chunk = thread % kLanes; chunk < chunks; chunk += kLanes * kAtOnce) {
      Square<T, kAtOnce> square_of_teacher;
      Square<T, kAtOnce> square_of_student;
      square_of_teacher.load(teacher, chunk);
      square_of_student.load(student, chunk);
      t += square_of_teacher.sum();
      s += square_of_student.sum();
    }
  }
  constexpr double kUnit = Base<float>::kUnit;
  t = p.scale_teacher * kUnit * sum_of_token(t);
  s = p.scale_student * kUnit * sum_of_token(s);
  const OwnLogit own{static_cast<float>(t), static_cast<float>(s - t)};
  if (token < p.tokens && thread % kLanes == 0) {
    const int64_t at = static_cast<int64_t>(problem) * p.tokens + token;
    p.own[at] = own;
    if (p.references != nullptr) p.references[at] = own.teacher;
  }
  // Floats that are not negative are ordered as integers are; NaN is above all of them.
  const int largest = largest_of_block(__float_as_int(fabsf(own.teacher)), scratch);

  static_assert(kThreads >= kSums * kRedoRows);
  const int sum = thread / kRedoRows;
  const int zeroed = first + thread % kRedoRows;
  if (sum < kSums && zeroed < p.tokens) {
    p.sums[(static_cast<int64_t>(problem) * kSums + sum) * p.tokens + zeroed] = 0;
  }
  if (thread == 0) {
    p.largest[blockIdx.x] = largest;
    const RedoMarks redo = p.redo[place.relation];
    redo[1 + static_cast<int64_t>(place.problem) * blocks + block] = 0;
    if (block == 0) p.row_counts[problem] = 0;
    if (block == 0 && place.problem == 0) redo[0] = 0;
  }
}

constexpr int kForwardTokens = 4 * kThreads;  ///< of a block

__global__ void __launch_bounds__(kThreads) forward_tokens_kernel(const __grid_constant__ PrepareForwardParams p) {
  __shared__ int scratch[kWarpsOfBlock][1];
  const int parts = (p.tokens + kForwardTokens - 1) / kForwardTokens;
  const int problem = static_cast<int>(blockIdx.x) / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int batch = place_of(p.group, problem).batch;
  const int blocks = blocks_of_head(p.tokens);
  wait_for_kernels_ahead();
  let_next_kernel_begin();
  int bits = 0;
  for (int block = static_cast<int>(threadIdx.x); block < blocks; block += kThreads)
    bits = max(bits, p.largest[static_cast<int64_t>(problem) * blocks + block]);
  const ForwardHead head = ForwardHead::of(__int_as_float(largest_of_block(bits, scratch)), false);
#pragma unroll
  for (int i = 0; i < kForwardTokens / kThreads; ++i) {
    const int token = part * kForwardTokens + i * kThreads + static_cast<int>(threadIdx.x);
    if (token >= p.tokens) break;
    const int64_t index = static_cast<int64_t>(problem) * p.tokens + token;
    ForwardToken value{0, 0};
    if (is_real(p.mask, p.tokens, batch, token)) value = head.value(p.own[index].teacher);
    p.token_values[index] = value;
  }
  if (part == 0 && threadIdx.x == 0) {
    p.centers[problem] = head.center;
    p.wide_heads[problem] = head.is_wide ? 1 : 0;
  }
}

// --- before the backward ---------------------------------------------------------------------------------------------

/// Farthest apart that the two log-sum-exps of a row may lie, nats: 2^(s - t) must not overflow where a probability is
/// left.
constexpr float kLargestShift = 40.f;
/// A row's weight, with the ratio of its probabilities or without, lies within 2 to this power and its inverse.
constexpr float kLargestPower = 122.f;

constexpr int kLargestParts = 8;  ///< blocks that share a head; each looks for the extremes of all of it
constexpr int kPartTokens = 256;  ///< of a block, where there are fewer than that many

__host__ __device__ int parts_of_head(int tokens) {
  const int parts = (tokens + kPartTokens - 1) / kPartTokens;
  return parts < kLargestParts ? parts : kLargestParts;
}

/// What a head's rows have in common.
struct Extremes {
  float highest;  ///< lse_t
  float lowest;
  float shift;          ///< |lse_s - lse_t|
  float largest_grad;   ///< |upstream gradient|
  float smallest_grad;  ///< but for zeros; infinite where there are no others
};

constexpr int kExtremes = 5;

/// Whether float holds the values of all tokens.
__device__ bool fits(const Extremes& head, float scale) {
  const float spread = head.highest - head.lowest;
  if (!(spread < kLargestSpread && head.shift < kLargestShift)) return false;
  const float reach = (spread / 4 + head.shift) * kLog2E + kHeadroom / 2;
  return log2f(head.largest_grad * scale) + reach < kLargestPower &&
         log2f(head.smallest_grad * scale) - reach > -kLargestPower;
}

/// Whether it does without biases that depend on the token.
__device__ bool is_plain(const Extremes& head, float scale) {
  const float spread = head.highest - head.lowest;
  if (!(spread < kPlainReach && head.shift < kLargestShift)) return false;
  const float shift = head.shift * kLog2E;
  return log2f(head.largest_grad * scale) + spread * kLog2E - kPlainHighest + shift < kLargestPower &&
         log2f(head.smallest_grad * scale) - kPlainHighest - shift > -kLargestPower;
}

/// @param rows of the head's relation
__device__ Extremes extremes_of_head(const PrepareBackwardParams& p,
                                     const RowGradients& rows,
                                     const Place& place,
                                     float (&scratch)[kWarpsOfBlock][kExtremes]) {
  const int tokens = p.visibility.rows;
  const int64_t first = static_cast<int64_t>(place.problem) * tokens;
  float highest = -INFINITY;
  float negated_lowest = -INFINITY;
  float shift = 0;
  float largest_grad = 0;
  float negated_smallest = -INFINITY;
#pragma unroll 4
  for (int token = static_cast<int>(threadIdx.x); token < tokens; token += kThreads) {
    const bool real = is_real(p.visibility.row_mask, tokens, place.batch, token);
    const float lse = rows.lse_teacher[first + token];
    const float moved = fabsf(rows.lse_student[first + token] - lse);
    highest = real ? fmaxf(highest, lse) : highest;
    negated_lowest = real ? fmaxf(negated_lowest, -lse) : negated_lowest;
    shift = real ? fmaxf(shift, moved) : shift;
    const float grad = real ? fabsf(rows.grad_kl[rows.one_grad ? 0 : first + token]) : 0.f;
    largest_grad = fmaxf(largest_grad, grad);
    negated_smallest = grad > 0 ? fmaxf(negated_smallest, -grad) : negated_smallest;
  }
  float extremes[kExtremes] = {highest, negated_lowest, shift, largest_grad, negated_smallest};
  take_largest_of_block(extremes, scratch);
  return {extremes[0], -extremes[1], extremes[2], extremes[3], -extremes[4]};
}

/// The first blocks make values of tokens, the others zeros.
__global__ void __launch_bounds__(kThreads) prepare_backward_kernel(const __grid_constant__ PrepareBackwardParams p) {
  __shared__ float scratch[kWarpsOfBlock][kExtremes];
  const int tokens = p.visibility.rows;
  const int parts = parts_of_head(tokens);
  const int64_t head_blocks = static_cast<int64_t>(parts) * p.group.problems;
  wait_for_kernels_ahead();
  let_next_kernel_begin();
  if (blockIdx.x >= head_blocks) {
    write_zeros<kThreads>(p.gradient, p.gradient_floats, blockIdx.x - head_blocks);
    return;
  }
  const int problem = static_cast<int>(blockIdx.x) / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const Place place = place_of(p.group, problem);
  const RowGradients rows = p.rows[place.relation];
  const int64_t first = static_cast<int64_t>(place.problem) * tokens;
  const int64_t first_value = static_cast<int64_t>(problem) * tokens;
  const Extremes head = extremes_of_head(p, rows, place, scratch);
  const float center = (head.highest + head.lowest) / 4 * kLog2E;
  const float scale = half_range_scale(rows.largest_grad);
  const bool plain = p.plain_heads != nullptr && is_plain(head, scale);
  const float reference = head.highest * kLog2E - kPlainHighest;  // C
  for (int token = part * kThreads + static_cast<int>(threadIdx.x); token < tokens; token += parts * kThreads) {
    const float grad = rows.grad_kl[rows.one_grad ? 0 : first + token];
    if (rows.row_grads != nullptr) rows.row_grads[first + token] = grad;
    BackwardToken value{0, 0, 0, 0};
    if (is_real(p.visibility.row_mask, tokens, place.batch, token)) {
      const float lse = rows.lse_teacher[first + token];
      // A row that sees one key has no divergence, whatever it is.
      const bool has_gradient = keys_of_row(p.visibility, place.batch, token).count > 1;
      const float weight = has_gradient ? grad * scale : 0.f;
      if (plain) {
        value.bias = reference / 2;
        value.key = 1;
        value.row = weight * exp2f(reference - lse * kLog2E);
      } else {
        const float half = lse / 2 * kLog2E;
        value.bias = half - kHeadroom / 2;
        value.key = exp2f(half - center - kHeadroom / 2);
        value.row = weight * exp2f(center - half - kHeadroom / 2);
      }
      value.row_ratio = value.row * exp2f((lse - rows.lse_student[first + token]) * kLog2E);
    }
    p.token_values[first_value + token] = value;
  }
  if (part != 0) return;
  if (threadIdx.x == 0) {
    p.wide_heads[problem] = fits(head, scale) ? 0 : 1;
    if (p.plain_heads != nullptr) p.plain_heads[problem] = plain ? 1 : 0;
    if (place.problem == 0) rows.redo[0] = 0;
  }
  const int blocks = blocks_of_head(tokens);
  for (int block = static_cast<int>(threadIdx.x); block < blocks; block += kThreads)
    rows.redo[1 + static_cast<int64_t>(place.problem) * blocks + block] = 0;
}

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
cudaError_t launch_own_logits(const PrepareForwardParams& params, cudaStream_t stream) {
  const int chunks = params.vectors.teacher[0].dim / kChunk;
  const auto kernel = chunks % (4 * kLanes) == 0   ? own_logits_kernel<T, 4>
                      : chunks % (2 * kLanes) == 0 ? own_logits_kernel<T, 2>
                                                   : own_logits_kernel<T, 1>;
  const int64_t blocks = int64_t{params.group.problems} * quotient_up(params.tokens, kRedoRows);
  return launch_overlapping_blocks(kernel, params, blocks, kThreads, 0, stream);
}

}  // namespace

cudaError_t prepare_forward(const PrepareForwardParams& params, cudaStream_t stream) {
  const cudaError_t error = params.vectors.teacher[0].type == Scalar::kHalf
                                ? launch_own_logits<__half>(params, stream)
                                : launch_own_logits<__nv_bfloat16>(params, stream);
  if (error != cudaSuccess || params.references != nullptr) return error;
  const int64_t blocks = int64_t{params.group.problems} * quotient_up(params.tokens, kForwardTokens);
  return launch_overlapping_blocks(forward_tokens_kernel, params, blocks, kThreads, 0, stream);
}

cudaError_t prepare_backward(const PrepareBackwardParams& params, cudaStream_t stream) {
  const int64_t head_blocks = int64_t{params.group.problems} * parts_of_head(params.visibility.rows);
  const int64_t blocks = head_blocks + zero_blocks(params.gradient_floats, kThreads);
  return launch_overlapping_blocks(prepare_backward_kernel, params, blocks, kThreads, 0, stream);
}

}  // namespace linearard::cuda::triangular
