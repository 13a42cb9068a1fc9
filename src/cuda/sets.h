#pragma once

#include <optional>

#include "cuda/triangular.h"

// The host side of the Hopper kernels of two sets: the pair form and the forward KL without padding.

namespace linearard::cuda {

/// Writes the rows of a problem. Empty where the kernels do not take it; nothing is written then.
/// @param params of the dense kernels, without outputs
std::optional<ListedRows> sets_forward(const Problem& problem, ForwardParams params, const RowTensors& to);

/// Writes the gradient of the owners of `params`. False where the kernels do not take it; nothing is written then.
bool sets_backward(const Problem& problem, const BackwardParams& params);

/// Whether the gradients of rows and keys come out of one pass over the pairs: not of deterministic calls, and not
/// where keys outnumber the rows.
bool takes_both_sets(const Problem& problem, const BackwardParams& rows, const BackwardParams& keys);

/// Writes both. The marks are clear before.
void both_sets_backward(const Problem& problem, const BackwardParams& rows, const BackwardParams& keys);

}  // namespace linearard::cuda
