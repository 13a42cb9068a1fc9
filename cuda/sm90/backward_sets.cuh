#pragma once

#include "backward.cuh"
#include "rows.h"
#include "rows_pairs.cuh"

namespace linearard::cuda::sm90 {

struct SetsBackwardArguments {
  CUtensorMap own_student;
  CUtensorMap own_teacher;
  CUtensorMap other_student;
  CUtensorMap other_teacher;
  CUtensorMap gradient;  ///< sums of the keys
  RowsBackwardParams params;
  Schedule schedule;
};

/// G K and G^T Q of two sets: owners are rows, others the keys that they see. A row's gradient is complete at the end
/// of its walk and is written at once; a key's is added by the rows of all heads that share it. Not the other way
/// round: with shared keys, sums in float of the rows are larger than those of the keys, and a row's value would be
/// read with each of its pairs.
struct SetsForm {
  using Arguments = SetsBackwardArguments;
  using Params = RowsBackwardParams;
  using Value = RowToken;
  using Terms = RowTerms<Pairs::kQueries>;
  static constexpr bool kOtherValues = false;
  static constexpr bool kAddsOwners = false;
  static constexpr int kRegisterChunks = 2;

  __device__ static bool is_left_out(const Params& /*p*/, int /*head*/) { return false; }
  __device__ static bool is_plain(const Params& /*p*/, int /*head*/) { return false; }
  __device__ static int end_of_walk(const Params& p, int end_of_owners) {
    return p.causal ? max(0, min(p.others, end_of_owners + p.offset)) : p.others;
  }
  __device__ static int head_of_sums(const Params& p, int head) { return head / p.group; }

  /// Rows that see no key.
  template <typename T, int kOwners>
  __device__ static void finish_empty(const Params& p, const BackwardPlan& plan) {
    constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
    const int64_t pieces_of_vector = p.own_student.dim / kPiece;
    auto* const to =
        static_cast<uint4*>(p.gradient) + (static_cast<int64_t>(plan.head) * p.owners + plan.first) * pieces_of_vector;
    const int pieces = min(kOwners, p.owners - plan.first) * static_cast<int>(pieces_of_vector);
    for (int piece = static_cast<int>(threadIdx.x); piece < pieces; piece += kThreads)
      to[piece] = uint4{0, 0, 0, 0};
  }

  __device__ static BackwardSources sources_of(const Arguments& arguments, int head) {
    const Params& p = arguments.params;
    const int batch = head / p.heads;
    const int own = head % p.heads;
    const int other = own / p.group;
    return {{&arguments.own_student, batch, own},
            {&arguments.own_teacher, batch, own},
            {&arguments.other_student, batch, other},
            {&arguments.other_teacher, batch, other}};
  }

  __device__ static Value own_value(const Params& p, int head, int token) {
    if (token >= p.owners) return {0.f, 0.f, 0.f, 0.f};
    return static_cast<const Value*>(p.own_values)[static_cast<int64_t>(head) * p.owners + token];
  }

  template <typename T, int kElements>
  __device__ static void weigh(const Params& p,
                               bool /*is_plain*/,
                               const float (&student)[kElements],
                               const float (&teacher)[kElements],
                               const Value (&rows)[2],
                               const Value* columns,
                               int first_row,
                               int first_column,
                               uint32_t (&h)[kElements / 8][4]) {
    const Terms terms(p, rows, first_row + row_of_thread());
    float unused[2] = {0.f, 0.f};
    if (terms.enter(p, first_row, first_column)) {
      weigh_row_pairs<T, true>(student, teacher, terms, columns, first_column + column_of_thread(), h, unused);
    } else {
      weigh_row_pairs<T, false>(student, teacher, terms, columns, 0, h, unused);
    }
  }
};

}  // namespace linearard::cuda::sm90
