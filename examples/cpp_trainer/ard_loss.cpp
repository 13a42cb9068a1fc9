#include "ard_loss.h"

#include <cmath>
#include <cstdlib>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <linearard/linearard.h>

#include "user_error.h"

namespace ard {
namespace {

// Under autocast in its dtype, as autocast does for every matrix product: RoPE leaves float32 behind.
at::Tensor operand(const at::Tensor& states) {
  const auto device = states.device().type();
  return at::autocast::is_autocast_enabled(device) ? states.to(at::autocast::get_autocast_dtype(device)) : states;
}

at::Tensor divergence(const std::string& relation,
                      const LayerStates& student,
                      const LayerStates& teacher,
                      bool causal,
                      double attention_factor) {
  const auto options = linearard::RelationOptions{}.causal(causal);
  if (relation == "value") return linearard::relation_kl(operand(student.value), operand(teacher.value), options);
  // Not by the scales of the operators: on a GPU the fastest kernels need one scale for both sides.
  const auto without_factor = [=](const at::Tensor& states) {
    return operand(attention_factor == 1 ? states : states / attention_factor);
  };
  if (relation == "attention") {
    return linearard::attention_kl(without_factor(student.query), without_factor(student.key), operand(teacher.query),
                                   operand(teacher.key));
  }
  const bool of_queries = relation == "query";
  return linearard::relation_kl(without_factor(of_queries ? student.query : student.key),
                                operand(of_queries ? teacher.query : teacher.key), options);
}

}  // namespace

Relations parse_relations(const std::vector<std::string>& items) {
  Relations relations;
  for (const std::string& item : items) {
    const auto colon = item.find(':');
    const std::string name = item.substr(0, colon);
    double weight = 1.0;
    if (colon != std::string::npos) {
      char* end = nullptr;
      weight = std::strtod(item.c_str() + colon + 1, &end);
      if (*end != '\0') weight = -1.0;
    }
    const bool known = name == "query" || name == "key" || name == "value" || name == "attention";
    if (!known || !(weight > 0) || std::isinf(weight)) {
      throw UserError("unknown relation '" + item +
                      "': write query, key, value, attention, or name:weight, weight > 0");
    }
    if (!relations.emplace(name, weight).second) throw UserError("the relation '" + name + "' is given twice");
  }
  if (relations.empty()) throw UserError("no relation is given; choose among query, key, value, attention");
  return relations;
}

at::Tensor ard_loss(const std::vector<LayerStates>& student,
                    const std::vector<LayerStates>& teacher,
                    const Relations& relations,
                    bool causal,
                    double attention_factor) {
  at::Tensor loss;
  for (size_t layer = 0; layer < student.size(); ++layer) {
    for (const auto& [relation, weight] : relations) {
      const at::Tensor term = weight * divergence(relation, student[layer], teacher[layer], causal, attention_factor);
      loss = loss.defined() ? loss + term : term;
    }
  }
  return loss / static_cast<double>(student.size());
}

}  // namespace ard
