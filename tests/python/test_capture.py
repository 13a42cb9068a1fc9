"""Capture of post-RoPE queries, keys and values through transformers' attention interface."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_llama, random_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPTJConfig,
    GPTNeoXConfig,
    Llama4TextConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from linearard.capture import (
    capture_states,
    capturing,
    disable_capture,
    enable_capture,
    few_logits,
    masks_can_be_left_out,
    without_masks,
)
from linearard.errors import UserError


def test_states_are_the_projections_after_rope() -> None:
    model = make_llama()
    assert enable_capture(model) == [0, 1, 2]
    ids = random_ids(2, 10)
    states = capture_states(model, ids)
    # Layer 0 can be computed by hand from the embeddings.
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    heads = [
        projection(hidden).view(2, 10, -1, 8).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    cos, sin = model.model.rotary_emb(hidden, torch.arange(10)[None])
    query, key = apply_rotary_pos_emb(heads[0], heads[1], cos, sin)
    torch.testing.assert_close(states[0].query, query)
    torch.testing.assert_close(states[0].key, key)
    torch.testing.assert_close(states[0].value, heads[2])
    assert not torch.allclose(states[0].query, heads[0])
    assert states[0].key.shape == (2, 2, 10, 8), "key heads are not repeated"
    assert states[0].scale == pytest.approx(8**-0.5)


def test_capture_changes_no_output_with_padding() -> None:
    model = make_llama()
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        enable_capture(model)
        with capturing() as capture:
            captured = model(ids, attention_mask=mask).logits
        disable_capture(model)
        again = model(ids, attention_mask=mask).logits
    assert len(capture.states) == 3
    # Only real rows: what a fully masked row attends to is undefined.
    torch.testing.assert_close(captured[mask.bool()], plain[mask.bool()])
    torch.testing.assert_close(again[mask.bool()], plain[mask.bool()])


def test_only_the_wanted_layers_and_only_inside_the_block() -> None:
    model = make_llama()
    enable_capture(model)
    with capturing(frozenset({1})) as capture:
        model(random_ids(1, 4))
    model(random_ids(1, 6))
    assert sorted(capture.states) == [1]
    assert capture.states[1].query.shape[2] == 4


def test_gradient_checkpointing_gives_the_same_states_and_gradients() -> None:
    ids = random_ids(2, 9)
    gradients = []
    for checkpointing in (False, True):
        model = make_llama()
        enable_capture(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        with capturing() as capture:
            model(ids, use_cache=False)
            first = {index: states.query for index, states in capture.states.items()}
            # Backward inside the block: the recomputation passes through the attention function again.
            sum(
                states.query.square().sum() + states.value.square().sum() for states in capture.states.values()
            ).backward()
        assert all(capture.states[index].query is query for index, query in first.items())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("config_type", "settings"),
    [(Qwen2Config, {"num_key_value_heads": 2}), (Qwen3Config, {"num_key_value_heads": 2}), (GPTNeoXConfig, {})],
)
def test_other_families_need_no_patch(config_type: type, settings: dict[str, int]) -> None:
    config = config_type(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **settings
    )
    model = AutoModelForCausalLM.from_config(config)
    assert enable_capture(model) == [0, 1]


SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, sliding_window=8),
        Gemma3Config(text_config={**SIZES, "sliding_window": 8}),
        Llama4TextConfig(**SIZES, intermediate_size_mlp=64, attention_chunk_size=8, num_local_experts=1),
    ],
    ids=["text", "nested", "chunks"],
)
def test_local_attention_keeps_its_masks(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, 50, (1, 32))
    with torch.no_grad():
        expected = model(ids).logits
        enable_capture(model)
        assert not masks_can_be_left_out(model)
        with without_masks(model):
            torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_without_the_interface_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(GPTJConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
    with pytest.raises(UserError, match="GPTJForCausalLM does not use transformers' attention interface"):
        enable_capture(model)


def test_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="Linear is not a transformers model"):
        enable_capture(nn.Linear(2, 2))


def test_two_modules_with_one_layer_index_are_refused() -> None:
    model = make_llama()
    enable_capture(model)
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UserError, match="layer 0"):
        capture_states(model, random_ids(1, 3))


def test_few_logits_only_where_the_model_can() -> None:
    assert few_logits(make_llama(), 3) == {"logits_to_keep": 3}
    bert = AutoModelForCausalLM.from_config(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    )
    keyword = few_logits(bert, 3)
    bert(input_ids=torch.zeros(1, 4, dtype=torch.long), **keyword)
