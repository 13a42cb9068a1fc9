#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "arguments.h"
#include "logit_form.h"

// The same mathematics as in src/cpu, in ATen operators on blocks of rows: it serves every device that has no kernels
// of its own, in linear memory, and needs no compiler for that device.

namespace linearard::aten {

/// The vectors of one side of the products, packed: [G, n, D] of the compute dtype, G heads.
struct Vectors {
  at::Tensor student;
  at::Tensor teacher;
  at::Tensor scaled_student;  ///< difference form only, see LogitForm
  at::Tensor difference;      ///< difference form only
};

Vectors pack_vectors(const at::Tensor& student, const at::Tensor& teacher, const LogitForm& form);

/// Which keys the rows see: the leading visible[i] ones; undefined: all.
struct Visibility {
  at::Tensor visible;     ///< [rows] int64 on the device
  bool relation = false;  ///< rows and keys are the same vectors: the diagonal is G_ii = -(sum of the others)
};

struct DivergenceOptions {
  Divergence divergence = Divergence::kForwardKL;
  double beta = 0.5;
  int64_t block_elements = int64_t{1} << 24;  ///< largest number of logits in a block of rows
};

struct RowValues {
  at::Tensor kl;           ///< [G, rows] of the compute dtype
  at::Tensor lse_student;  ///< [G, rows]
  at::Tensor lse_teacher;  ///< [G, rows]
};

RowValues divergence_forward(const LogitForm& form,
                             const DivergenceOptions& options,
                             const Vectors& rows,
                             const Vectors& keys,
                             const Visibility& visibility);

struct Gradients {
  at::Tensor rows;  ///< [G, rows, Ds], of the packed student vectors, without their scale
  at::Tensor keys;  ///< [G, keys, Ds]
};

/// @param statistics log-sum-exps of the forward, @param weight upstream gradient [G, rows]
Gradients divergence_backward(const LogitForm& form,
                              const DivergenceOptions& options,
                              const Vectors& rows,
                              const Vectors& keys,
                              const Visibility& visibility,
                              const RowValues& statistics,
                              const at::Tensor& weight);

/// log sum exp of the teacher's side only, [G, rows].
at::Tensor lse_forward(const LogitForm& form, const Vectors& vectors, const Visibility& visibility);

}  // namespace linearard::aten
