#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>

#include "arguments.h"

// The attention kernels on the CPU. There is no symmetry between queries and keys: the forward gives each block of
// rows to one task, the backward runs through a Latin square of tiles.

namespace linearard::cpu {

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(const AttentionArguments& arguments);

std::tuple<at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad_kl,
                                                      const at::Tensor& lse_student,
                                                      const at::Tensor& lse_teacher,
                                                      const AttentionArguments& arguments);

}  // namespace linearard::cpu
