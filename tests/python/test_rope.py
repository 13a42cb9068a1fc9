"""RoPE scaling through transformers' parameters, and the switch between native and scaled."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import CONTEXT, make_llama, random_ids
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

from linearard.errors import UserError
from linearard.rope import (
    RopeScaling,
    attention_factors,
    check_length,
    context_of,
    restore_float32_rope,
    scale_rope,
)

SCALINGS = ["linear:4", "ntk:4", "yarn:4", "yarn:2,beta_fast=16", "llama3:8,low_freq_factor=2", "linear:2,theta=50000"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids(2, 40)).logits


def test_linear_scaling_divides_the_positions() -> None:
    model = make_llama()
    ids = random_ids(2, 40)
    with torch.no_grad():
        # Positions are integers for transformers' embedding, so the fourfold ones of the scaled model do.
        expected = model(ids, position_ids=torch.arange(40)[None]).logits
        scale_rope(model, RopeScaling.parse("linear:4"))
        scaled = model(ids, position_ids=4 * torch.arange(40)[None]).logits
    torch.testing.assert_close(scaled, expected)
    assert model.config.max_position_embeddings == 4 * CONTEXT


def test_ntk_base() -> None:
    model = make_llama()
    scale_rope(model, RopeScaling.parse("ntk:4"))
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(10000 * 4 ** (8 / 6))


@pytest.mark.parametrize("text", SCALINGS)
def test_switch_and_saved_model(text: str, tmp_path: Path) -> None:
    model = make_llama()
    native = logits(model)
    switch = scale_rope(model, RopeScaling.parse(text))
    scaled = logits(model)
    assert not torch.allclose(scaled, native, atol=1e-3)
    with switch.native():
        torch.testing.assert_close(logits(model), native, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), scaled, rtol=0, atol=0)
    # Plain transformers, none of our code, finds all it needs in the configuration.
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), scaled, rtol=0, atol=0)
    assert loaded.config.max_position_embeddings == RopeScaling.parse(text).factor * CONTEXT


def test_native_comes_back_after_an_error() -> None:
    model = make_llama()
    switch = scale_rope(model, RopeScaling.parse("linear:4"))
    scaled = logits(model)
    with pytest.raises(KeyError), switch.native():
        raise KeyError
    torch.testing.assert_close(logits(model), scaled, rtol=0, atol=0)


def test_dynamic_scaling_changes_nothing_inside_the_context() -> None:
    model = make_llama()
    native = logits(model)
    scale_rope(model, RopeScaling.parse("dynamic:4"))
    torch.testing.assert_close(logits(model), native)
    longer = random_ids(1, 3 * CONTEXT)
    with torch.no_grad():
        assert not torch.allclose(model(longer).logits, make_llama()(longer).logits, atol=1e-3)


def test_frequencies_survive_a_cast() -> None:
    model = make_llama()
    switch = scale_rope(model, RopeScaling.parse("linear:4"))
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    restore_float32_rope(model)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, exact, rtol=0, atol=0)
    model.to(torch.bfloat16)
    with switch.native():
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, 4 * exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, exact, rtol=0, atol=0)


def make_gemma() -> torch.nn.Module:
    """Five layers of six have sliding windows."""
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_attention_factors_are_those_of_the_layers() -> None:
    llama, gemma = make_llama(), make_gemma()
    assert attention_factors(llama, range(3)) == {0: 1, 1: 1, 2: 1}
    linear = make_llama()
    scale_rope(linear, RopeScaling.parse("linear:4"))
    assert attention_factors(linear, [2]) == {2: 1}
    for model in (llama, gemma):
        scale_rope(model, RopeScaling.parse("yarn:4"))
    factor = pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factors(llama, range(3)) == {0: factor, 1: factor, 2: factor}
    assert attention_factors(gemma, range(6)) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: factor}


def test_sliding_window_layers_keep_their_rope() -> None:
    model = make_gemma()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    scale_rope(model, RopeScaling.parse("linear:4"))
    after = dict(model.named_buffers())
    sliding = [name for name in before if name.endswith("rotary_emb.sliding_attention_inv_freq")]
    full = [name for name in before if name.endswith("rotary_emb.full_attention_inv_freq")]
    assert sliding
    assert full
    for name in sliding:
        torch.testing.assert_close(after[name], before[name])
    for name in full:
        torch.testing.assert_close(after[name], before[name] / 4)


def test_a_model_without_rope_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no rotary position embedding"):
        scale_rope(model, RopeScaling.parse("linear:4"))


def test_a_scaled_model_is_refused() -> None:
    model = make_llama()
    scale_rope(model, RopeScaling.parse("linear:4"))
    with pytest.raises(UserError, match="scaled already"):
        scale_rope(model, RopeScaling.parse("linear:2"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("linear:1", "does not extend"),
        ("linear:0.5", "does not extend"),
        ("linear:-4", "does not extend"),
        ("linear", "must be a number"),
        ("linear:four", "must be a number"),
        ("linear:nan", "must be a number"),
        ("longrope:4", "needs the factors of each frequency"),
        ("longrope:4,factors=missing.json", "cannot read longrope's factors from 'missing.json'"),
        ("proportional:4", "unknown RoPE scaling"),
        ("linear:4,beta=2", "unknown option 'beta'"),
        ("yarn:4,beta_fast=x", "must be a number"),
    ],
)
def test_bad_scalings(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        RopeScaling.parse(text)


def test_a_smaller_base_is_refused() -> None:
    with pytest.raises(UserError, match="theta 500 does not extend"):
        scale_rope(make_llama(), RopeScaling.parse("linear:2,theta=500"))


def longrope(directory: Path, pairs: int = 4, **content: object) -> str:
    file = directory / "factors.json"
    lists = {"short_factor": [1.5] * pairs, "long_factor": [4.0] * pairs}
    file.write_text(json.dumps({**lists, **content}))
    return f"longrope:4,factors={file}"


def test_longrope_from_a_file(tmp_path: Path) -> None:
    model = make_llama()
    native = logits(model)
    switch = scale_rope(model, RopeScaling.parse(longrope(tmp_path)))
    scaled = logits(model)
    assert not torch.allclose(scaled, native, atol=1e-3)
    with switch.native():
        torch.testing.assert_close(logits(model), native, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), scaled, rtol=0, atol=0)
    assert loaded.config.max_position_embeddings == 4 * CONTEXT
    assert attention_factors(model, [0])[0] > 1


def test_bad_factors_of_longrope(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two lists of positive numbers"):
        RopeScaling.parse(longrope(tmp_path, long_factor=[4.0, "x", 1, 1]))
    with pytest.raises(UserError, match="has 3 numbers, the model rotates 4 pairs"):
        scale_rope(make_llama(), RopeScaling.parse(longrope(tmp_path, pairs=3)))


@pytest.mark.parametrize(("text", "context"), [("linear:4", 256), ("dynamic:4", 256), ("yarn:2", 128), ("ntk:4", 256)])
def test_the_range_of_a_scaled_model(text: str, context: int) -> None:
    model = make_llama()
    assert context_of(model) == CONTEXT
    scale_rope(model, RopeScaling.parse(text))
    assert context_of(model) == context
    check_length(context, context_of(model), "a sequence")
    with pytest.raises(UserError, match=f"a sequence of {context + 1} tokens is longer than the model's range"):
        check_length(context + 1, context_of(model), "a sequence")
