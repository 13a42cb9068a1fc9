#include "checkpoint.h"

#include <algorithm>
#include <memory>
#include <sstream>
#include <vector>

#include <ATen/ATen.h>

#include "user_error.h"

namespace ard {
namespace {

namespace fs = std::filesystem;

const std::string kPrefix = "checkpoint-";
const std::string kSuffix = ".safetensors";
constexpr int kDigits = 8;  // so that the order of the names is the order of the steps

torch::optim::AdamWParamState* state_of(torch::optim::AdamW& optimizer, const at::Tensor& parameter) {
  const auto found = optimizer.state().find(parameter.unsafeGetTensorImpl());
  return found == optimizer.state().end() ? nullptr : static_cast<torch::optim::AdamWParamState*>(found->second.get());
}

std::vector<fs::path> checkpoints(const fs::path& directory) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kPrefix) && name.ends_with(kSuffix)) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

// The settings have to be those of the run that is continued, or its loss curve would not be.
void check_settings(const SafetensorsFile& file, const std::string& what, const nlohmann::json& settings) {
  const auto& metadata = file.metadata();
  if (metadata.count("step") == 0 || metadata.count("settings") == 0) {
    throw UserError(what + " was not written by this program");
  }
  const auto saved = nlohmann::json::parse(metadata.at("settings"), nullptr, false);
  for (const auto& [name, value] : settings.items()) {
    const nlohmann::json before = saved.is_object() ? saved.value(name, nlohmann::json()) : nlohmann::json();
    if (before != value) {
      throw UserError(what + " belongs to a run with " + name + " " + before.dump() + ", not " + value.dump());
    }
  }
}

at::Tensor like(const SafetensorsFile& file,
                const std::string& what,
                const std::string& name,
                const at::Tensor& model) {
  at::Tensor tensor = file.tensor(name);
  if (tensor.sizes() != model.sizes()) {
    std::ostringstream message;
    message << what << " has '" << name << "' of shape " << tensor.sizes() << ", the model " << model.sizes();
    throw UserError(message.str());
  }
  return tensor.to(model.device(), model.scalar_type());
}

}  // namespace

fs::path checkpoint_path(const fs::path& directory, int64_t step) {
  std::string digits = std::to_string(step);
  digits.insert(0, std::max<size_t>(kDigits, digits.size()) - digits.size(), '0');
  return directory / (kPrefix + digits + kSuffix);
}

void save_checkpoint(const fs::path& path,
                     const NamedTensors& parameters,
                     torch::optim::AdamW& optimizer,
                     int64_t step,
                     const nlohmann::json& settings) {
  NamedTensors tensors;
  for (const auto& [name, parameter] : parameters) {
    tensors.emplace_back("parameter." + name, parameter);
    if (const auto* state = state_of(optimizer, parameter)) {
      tensors.emplace_back("exp_avg." + name, state->exp_avg());
      tensors.emplace_back("exp_avg_sq." + name, state->exp_avg_sq());
    }
  }
  write_safetensors(path, tensors, {{"step", std::to_string(step)}, {"settings", settings.dump()}});
}

int64_t load_checkpoint(const fs::path& path,
                        const NamedTensors& parameters,
                        torch::optim::AdamW& optimizer,
                        const nlohmann::json& settings) {
  const SafetensorsFile file(path);
  const std::string what = "the checkpoint '" + path.string() + "'";
  check_settings(file, what, settings);
  const int64_t step = std::stoll(file.metadata().at("step"));
  NamedTensors restored;
  std::vector<std::unique_ptr<torch::optim::AdamWParamState>> states;
  for (const auto& [name, parameter] : parameters) {
    restored.emplace_back(name, like(file, what, "parameter." + name, parameter));
    states.push_back(nullptr);
    if (!file.contains("exp_avg." + name)) continue;  // a parameter that never had a gradient
    states.back() = std::make_unique<torch::optim::AdamWParamState>();
    states.back()->step(step);
    states.back()->exp_avg(like(file, what, "exp_avg." + name, parameter));
    states.back()->exp_avg_sq(like(file, what, "exp_avg_sq." + name, parameter));
  }
  const at::NoGradGuard no_grad;
  for (size_t index = 0; index < parameters.size(); ++index) {
    const at::Tensor& parameter = parameters[index].second;
    parameter.copy_(restored[index].second);
    if (states[index]) optimizer.state()[parameter.unsafeGetTensorImpl()] = std::move(states[index]);
  }
  return step;
}

fs::path last_checkpoint(const fs::path& directory) {
  const std::vector<fs::path> found = fs::is_directory(directory) ? checkpoints(directory) : std::vector<fs::path>{};
  if (found.empty()) throw UserError("there is no checkpoint to resume from in '" + directory.string() + "'");
  return found.back();
}

void remove_old_checkpoints(const fs::path& directory, int64_t limit) {
  std::vector<fs::path> found = checkpoints(directory);
  const auto kept = std::min(found.size(), static_cast<size_t>(limit));
  found.resize(found.size() - kept);
  for (const fs::path& path : found)
    fs::remove(path);
}

}  // namespace ard
