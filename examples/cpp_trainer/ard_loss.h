#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "llama.h"

namespace ard {

/// Weights by relation: query, key, value (self-relations), attention (the causal map of queries and keys).
using Relations = std::map<std::string, double>;

/// Weights from names such as `query` or `attention:0.5`; a missing weight is 1. UserError for anything else.
Relations parse_relations(const std::vector<std::string>& items);

/// The loss of LinearARD (arXiv 2604.00004), a scalar, nats per token and head: in each layer the weighted sum of the
/// divergences KL(teacher || student) of the relations, then the mean over the layers.
/// causal: whether self-relations see only earlier tokens; attention_factor: of the student's RoPE, divided out of its
/// queries and keys.
at::Tensor ard_loss(const std::vector<LayerStates>& student,
                    const std::vector<LayerStates>& teacher,
                    const Relations& relations,
                    bool causal,
                    double attention_factor);

}  // namespace ard
