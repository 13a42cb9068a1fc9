#pragma once

#include <vector>

#include <torch/nn.h>

#include "model_config.h"
#include "rope.h"

namespace ard {

/// What one attention layer multiplies: queries [B, Hq, N, D] and keys [B, Hk, N, D] after RoPE, values [B, Hk, N, D].
struct LayerStates {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
};

// Submodules and parameters have the names of transformers' Llama, so that weights are loaded and saved by name.

class RMSNormImpl : public torch::nn::Module {
 public:
  RMSNormImpl(int64_t size, double epsilon);
  at::Tensor forward(const at::Tensor& x) const;

 private:
  at::Tensor weight_;
  double epsilon_;
};
TORCH_MODULE(RMSNorm);

/// Grouped-query attention: several query heads share a key and value head.
class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const ModelConfig& config);
  /// x [B, N, hidden]; the layer's states are appended to `states` if it is given.
  at::Tensor forward(const at::Tensor& x, const Rotation& rotation, std::vector<LayerStates>* states);

 private:
  at::Tensor heads(torch::nn::Linear& projection, const at::Tensor& x) const;

  int64_t head_dim_;
  torch::nn::Linear query_;
  torch::nn::Linear key_;
  torch::nn::Linear value_;
  torch::nn::Linear output_;
};
TORCH_MODULE(Attention);

/// SwiGLU: down(silu(gate(x)) * up(x)).
class MLPImpl : public torch::nn::Module {
 public:
  explicit MLPImpl(const ModelConfig& config);
  at::Tensor forward(const at::Tensor& x);

 private:
  torch::nn::Linear gate_;
  torch::nn::Linear up_;
  torch::nn::Linear down_;
};
TORCH_MODULE(MLP);

class DecoderLayerImpl : public torch::nn::Module {
 public:
  explicit DecoderLayerImpl(const ModelConfig& config);
  at::Tensor forward(const at::Tensor& x, const Rotation& rotation, std::vector<LayerStates>* states);

 private:
  RMSNorm attention_norm_;
  Attention attention_;
  RMSNorm mlp_norm_;
  MLP mlp_;
};
TORCH_MODULE(DecoderLayer);

/// The decoder without its head.
class DecoderImpl : public torch::nn::Module {
 public:
  explicit DecoderImpl(const ModelConfig& config);
  at::Tensor forward(const at::Tensor& ids, std::vector<LayerStates>* states);

  const at::Tensor& embeddings() const { return embeddings_->weight; }
  double attention_factor() const { return rope_.attention_factor(); }

 private:
  Rope rope_;
  torch::nn::Embedding embeddings_;
  torch::nn::ModuleList layers_;
  RMSNorm norm_;
};
TORCH_MODULE(Decoder);

class LlamaImpl : public torch::nn::Module {
 public:
  explicit LlamaImpl(const ModelConfig& config);

  /// Logits [B, N, vocabulary] of token ids [B, N] (int64).
  at::Tensor forward(const at::Tensor& ids);

  /// The states of every layer, without computing logits.
  std::vector<LayerStates> states(const at::Tensor& ids);

  /// What RoPE multiplies queries and keys by.
  double attention_factor() const { return model_->attention_factor(); }

 private:
  Decoder model_;
  torch::nn::Linear head_ = nullptr;  // none with tied embeddings
};
TORCH_MODULE(Llama);

}  // namespace ard
