#include <linearard/options.h>

#include <c10/util/Exception.h>

namespace linearard {

Divergence parse_divergence(std::string_view name, std::string_view operator_name) {
  if (name == "forward_kl") return Divergence::kForwardKL;
  if (name == "reverse_kl") return Divergence::kReverseKL;
  if (name == "jsd") return Divergence::kJSD;
  TORCH_CHECK(false, operator_name, ": divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got '", name, "'");
}

Reduction parse_reduction(std::string_view name, std::string_view operator_name) {
  if (name == "none") return Reduction::kNone;
  if (name == "sum") return Reduction::kSum;
  if (name == "mean") return Reduction::kMean;
  TORCH_CHECK(false, operator_name, ": reduction must be 'none', 'sum' or 'mean', got '", name, "'");
}

std::string_view to_string(Divergence divergence) {
  switch (divergence) {
    case Divergence::kReverseKL:
      return "reverse_kl";
    case Divergence::kJSD:
      return "jsd";
    case Divergence::kForwardKL:
      break;
  }
  return "forward_kl";
}

std::string_view to_string(Reduction reduction) {
  switch (reduction) {
    case Reduction::kNone:
      return "none";
    case Reduction::kSum:
      return "sum";
    case Reduction::kMean:
      break;
  }
  return "mean";
}

}  // namespace linearard
