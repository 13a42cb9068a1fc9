#include "model_config.h"

#include <cmath>
#include <map>
#include <sstream>

#include "files.h"
#include "user_error.h"

namespace ard {
namespace {

using nlohmann::json;

// A value of config.json by key, or the default where there is none (or null, which transformers writes too).
template <typename T>
T value_of(const json& config, const char* key, const std::optional<T>& fallback = std::nullopt) {
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) {
    if (fallback) return *fallback;
    throw UserError(std::string("config.json lacks ") + key);
  }
  try {
    return found->template get<T>();
  } catch (const json::exception&) {
    throw UserError(std::string("config.json has an unusable value of ") + key + ": " + found->dump());
  }
}

int64_t positive(const json& config, const char* key, std::optional<int64_t> fallback = std::nullopt) {
  const auto value = value_of<int64_t>(config, key, fallback);
  if (value < 1)
    throw UserError(std::string("config.json: ") + key + " must be positive, got " + std::to_string(value));
  return value;
}

void expect(const json& config, const char* key, const json& expected) {
  const auto found = config.find(key);
  if (found != config.end() && *found != expected) {
    throw UserError(std::string("this program knows Llama models with ") + key + " " + expected.dump() +
                    " only, config.json has " + found->dump());
  }
}

// transformers 5 keeps everything in rope_parameters; before, theta was apart and the rest in rope_scaling.
RopeParameters rope_parameters(const json& config) {
  json parameters = config.value("rope_parameters", json());
  if (parameters.is_null()) parameters = config.value("rope_scaling", json());
  if (parameters.is_null()) parameters = json::object();
  if (!parameters.is_object()) throw UserError("config.json: the RoPE parameters are not an object");
  RopeParameters rope;
  const auto type = value_of<std::string>(parameters, "type", rope.type);
  rope.type = value_of<std::string>(parameters, "rope_type", type);
  rope.theta = value_of<double>(parameters, "rope_theta", value_of<double>(config, "rope_theta", rope.theta));
  if (rope.type == "default") return rope;
  if (rope.type != "linear" && rope.type != "yarn") {
    throw UserError("this program knows the RoPE types default, linear and yarn, config.json has '" + rope.type + "'");
  }
  rope.factor = value_of<double>(parameters, "factor");
  rope.beta_fast = value_of<double>(parameters, "beta_fast", rope.beta_fast);
  rope.beta_slow = value_of<double>(parameters, "beta_slow", rope.beta_slow);
  if (parameters.contains("attention_factor") && !parameters["attention_factor"].is_null()) {
    rope.attention_factor = value_of<double>(parameters, "attention_factor");
  }
  rope.original_context = value_of<double>(parameters, "original_max_position_embeddings",
                                           value_of<double>(config, "max_position_embeddings", 2048.0));
  return rope;
}

ModelConfig parse(const json& config) {
  if (value_of<std::string>(config, "model_type", std::string()) != "llama") {
    throw UserError("this program knows models of the type llama only, config.json has " +
                    config.value("model_type", json()).dump());
  }
  expect(config, "hidden_act", "silu");
  expect(config, "attention_bias", false);
  expect(config, "mlp_bias", false);
  ModelConfig model;
  model.hidden_size = positive(config, "hidden_size");
  model.intermediate_size = positive(config, "intermediate_size");
  model.layers = positive(config, "num_hidden_layers");
  model.heads = positive(config, "num_attention_heads");
  model.key_value_heads = positive(config, "num_key_value_heads", model.heads);
  model.head_dim = positive(config, "head_dim", model.hidden_size / model.heads);
  model.vocabulary_size = positive(config, "vocab_size");
  model.context = positive(config, "max_position_embeddings", 2048);
  model.norm_epsilon = value_of<double>(config, "rms_norm_eps", 1e-6);
  model.tied_embeddings = value_of<bool>(config, "tie_word_embeddings", false);
  if (model.heads % model.key_value_heads != 0 || model.head_dim % 2 != 0) {
    throw UserError("config.json: num_attention_heads must be a multiple of num_key_value_heads, and head_dim even");
  }
  model.rope = rope_parameters(config);
  model.json = config;
  return model;
}

double number(const std::string& text, const std::string& what) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value))
    throw UserError(what + " must be a number, got '" + text + "'");
  return value;
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "config.json";
  const json config = json::parse(read_text(path), nullptr, false);
  if (!config.is_object()) throw UserError("'" + path.string() + "' is not a JSON object");
  return parse(config);
}

ModelConfig scale_rope(const ModelConfig& native, const std::string& scaling) {
  if (native.rope.type != "default") {
    throw UserError("the model's RoPE is scaled already (" + native.rope.type +
                    "): start from the model with its native RoPE");
  }
  std::istringstream parts(scaling);
  std::string head;
  std::getline(parts, head, ',');
  const std::string type = head.substr(0, head.find(':'));
  const std::string what = "the factor of the RoPE scaling '" + scaling + "'";
  if (type != "linear" && type != "ntk" && type != "yarn") {
    throw UserError("unknown RoPE scaling '" + scaling + "': write linear, ntk or yarn and a factor: linear:4");
  }
  const double factor = number(head.find(':') == std::string::npos ? "" : head.substr(head.find(':') + 1), what);
  if (factor <= 1) throw UserError(what + " must be larger than 1, got " + std::to_string(factor));

  json parameters = {{"rope_theta", native.rope.theta}, {"rope_type", type}, {"factor", factor}};
  if (type == "ntk") {
    const auto dimension = static_cast<double>(native.head_dim);
    parameters = {{"rope_theta", native.rope.theta * std::pow(factor, dimension / (dimension - 2))},
                  {"rope_type", "default"}};
  }
  if (type == "yarn") parameters["original_max_position_embeddings"] = native.context;
  for (std::string pair; std::getline(parts, pair, ',');) {
    const std::string name = pair.substr(0, pair.find('='));
    if (type != "yarn" || (name != "beta_fast" && name != "beta_slow" && name != "attention_factor")) {
      throw UserError("unknown option '" + name + "' of the RoPE scaling '" + scaling + "'");
    }
    parameters[name] = number(pair.substr(std::min(pair.size(), name.size() + 1)), "'" + name + "'");
  }
  json config = native.json;
  config.erase("rope_theta");
  config.erase("rope_scaling");
  config["rope_parameters"] = parameters;
  config["max_position_embeddings"] = std::llround(static_cast<double>(native.context) * factor);
  return parse(config);
}

}  // namespace ard
