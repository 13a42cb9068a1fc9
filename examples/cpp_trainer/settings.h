#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace ard {

/// The command line; options are named as those of `linearard restore` that do the same.
struct Settings {
  std::filesystem::path model;
  std::filesystem::path tokens;
  std::filesystem::path output_dir = "runs/cpp_trainer";
  std::string scaling = "linear:4";
  std::vector<std::string> relations = {"query", "key", "value"};
  std::vector<std::string> trainable = {"q_proj", "k_proj", "v_proj"};
  bool causal = false;
  double learning_rate = 1e-3;
  double weight_decay = 0.0;
  double max_grad_norm = 5.0;
  int64_t warmup_steps = 8;
  int64_t max_steps = 256;
  int64_t batch_size = 4;
  int64_t seed = 42;
  int64_t save_steps = 0;
  int64_t save_total_limit = 2;
  std::string resume;
  std::string device = "auto";
  bool bf16 = false;
};

/// Read the command line; UserError for an option or value that cannot be used. `help` is set when it is asked for.
Settings parse_settings(const std::vector<std::string>& arguments, bool& help);

/// What --help prints.
std::string help_text();

}  // namespace ard
