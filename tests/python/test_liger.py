"""Liger-Kernel's fused kernels: the same model while they are in place, and untouched afterwards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_trainer
from tiny_models import VOCABULARY, make_llama, random_ids
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

import linearard.liger
from linearard.capture import transformers_model
from linearard.liger import liger_kernels
from linearard.stage_trainer import StageTrainer

pytest.importorskip("liger_kernel")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
ROPE = "apply_rotary_pos_emb"


def make_model(config: type[PretrainedConfig]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES))


def contents(model: nn.Module) -> list[dict[str, Any]]:
    """What makes the modules of a model, and the code of its RoPE, what they are."""
    return [dict(vars(module)) for module in model.modules()] + [{ROPE: getattr(modeling_llama, ROPE)}]


def is_fused(model: nn.Module) -> bool:
    return "forward" in vars(model.get_submodule("model.norm"))


@pytest.fixture
def _without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU Liger-Kernel's kernels cannot run."""
    monkeypatch.setattr(linearard.liger, "_hidden_states", lambda model: torch.ones(1))


@pytest.mark.usefixtures("_without_probes")
def test_modules_and_rope_are_as_before() -> None:
    models = [make_llama(), make_llama(seed=1)]
    before = [contents(model) for model in models]
    with liger_kernels(models):
        assert all(is_fused(model) for model in models)
        assert all("forward" in vars(layer.mlp) for layer in models[0].model.layers)
        assert getattr(modeling_llama, ROPE) is not before[0][-1][ROPE]
        models[0].train()
    assert models[0].training, "what the body changes is not undone"
    models[0].eval()
    assert [contents(model) for model in models] == before
    models[0](input_ids=random_ids(1, 8))


@pytest.mark.usefixtures("_without_probes")
def test_an_error_leaves_nothing_behind() -> None:
    model = make_llama()
    before = contents(model)
    with pytest.raises(KeyError), liger_kernels([model]):
        raise KeyError
    assert contents(model) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run here")
def test_kernels_that_cannot_run_are_left_out() -> None:
    model = make_llama().train()
    before = contents(model)
    with pytest.warns(UserWarning, match="Liger-Kernel is left out"), liger_kernels([model]):
        assert contents(model) == before
    assert contents(model) == before


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_it_has_to_compute_what_the_model_does(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(base: nn.Module, chosen: dict[str, bool]) -> None:
        norm = base.get_submodule("model.norm")
        vars(norm)["forward"] = lambda hidden: factor * type(norm).forward(norm, hidden)

    monkeypatch.setattr(linearard.liger, "apply_liger_kernel", stand_in)
    model = make_llama()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with liger_kernels([model]):
            assert is_fused(model) == (factor == 1)
    assert not is_fused(model)
    expected = [] if factor == 1 else ["hidden states of LlamaForCausalLM would change by 2 %"]
    assert [str(warning.message).partition("the ")[2] for warning in said] == expected


def test_where_it_has_nothing_to_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                      num_attention_heads=2)
    )  # fmt: skip
    before = [dict(vars(module)) for module in unknown.modules()]
    with liger_kernels([unknown]):
        assert [dict(vars(module)) for module in unknown.modules()] == before
    monkeypatch.setattr(linearard.liger, "is_liger_kernel_available", lambda: False)
    model = make_llama()
    with liger_kernels([model]):
        assert not is_fused(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger-Kernel's kernels need a GPU")
class TestOnGpu:
    @pytest.mark.parametrize(
        "config",
        [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Phi3Config, Gemma2Config, Gemma3TextConfig],
    )
    def test_logits_and_gradients_are_the_models(self, config: type[PretrainedConfig]) -> None:
        model = make_model(config).cuda()
        ids = random_ids(2, 33).cuda()

        def run() -> tuple[Tensor, dict[str, Tensor]]:
            model.zero_grad()
            logits = model(input_ids=ids, use_cache=False).logits
            (logits.log_softmax(-1).square().mean()).backward()
            return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        logits, expected = run()
        with liger_kernels([model]):
            assert is_fused(model)
            fused, gradients = run()
        assert (fused - logits).norm() < 1e-5 * logits.norm()
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name

    def test_a_model_with_other_code_keeps_it(self) -> None:
        model = make_llama().cuda()
        model.model.layers[0].mlp.act_fn = nn.GELU()
        before = contents(model)
        with pytest.warns(UserWarning, match="hidden states of LlamaForCausalLM would change"), liger_kernels([model]):
            assert contents(model) == before

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"bf16": True, "scaling": "yarn:4"},
            {"bf16": True, "cuda_graphs": False, "gradient_checkpointing": True},
            {"lora_rank": 0},
            {"gradients": "local", "logits_weight": 0.0},
        ],
    )
    def test_training_goes_the_same_way(
        self, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fused = []
        step = StageTrainer.training_step

        def training_step(self: Any, *arguments: Any) -> Tensor:
            fused.append(all(is_fused(transformers_model(model)) for model in self.frozen_modules()))
            return step(self, *arguments)

        monkeypatch.setattr(StageTrainer, "training_step", training_step)

        def losses(**more: Any) -> list[float]:
            trainer = make_trainer(tmp_path / "run", use_cpu=False, max_steps=6, **settings, **more)
            trainer.train()
            assert not is_fused(transformers_model(trainer.model))
            return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        expected = losses(liger_kernels=False)
        assert losses() == pytest.approx(expected, rel=2e-2 if "bf16" in settings else 1e-3)
        assert fused == [False] * 6 + [True] * 6
