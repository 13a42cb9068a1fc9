#include "settings.h"

#include <charconv>
#include <cmath>
#include <functional>
#include <sstream>

#include "user_error.h"

namespace ard {
namespace {

struct Option {
  std::string name;
  std::string help;
  std::function<void(Settings&, const std::string&)> set;
  bool takes_value = true;
};

template <typename T>
T number(const std::string& name, const std::string& text, T smallest) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool usable = error == std::errc() && end == text.data() + text.size() && value >= smallest;
  if (!usable || !std::isfinite(static_cast<double>(value))) {
    std::ostringstream message;
    message << "--" << name << " must be a number of at least " << smallest << ", got '" << text << "'";
    throw UserError(message.str());
  }
  return value;
}

template <typename T>
Option numeric(std::string name, std::string help, T Settings::* member, T smallest) {
  auto set = [name, member, smallest](Settings& settings, const std::string& text) {
    settings.*member = number<T>(name, text, smallest);
  };
  return {name, std::move(help), set};
}

template <typename T>
Option textual(std::string name, std::string help, T Settings::* member) {
  return {std::move(name), std::move(help),
          [member](Settings& settings, const std::string& text) { settings.*member = text; }};
}

Option list(std::string name, std::string help, std::vector<std::string> Settings::* member) {
  return {std::move(name), std::move(help), [member](Settings& settings, const std::string& text) {
            (settings.*member).clear();
            std::istringstream stream(text);
            for (std::string item; std::getline(stream, item, ',');)
              (settings.*member).push_back(item);
          }};
}

Option flag(std::string name, std::string help, bool Settings::* member) {
  return {std::move(name), std::move(help),
          [member](Settings& settings, const std::string&) { settings.*member = true; }, false};
}

const std::vector<Option>& options() {
  static const std::vector<Option> all = {
      textual("model", "directory with config.json and safetensors (required)", &Settings::model),
      textual("tokens", "file that `linearard tokenize` wrote (required)", &Settings::tokens),
      textual("output_dir", "new directory for checkpoints and the restored model", &Settings::output_dir),
      textual("scaling", "linear:4, ntk:4 or yarn:4[,beta_fast=32,beta_slow=1]", &Settings::scaling),
      list("relations", "query,key,value,attention, each name or name:weight", &Settings::relations),
      list("trainable", "names of the modules that are trained: q_proj,k_proj,v_proj", &Settings::trainable),
      flag("causal", "self-relations see only earlier tokens", &Settings::causal),
      numeric("learning_rate", "peak of AdamW's learning rate", &Settings::learning_rate, 0.0),
      numeric("weight_decay", "AdamW's", &Settings::weight_decay, 0.0),
      numeric("max_grad_norm", "gradients are clipped to this norm", &Settings::max_grad_norm, 1e-12),
      numeric("warmup_steps", "steps of linear warm-up before the cosine", &Settings::warmup_steps, int64_t{0}),
      numeric("max_steps", "optimizer steps", &Settings::max_steps, int64_t{1}),
      numeric("batch_size", "sequences of a step", &Settings::batch_size, int64_t{1}),
      numeric("seed", "of the order of the sequences", &Settings::seed, int64_t{0}),
      numeric("save_steps", "write a checkpoint every so many steps; 0: none", &Settings::save_steps, int64_t{0}),
      numeric("save_total_limit", "keep so many checkpoints", &Settings::save_total_limit, int64_t{1}),
      textual("resume", "last, or a checkpoint file: continue its run", &Settings::resume),
      textual("device", "auto (a GPU if there is one), cpu, cuda, cuda:1", &Settings::device),
      flag("bf16", "bfloat16 autocast; the weights stay float32 (GPU only)", &Settings::bf16),
  };
  return all;
}

const Option& find_option(const std::string& argument) {
  for (const Option& option : options()) {
    if (argument == "--" + option.name) return option;
  }
  throw UserError("unknown option '" + argument + "'; --help lists the options");
}

}  // namespace

Settings parse_settings(const std::vector<std::string>& arguments, bool& help) {
  Settings settings;
  help = false;
  for (size_t index = 0; index < arguments.size(); ++index) {
    if (arguments[index] == "--help" || arguments[index] == "-h") {
      help = true;
      return settings;
    }
    const Option& option = find_option(arguments[index]);
    if (option.takes_value && ++index == arguments.size()) throw UserError("--" + option.name + " needs a value");
    option.set(settings, arguments[index]);
  }
  if (settings.model.empty()) throw UserError("--model is required: a directory with config.json and safetensors");
  if (settings.tokens.empty()) throw UserError("--tokens is required: a file that `linearard tokenize` wrote");
  return settings;
}

std::string help_text() {
  std::ostringstream text;
  text << "usage: cpp_trainer --model DIRECTORY --tokens FILE [options]\n\n"
          "Scale the RoPE of a Llama model and train it to keep the attention relations of the model with its native "
          "RoPE.\n\noptions:\n";
  for (const Option& option : options()) {
    std::string name = "--" + option.name;
    name.resize(20, ' ');
    text << "  " << name << ' ' << option.help << '\n';
  }
  return text.str();
}

}  // namespace ard
