#include "model_directory.h"

#include <map>
#include <memory>
#include <ostream>
#include <sstream>
#include <string>
#include <system_error>

#include <ATen/ATen.h>

#include "files.h"
#include "safetensors.h"
#include "user_error.h"

namespace ard {
namespace {

namespace fs = std::filesystem;

// The file of every tensor of a model that is stored in several; empty for a model in one file.
std::map<std::string, std::string> weight_map(const fs::path& directory) {
  const fs::path index = directory / "model.safetensors.index.json";
  if (!fs::exists(index)) return {};
  const auto json = nlohmann::json::parse(read_text(index), nullptr, false);
  try {
    return json.at("weight_map").get<std::map<std::string, std::string>>();
  } catch (const nlohmann::json::exception&) {
    throw UserError("'" + index.string() + "' has no weight_map");
  }
}

std::string text(at::IntArrayRef shape) {
  std::ostringstream stream;
  stream << shape;
  return stream.str();
}

// What a model directory holds besides weights and configuration: tokenizer, chat template, generation settings.
bool belongs_to_the_tokenizer(const fs::directory_entry& entry) {
  const std::string name = entry.path().filename().string();
  const std::string extension = entry.path().extension().string();
  const bool kind = extension == ".json" || extension == ".jinja" || extension == ".txt" || extension == ".model";
  return entry.is_regular_file() && kind && name != "config.json" && name != "model.safetensors.index.json";
}

}  // namespace

void load_weights(Llama& model, const fs::path& directory) {
  const at::NoGradGuard no_grad;
  const std::map<std::string, std::string> map = weight_map(directory);
  std::map<std::string, std::unique_ptr<SafetensorsFile>> files;
  for (auto& parameter : model->named_parameters()) {
    const std::string& name = parameter.key();
    const auto place = map.find(name);
    const std::string file = place == map.end() ? "model.safetensors" : place->second;
    auto& opened = files[file];
    if (!opened) opened = std::make_unique<SafetensorsFile>(directory / file);
    const at::Tensor weight = opened->tensor(name);
    if (weight.sizes() != parameter.value().sizes()) {
      throw UserError("the tensor '" + name + "' of '" + (directory / file).string() + "' has the shape " +
                      text(weight.sizes()) + ", config.json says " + text(parameter.value().sizes()));
    }
    parameter.value().copy_(weight);
  }
}

void save_model(const Llama& model, const ModelConfig& config, const fs::path& source, const fs::path& target) {
  fs::path staging = target;
  staging += ".incomplete";
  fs::remove_all(staging);
  try {
    fs::create_directories(staging);
    NamedTensors tensors;
    for (const auto& parameter : model->named_parameters())
      tensors.emplace_back(parameter.key(), parameter.value());
    write_safetensors(staging / "model.safetensors", tensors, {{"format", "pt"}});  // which transformers asks for
    nlohmann::json json = config.json;
    json.erase("torch_dtype");
    json["dtype"] = "float32";
    write_atomically(staging / "config.json", [&](std::ostream& stream) { stream << json.dump(2) << '\n'; });
    for (const auto& entry : fs::directory_iterator(source)) {
      if (belongs_to_the_tokenizer(entry)) fs::copy_file(entry.path(), staging / entry.path().filename());
    }
    fs::remove_all(target);  // of the run that was resumed
    fs::rename(staging, target);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(staging, ignored);
    throw;
  }
}

}  // namespace ard
