#include "llama.h"

#include <ATen/ATen.h>

namespace ard {
namespace {

torch::nn::Linear linear(int64_t in, int64_t out) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
}

}  // namespace

RMSNormImpl::RMSNormImpl(int64_t size, double epsilon)
    : weight_(register_parameter("weight", at::ones({size}))), epsilon_(epsilon) {}

at::Tensor RMSNormImpl::forward(const at::Tensor& x) const {
  const at::Tensor exact = x.to(at::kFloat);
  const at::Tensor normalized = exact * at::rsqrt(exact.square().mean(-1, true) + epsilon_);
  return weight_ * normalized.to(x.scalar_type());
}

AttentionImpl::AttentionImpl(const ModelConfig& config)
    : head_dim_(config.head_dim),
      query_(register_module("q_proj", linear(config.hidden_size, config.heads * head_dim_))),
      key_(register_module("k_proj", linear(config.hidden_size, config.key_value_heads * head_dim_))),
      value_(register_module("v_proj", linear(config.hidden_size, config.key_value_heads * head_dim_))),
      output_(register_module("o_proj", linear(config.heads * head_dim_, config.hidden_size))) {}

// [B, N, heads x D] -> [B, heads, N, D], a view: the operators read it where it lies.
at::Tensor AttentionImpl::heads(torch::nn::Linear& projection, const at::Tensor& x) const {
  return projection->forward(x).unflatten(-1, {-1, head_dim_}).transpose(1, 2);
}

at::Tensor AttentionImpl::forward(const at::Tensor& x, const Rotation& rotation, std::vector<LayerStates>* states) {
  const at::Tensor query = rotate(heads(query_, x), rotation);
  const at::Tensor key = rotate(heads(key_, x), rotation);
  const at::Tensor value = heads(value_, x);
  if (states != nullptr) states->push_back({query, key, value});
  const at::Tensor attended = at::scaled_dot_product_attention(query, key, value, /*attn_mask=*/std::nullopt,
                                                               /*dropout_p=*/0.0, /*is_causal=*/true,
                                                               /*scale=*/std::nullopt, /*enable_gqa=*/true);
  return output_->forward(attended.transpose(1, 2).flatten(-2));
}

MLPImpl::MLPImpl(const ModelConfig& config)
    : gate_(register_module("gate_proj", linear(config.hidden_size, config.intermediate_size))),
      up_(register_module("up_proj", linear(config.hidden_size, config.intermediate_size))),
      down_(register_module("down_proj", linear(config.intermediate_size, config.hidden_size))) {}

at::Tensor MLPImpl::forward(const at::Tensor& x) {
  return down_->forward(at::silu(gate_->forward(x)) * up_->forward(x));
}

DecoderLayerImpl::DecoderLayerImpl(const ModelConfig& config)
    : attention_norm_(register_module("input_layernorm", RMSNorm(config.hidden_size, config.norm_epsilon))),
      attention_(register_module("self_attn", Attention(config))),
      mlp_norm_(register_module("post_attention_layernorm", RMSNorm(config.hidden_size, config.norm_epsilon))),
      mlp_(register_module("mlp", MLP(config))) {}

at::Tensor DecoderLayerImpl::forward(const at::Tensor& x, const Rotation& rotation, std::vector<LayerStates>* states) {
  const at::Tensor attended = x + attention_->forward(attention_norm_->forward(x), rotation, states);
  return attended + mlp_->forward(mlp_norm_->forward(attended));
}

DecoderImpl::DecoderImpl(const ModelConfig& config)
    : rope_(config.rope, config.head_dim),
      embeddings_(register_module("embed_tokens", torch::nn::Embedding(config.vocabulary_size, config.hidden_size))),
      layers_(register_module("layers", torch::nn::ModuleList())),
      norm_(register_module("norm", RMSNorm(config.hidden_size, config.norm_epsilon))) {
  for (int64_t layer = 0; layer < config.layers; ++layer)
    layers_->push_back(DecoderLayer(config));
}

at::Tensor DecoderImpl::forward(const at::Tensor& ids, std::vector<LayerStates>* states) {
  const Rotation rotation = rope_.rotation(ids.size(1), ids.device());
  at::Tensor x = embeddings_->forward(ids);
  for (const auto& layer : *layers_)
    x = layer->as<DecoderLayer>()->forward(x, rotation, states);
  return norm_->forward(x);
}

LlamaImpl::LlamaImpl(const ModelConfig& config) : model_(register_module("model", Decoder(config))) {
  if (!config.tied_embeddings) {
    head_ = register_module("lm_head", linear(config.hidden_size, config.vocabulary_size));
  }
}

at::Tensor LlamaImpl::forward(const at::Tensor& ids) {
  const at::Tensor hidden = model_->forward(ids, nullptr);
  return at::linear(hidden, head_ ? head_->weight : model_->embeddings());
}

std::vector<LayerStates> LlamaImpl::states(const at::Tensor& ids) {
  std::vector<LayerStates> states;
  model_->forward(ids, &states);
  return states;
}

}  // namespace ard
