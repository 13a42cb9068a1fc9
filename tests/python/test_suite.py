"""Figures, task files, perplexity by position, synthetic prompts, decoding and settings of `linearard evaluate`."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama, make_tokenizer, random_ids, save_model
from tokenizers import pre_tokenizers
from transformers import BloomConfig, LlamaConfig

from linearard.errors import UserError
from linearard.suite.config import SuiteConfig
from linearard.suite.figures import ACCURACY, NLL, Figure, gap_closed, mean_of_tasks, share_of_teacher
from linearard.suite.long_text import document_windows, perplexity_figures, position_losses, read_documents
from linearard.suite.retrieval import answers
from linearard.suite.sources import Source, check_context, context_range
from linearard.suite.synthetic import SYNTHETIC_TASKS, Prompt, make_prompt, score
from linearard.suite.task_files import find_files, load_task


def accuracy(*values: float) -> Figure:
    return Figure("task", ACCURACY, values)


def test_standard_errors() -> None:
    estimate = accuracy(1, 1, 1, 0).estimate
    assert (estimate.value, estimate.error) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4)))
    estimate = Figure("x", NLL, (1.0, 3.0)).estimate
    assert (estimate.value, estimate.error) == (2.0, pytest.approx(1.0))  # sqrt(2) / sqrt(2)
    assert math.isnan(Figure("x", NLL, (1.0,)).estimate.error)
    mean = mean_of_tasks([accuracy(1, 0), accuracy(1, 1, 1, 0)])
    assert (mean.value, mean.error) == (0.625, pytest.approx(math.sqrt(0.125 + 0.046875) / 2))


def test_recovery() -> None:
    share = share_of_teacher([accuracy(1, 0, 0, 0)], [accuracy(1, 1, 0, 0)])
    # Residuals a - b / 2: 1/2, -1/2, 0, 0; variance 1/8, over 4 examples, over the teacher's 1/2.
    assert share is not None
    assert (share.value, share.error) == (0.5, pytest.approx(math.sqrt(0.125 / 4) / 0.5))
    assert share_of_teacher([accuracy(1)], [accuracy(0)]) is None
    nll = [Figure("x", NLL, values) for values in ((2.0, 2.0), (5.0, 7.0), (1.0, 1.0))]
    gap = gap_closed(*nll)
    assert gap is not None
    assert gap.value == pytest.approx(0.8)
    # Residuals (s - m) - 0.8 (s - t): -0.2 and 0.2; their variance 0.08, over 2, over the damage of 5.
    assert gap.error == pytest.approx(math.sqrt(0.08 / 2) / 5)
    assert gap_closed(nll[0], nll[2], nll[2]) is None
    with pytest.raises(UserError, match="measured on 1 and on 2 examples"):
        share_of_teacher([accuracy(1)], [accuracy(1, 1)])


def test_position_losses_are_those_of_all_logits() -> None:
    model, ids = make_llama(), random_ids(1, 60)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(position_losses(model, ids), expected)
    whole, first, last = perplexity_figures(model, [ids], 40)
    assert whole.values[0] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert first.positions == (0, 40)
    assert first.values[0] == pytest.approx(float(expected[:39].mean()), rel=1e-5)
    assert last.positions == (40, 60)
    assert last.values[0] == pytest.approx(float(expected[39:].mean()), rel=1e-5)


def test_the_head_never_sees_all_positions() -> None:
    model, seen = make_llama(max_position_embeddings=2048), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2]))
    position_losses(model, random_ids(1, 1300))
    assert sum(seen) >= 1299
    assert max(seen) <= 512


def test_documents_that_are_too_short() -> None:
    with pytest.raises(UserError, match=r"none of 8 has 1 windows of 1,000,000 tokens"):
        document_windows(read_documents(["bundled"]), make_tokenizer(), 1_000_000, 1)


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_prompts_fit_and_are_deterministic(name: str, length: int) -> None:
    tokenizer = make_tokenizer()
    prompt = make_prompt(name, tokenizer, length, 50, seed=3, index=0)
    used = len(prompt.ids) + prompt.new_tokens
    assert 0.9 * length < used <= length
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert prompt == make_prompt(name, tokenizer, length, 50, seed=3, index=0)
    assert prompt.answers != make_prompt(name, tokenizer, length, 50, seed=4, index=0).answers
    text = tokenizer.decode(prompt.ids)
    assert all(answer in text for answer in prompt.answers)
    assert score(prompt.answers, ", ".join(prompt.answers), name) == 1
    assert score(prompt.answers, "nothing", name) == 0


def test_the_space_before_a_number_belongs_to_the_prompt() -> None:
    tokenizer = make_tokenizer()

    def end(name: str) -> str:
        return str(tokenizer.decode(make_prompt(name, tokenizer, 2048, 50, seed=3, index=0).ids))[-8:]

    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    assert end("passkey") == " key is "
    tokenizer.add_tokens([" " + make_prompt("passkey", tokenizer, 2048, 50, seed=3, index=0).answers[0]])
    assert end("passkey").endswith(" key is")


@pytest.mark.parametrize("name", [name for name, task in SYNTHETIC_TASKS.items() if task.has_depth])
def test_depth_is_where_the_needle_is(name: str) -> None:
    tokenizer = make_tokenizer()
    for depth in (0, 50, 100):
        prompt = make_prompt(name, tokenizer, 8192, depth, 0, 0)
        text = tokenizer.decode(prompt.ids)
        assert text.index(prompt.answers[0]) / len(text) == pytest.approx(depth / 100, abs=0.12)


def test_scores() -> None:
    assert score(("12345",), " 12345. Remember it.", "passkey") == 1
    assert score(("12345",), " 123456", "passkey") == 0
    assert score(("12345",), " 54321 or 12345", "passkey") == 0
    assert score(("12", "34", "56", "78"), "12, 56", "needle_multivalue") == 0.5


@pytest.mark.parametrize(("name", "length"), [("passkey", 64), ("common_words", 512)])
def test_a_task_without_room(name: str, length: int) -> None:
    with pytest.raises(UserError, match=f"{name} at {length} does not fit"):
        make_prompt(name, make_tokenizer(), length, 0, 0, 0)


def test_decoding_is_greedy_whatever_the_batch() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    prompts = [Prompt(random_ids(1, length, length)[0].tolist(), ("x",), 5) for length in (9, 20, 13)]
    expected = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True))
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2]))
    assert answers(model, tokenizer, prompts, batch=3) == expected
    assert max(seen) == 1, "logits of the whole prompt were computed"
    assert answers(model, tokenizer, prompts, batch=1) == expected


def test_context_ranges() -> None:
    assert context_range(LlamaConfig(max_position_embeddings=100)) == 100
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100}
    assert context_range(LlamaConfig(max_position_embeddings=100, rope_parameters=yarn)) == 400
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert context_range(LlamaConfig(max_position_embeddings=400, rope_parameters=linear)) == 400
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert context_range(LlamaConfig(max_position_embeddings=100, rope_parameters=dynamic)) == 400
    assert context_range(BloomConfig()) > 2**40
    with pytest.raises(UserError, match=r"--lengths: .* 101 tokens is longer than the range of the model 'm', 100 tok"):
        check_context("m", LlamaConfig(max_position_embeddings=100), 101, "lengths")


@pytest.mark.parametrize("scaling", ["", "@linear:4", "@ntk:4", "@dynamic:4", "@yarn:4"])
def test_the_configuration_says_what_the_loaded_model_will_have(scaling: str, tmp_path: Path) -> None:
    source, config = Source.parse(f"{save_model(tmp_path / 'model')}{scaling}"), SuiteConfig()
    loaded = source.load(config, torch.device("cpu"))[0].config
    assert source.load_config(config).rope_parameters == loaded.rope_parameters
    assert context_range(source.load_config(config)) == context_range(loaded) == 64 * (4 if scaling else 1)


def test_sources() -> None:
    source = Source.parse("YaRN=some/model@yarn:4,theta=1e6")
    assert (source.label, source.model) == ("YaRN", "some/model")
    assert source.scaling is not None
    assert source.scaling.theta == 1e6
    assert Source.parse("some/model", "teacher").label == "teacher"
    with pytest.raises(UserError, match="is written"):
        Source.parse("=x")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('{"query": "q", "choices": ["a", "b"], "gold": 0}\n{"query"', "line 2 of .* is not JSON"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 1 of .* 'gold' from 0 to 1, got 2"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "line 1 of .* at least two texts"),
        ('{"query": "q"}', "line 1 of .* needs a field 'context'"),
        ('{"context": "a b"}', "needs a field 'continuation'"),
        ("", "has no examples"),
    ],
)
def test_bad_task_files(lines: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(lines)
    with pytest.raises(UserError, match=reason):
        load_task(file, None, None)


def test_task_files_are_found(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    assert find_files("passkey") is None
    assert find_files(str(file)) == [(file, None)]
    assert find_files(f"boolq={file}") == [(file, "boolq")]
    with pytest.raises(UserError, match=r"has no \.jsonl files"):
        find_files(str(tmp_path))
    with pytest.raises(UserError, match=r"unknown task template 'x' .* known: arc_easy, boolq"):
        find_files(f"x={file}")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"depths": [101.0]}, "depths must be percentages"),
        ({"lengths": [0]}, "lengths must be at least 1"),
        ({"tasks": ["passkey"], "output": "x.json"}, "--output belongs"),
        ({"tasks": ["passkey"], "heldout_length": 32}, "--heldout_length belongs to the short evaluation"),
        ({"scaled": "x@linear:4"}, "--scaled belongs to the report: give --tasks or --long_files"),
        ({"output_dir": "x"}, "--output_dir belongs to the report"),
        ({"depths": [0.0]}, "--depths belongs to the report"),
        ({"dtype": "int4"}, "unknown dtype"),
    ],
)
def test_bad_settings(settings: dict, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        SuiteConfig(**settings)


def test_every_option_is_explained() -> None:
    assert [field.name for field in fields(SuiteConfig) if not field.metadata.get("help")] == []
