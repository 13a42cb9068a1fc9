#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

namespace ard {

/// What transformers calls rope_parameters.
struct RopeParameters {
  std::string type = "default";  ///< default, linear or yarn
  double theta = 10000.0;
  double factor = 1.0;
  double beta_fast = 32.0;                 ///< yarn
  double beta_slow = 1.0;                  ///< yarn
  std::optional<double> attention_factor;  ///< yarn: of cosines and sines; unset: 0.1 log(factor) + 1
  double original_context = 0.0;           ///< yarn
};

/// The settings of a Llama model, read from transformers' config.json.
struct ModelConfig {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t vocabulary_size = 0;
  int64_t context = 0;  ///< tokens
  double norm_epsilon = 0.0;
  bool tied_embeddings = false;
  RopeParameters rope;
  nlohmann::json json;  ///< all of it: what is not understood here is kept in the restored model
};

/// Read DIRECTORY/config.json; UserError for a file or an architecture that this program does not know.
ModelConfig read_config(const std::filesystem::path& directory);

/// The same model with scaled RoPE. `scaling` is written as for `linearard restore`, `type:factor[,name=value...]`,
/// with the types linear (position interpolation), ntk (recorded as a larger theta) and yarn.
ModelConfig scale_rope(const ModelConfig& native, const std::string& scaling);

}  // namespace ard
