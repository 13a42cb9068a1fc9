#pragma once

#include <ATen/core/Tensor.h>

namespace linearard::benchmarks {

/// What relation_kl replaces: N x N logits, log_softmax and the divergence as ATen operators, mean over rows and heads;
/// autograd supplies the backward. Written as a PyTorch user would, with the teacher outside of the graph.
at::Tensor naive_relation_kl(const at::Tensor& student, const at::Tensor& teacher, bool causal);

/// Bytes of the N x N tensors that are alive at its peak: 5 (measured), and one more for a causal mask. Used to skip
/// what does not fit.
double naive_peak_bytes(const at::Tensor& student);

}  // namespace linearard::benchmarks
