#pragma once

#include "../triangular/group.cuh"
#include "backward.cuh"

namespace linearard::cuda::sm90 {

struct BackwardArguments {
  CUtensorMap student[kLargestGroup];  ///< of the relations
  CUtensorMap teacher[kLargestGroup];
  CUtensorMap token_values;  ///< of all problems
  CUtensorMap gradient;
  TriangularBackwardParams params;
  Schedule schedule;
};

/// H X of the triangular backward: others are all earlier tokens and the owners. Both sums are added. A pair of a token
/// with itself is met by both products, so each gets half of it.
struct RelationForm {
  using Arguments = BackwardArguments;
  using Params = TriangularBackwardParams;
  using Value = BackwardToken;
  static constexpr bool kOtherValues = true;
  static constexpr bool kAddsOwners = true;
  static constexpr int kRegisterChunks = 1;

  __device__ static bool is_left_out(const Params& p, int head) { return p.wide_heads[head] != 0; }
  __device__ static bool is_plain(const Params& p, int head) {
    return p.plain_heads != nullptr && p.plain_heads[head] != 0;
  }
  __device__ static int end_of_walk(const Params& p, int end_of_owners) { return min(end_of_owners, p.tokens); }
  template <typename T, int kOwners>
  __device__ static void finish_empty(const Params& /*p*/, const BackwardPlan& /*plan*/) {}
  __device__ static int head_of_sums(const Params& /*p*/, int head) { return head; }

  __device__ static BackwardSources sources_of(const Arguments& arguments, int head) {
    const triangular::Place place = triangular::place_of(arguments.params.group, head);
    const BackwardSource student{&arguments.student[place.relation], place.batch, place.head};
    const BackwardSource teacher{&arguments.teacher[place.relation], place.batch, place.head};
    return {student, teacher, student, teacher};
  }

  __device__ static Value own_value(const Params& p, int head, int token) {
    Value value{0.f, 0.f, 0.f, 0.f};
    if (token < p.tokens) value = p.token_values[static_cast<int64_t>(head) * p.tokens + token];
    // Causal, a pair has no term in the row of its earlier token: as a row, this token is no key.
    if (p.causal) value.key = 0.f;
    return value;
  }

  template <typename T, int kElements>
  __device__ static void weigh(const Params& p,
                               bool is_plain,
                               const float (&student)[kElements],
                               const float (&teacher)[kElements],
                               const Value (&rows)[2],
                               const Value* columns,
                               int first_row,
                               int first_column,
                               uint32_t (&h)[kElements / 8][4]) {
    const ElementFactors factors(p.factors);
    const PairWeights weights{{factors}};
    const Diagonal diagonal{first_row + row_of_thread() - first_column - column_of_thread()};
    const bool is_whole = first_column + kTileTokens <= first_row;
    if (is_plain && is_whole && first_row + kTileTokens <= p.tokens) {
      const float reference = 2 * rows[0].bias;
      if (p.causal) {
        weigh_pairs<T, false>(student, teacher, PlainPairWeights<false>{factors, reference}, rows, columns, diagonal,
                              1.f, h);
      } else {
        weigh_pairs<T, false>(student, teacher, PlainPairWeights<true>{factors, reference}, rows, columns, diagonal,
                              1.f, h);
      }
    } else if (is_whole) {
      weigh_pairs<T, false>(student, teacher, weights, rows, columns, diagonal, 1.f, h);
    } else {
      weigh_pairs<T, true>(student, teacher, weights, rows, columns, diagonal, p.causal ? 1.f : 0.5f, h);
    }
  }
};

}  // namespace linearard::cuda::sm90
