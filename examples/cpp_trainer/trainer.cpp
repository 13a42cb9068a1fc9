#include "trainer.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numbers>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/cuda.h>
#include <torch/nn.h>
#include <torch/optim.h>

#include "ard_loss.h"
#include "checkpoint.h"
#include "model_directory.h"
#include "tokens.h"
#include "user_error.h"

namespace ard {
namespace {

namespace fs = std::filesystem;

/// bfloat16 autocast on the GPU for a scope, with the cast weights kept for no longer.
class Autocast {
 public:
  explicit Autocast(bool enabled) : enabled_(enabled) {
    if (!enabled_) return;
    at::autocast::increment_nesting();
    at::autocast::set_autocast_dtype(at::kCUDA, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCUDA, true);
  }
  ~Autocast() {
    if (!enabled_) return;
    at::autocast::set_autocast_enabled(at::kCUDA, false);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool enabled_;
};

at::Device find_device(const Settings& settings) {
  try {
    const std::string automatic = torch::cuda::is_available() ? "cuda" : "cpu";
    const at::Device device(settings.device == "auto" ? automatic : settings.device);
    at::empty({0}, device);
    if (settings.bf16 && !device.is_cuda()) throw UserError("--bf16 is for GPUs: on the CPU leave it out");
    return device;
  } catch (const c10::Error& error) {
    const std::string reason = error.what_without_backtrace();
    throw UserError("the device '" + settings.device + "' cannot be used: " + reason.substr(0, reason.find('\n')));
  }
}

void check_output(const Settings& settings) {
  const fs::path& directory = settings.output_dir;
  if (fs::exists(directory) && !fs::is_directory(directory)) {
    throw UserError("the output directory '" + directory.string() + "' is a file");
  }
  if (settings.resume.empty() && fs::exists(directory) && !fs::is_empty(directory)) {
    throw UserError("the output directory '" + directory.string() +
                    "' is not empty: choose another, or continue its run with --resume last");
  }
}

// What the loss curve depends on; a checkpoint is only continued with the same.
nlohmann::json trajectory(const Settings& settings, const ModelConfig& student, const at::Tensor& sequences) {
  return {{"model", student.json},
          {"sequences", sequences.sizes().vec()},
          {"relations", settings.relations},
          {"trainable", settings.trainable},
          {"causal", settings.causal},
          {"learning_rate", settings.learning_rate},
          {"weight_decay", settings.weight_decay},
          {"max_grad_norm", settings.max_grad_norm},
          {"warmup_steps", settings.warmup_steps},
          {"max_steps", settings.max_steps},
          {"batch_size", settings.batch_size},
          {"seed", settings.seed},
          {"bf16", settings.bf16}};
}

// Freeze all but the parameters of the modules with these names.
NamedTensors choose_trainable(Llama& model, const std::vector<std::string>& names) {
  NamedTensors trained;
  for (auto& parameter : model->named_parameters())
    parameter.value().requires_grad_(false);
  for (const std::string& name : names) {
    const size_t before = trained.size();
    for (auto& parameter : model->named_parameters()) {
      if (("." + parameter.key()).find("." + name + ".") == std::string::npos) continue;
      trained.emplace_back(parameter.key(), parameter.value().requires_grad_(true));
    }
    if (trained.size() == before) throw UserError("the model has no module '" + name + "' to train");
  }
  return trained;
}

// transformers' get_cosine_schedule_with_warmup: the factor on the learning rate of step 0, 1, ...
double schedule(const Settings& settings, int64_t step) {
  if (step < settings.warmup_steps) return static_cast<double>(step) / static_cast<double>(settings.warmup_steps);
  const auto rest = static_cast<double>(std::max<int64_t>(1, settings.max_steps - settings.warmup_steps));
  return 0.5 * (1.0 + std::cos(std::numbers::pi * static_cast<double>(step - settings.warmup_steps) / rest));
}

Llama make_model(const ModelConfig& config, const fs::path& directory, at::Device device) {
  Llama model(config);
  load_weights(model, directory);
  model->to(device);
  return model;
}

// Mean next-token loss, nats, on some sequences: says what the scaling did and how much of it is undone.
double next_token_loss(Llama& model, const at::Tensor& ids) {
  const at::NoGradGuard no_grad;
  const int64_t length = ids.size(1);
  const at::Tensor logits = model->forward(ids).to(at::kFloat).slice(1, 0, length - 1);
  return at::cross_entropy_loss(logits.flatten(0, 1), ids.slice(1, 1, length).flatten()).item<double>();
}

class Trainer {
 public:
  explicit Trainer(const Settings& settings)
      : settings_(settings),
        device_(find_device(settings)),
        relations_(parse_relations(settings.relations)),
        native_(read_config(settings.model)),
        scaled_(scale_rope(native_, settings.scaling)),
        sequences_(read_tokens(settings.tokens, native_.vocabulary_size)),
        sampler_(sequences_.size(0), settings.batch_size, static_cast<uint64_t>(settings.seed)),
        trajectory_(trajectory(settings, scaled_, sequences_)) {
    if (sequences_.size(1) < 2 || sequences_.size(1) > native_.context) {
      throw UserError("the sequences have " + std::to_string(sequences_.size(1)) + " tokens, the model reads 2 to " +
                      std::to_string(native_.context));
    }
    check_output(settings);
    teacher_ = make_model(native_, settings.model, device_);
    for (auto& parameter : teacher_->parameters())
      parameter.requires_grad_(false);
    student_ = make_model(scaled_, settings.model, device_);
    trained_ = choose_trainable(student_, settings.trainable);
    std::vector<at::Tensor> parameters;
    for (const auto& [name, parameter] : trained_)
      parameters.push_back(parameter);
    optimizer_ = std::make_unique<torch::optim::AdamW>(
        parameters, torch::optim::AdamWOptions(settings.learning_rate).weight_decay(settings.weight_decay));
  }

  void run() {
    int64_t step = 0;
    if (!settings_.resume.empty()) {
      const bool last = settings_.resume == "last";
      const fs::path path = last ? last_checkpoint(settings_.output_dir) : fs::path(settings_.resume);
      step = load_checkpoint(path, trained_, *optimizer_, trajectory_);
      std::printf("resumed after step %lld\n", static_cast<long long>(step));
    }
    fs::create_directories(settings_.output_dir);
    const at::Tensor sample = sequences_.slice(0, 0, settings_.batch_size).to(device_);
    std::printf("next-token loss of %lld sequences: teacher %.4f, scaled %.4f\n",
                static_cast<long long>(sample.size(0)), next_token_loss(teacher_, sample),
                next_token_loss(student_, sample));
    while (step < settings_.max_steps) {
      take_step(step++);
      if (settings_.save_steps > 0 && step % settings_.save_steps == 0) {
        save_checkpoint(checkpoint_path(settings_.output_dir, step), trained_, *optimizer_, step, trajectory_);
        remove_old_checkpoints(settings_.output_dir, settings_.save_total_limit);
      }
    }
    std::printf("next-token loss of the restored model: %.4f\n", next_token_loss(student_, sample));
    save_model(student_, scaled_, settings_.model, settings_.output_dir / "model");
    std::printf("restored model: %s\n", (settings_.output_dir / "model").c_str());
  }

 private:
  at::Tensor loss(const at::Tensor& ids) {
    const Autocast autocast(settings_.bf16);
    std::vector<LayerStates> target;
    {
      const at::NoGradGuard no_grad;
      target = teacher_->states(ids);
    }
    return ard_loss(student_->states(ids), target, relations_, settings_.causal, student_->attention_factor());
  }

  void take_step(int64_t step) {
    const auto begin = std::chrono::steady_clock::now();
    const at::Tensor ids = sequences_.index_select(0, sampler_.batch(step)).to(device_);
    const double learning_rate = settings_.learning_rate * schedule(settings_, step);
    optimizer_->param_groups()[0].options().set_lr(learning_rate);
    const at::Tensor value = loss(ids);
    value.backward();
    std::vector<at::Tensor>& parameters = optimizer_->param_groups()[0].params();
    const double norm = torch::nn::utils::clip_grad_norm_(parameters, settings_.max_grad_norm);
    const auto shown = value.item<double>();
    if (!std::isfinite(shown) || !std::isfinite(norm)) {
      throw UserError("step " + std::to_string(step + 1) +
                      ": the loss or its gradient is not finite; try a smaller "
                      "learning rate");
    }
    optimizer_->step();
    optimizer_->zero_grad();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("step %lld/%lld  loss %.6f  learning rate %.3e  gradient norm %.4f  %.0f tokens/s\n",
                static_cast<long long>(step + 1), static_cast<long long>(settings_.max_steps), shown, learning_rate,
                norm, static_cast<double>(ids.numel()) / seconds.count());
    std::fflush(stdout);
  }

  const Settings& settings_;
  at::Device device_;
  Relations relations_;
  ModelConfig native_;
  ModelConfig scaled_;
  at::Tensor sequences_;
  Sampler sampler_;
  nlohmann::json trajectory_;
  Llama teacher_ = nullptr;
  Llama student_ = nullptr;
  NamedTensors trained_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
};

}  // namespace

void train(const Settings& settings) { Trainer(settings).run(); }

}  // namespace ard
