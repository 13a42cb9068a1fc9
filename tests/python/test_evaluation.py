"""Perplexity, last words, relation divergences and the share of damage undone, against plain computations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama, make_tokenizer, random_ids, write_text

from linearard.capture import capture_states, enable_capture
from linearard.config import EvaluationConfig
from linearard.data import LastWordExample
from linearard.errors import UserError
from linearard.evaluation import (
    EvaluationData,
    check_same_tokens,
    damage_undone,
    evaluate_model,
    evaluation_batches,
    last_word_losses,
    mean_token_loss,
    relation_kl_by_layer,
)
from linearard.rope import RopeScaling, scale_rope

EXAMPLES = [
    LastWordExample("the cat saw the dog and then the", "cat"),
    LastWordExample("one", "two"),
    LastWordExample("it was said that the letter was in the house, and there was the", "letter"),
]


def test_mean_token_loss_is_that_of_transformers() -> None:
    model, windows = make_llama(), random_ids(5, 20)
    with torch.no_grad():
        expected = float(model(windows, labels=windows).loss)
    assert mean_token_loss(model, windows, batch=2) == pytest.approx(expected, rel=1e-5)


def test_last_words_one_by_one() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    expected = {}
    for example in EXAMPLES:
        context = [0, *tokenizer(example.context, add_special_tokens=False)["input_ids"]]
        word = tokenizer(" " + example.word, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([context + word])).logits[0, len(context) - 1 : -1]
        scores = logits.log_softmax(-1)
        loss = -float(scores[range(len(word)), word].sum())
        expected[len(context) + len(word)] = (loss, scores.argmax(-1).tolist() == word)
    losses, correct = last_word_losses(model, tokenizer, EXAMPLES, batch=2)
    in_order = [expected[length] for length in sorted(expected)]
    assert losses == pytest.approx([loss for loss, _ in in_order], rel=1e-4)
    assert correct == [hit for _, hit in in_order]


def test_a_word_that_the_model_is_sure_of_is_correct() -> None:
    model, tokenizer = make_llama(), make_tokenizer(bos=None)
    # The model's own continuation as the word of a passage.
    context = "the cat saw the dog and then the"
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    for _ in range(40):
        with torch.no_grad():
            following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        word = tokenizer.decode([following])
        if word.startswith(" ") and tokenizer(word, add_special_tokens=False)["input_ids"] == [following]:
            break
        ids.append(following)
    else:
        pytest.fail("this random model never continues with a whole word: take another seed")
    example = LastWordExample(tokenizer.decode(ids), word[1:])
    assert tokenizer(example.context, add_special_tokens=False)["input_ids"] == ids, "take another seed"
    losses, correct = last_word_losses(model, tokenizer, [example], batch=1)
    assert correct == [True]
    assert losses[0] < math.log(320)


def test_relation_divergence_of_a_scaled_model() -> None:
    teacher, student = make_llama(), make_llama()
    enable_capture(teacher)
    enable_capture(student)
    windows = random_ids(3, 16)
    same = relation_kl_by_layer(student, lambda ids: capture_states(teacher, ids), windows)
    assert all(abs(value) < 1e-5 for values in same.values() for value in values)
    scale_rope(student, RopeScaling.parse("linear:4"))
    scaled = relation_kl_by_layer(student, lambda ids: capture_states(teacher, ids), windows)
    assert {name: len(values) for name, values in scaled.items()} == dict.fromkeys(
        ("query", "key", "value", "attention"), 3
    )
    assert scaled["query"][0] > 1e-3
    assert scaled["value"][0] == pytest.approx(0, abs=1e-5), "the first layer's values do not depend on positions"
    assert scaled["value"][1] > 1e-4
    # The definition, for the keys of the last layer.
    per_window = []
    for row in windows.split(1):
        log_rows = []
        for model in (teacher, student):
            key = capture_states(model, row)[2].key.double()
            log_rows.append((key @ key.mT * 8**-0.5).log_softmax(-1))
        per_window.append((log_rows[0].exp() * (log_rows[0] - log_rows[1])).sum(-1).mean())
    assert scaled["key"][2] == pytest.approx(float(torch.stack(per_window).mean()), rel=1e-4)


def test_evaluation_reports_every_batch_and_keeps_the_mode(tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    config = EvaluationConfig(
        heldout_files=[str(write_text(tmp_path))], heldout_length=24, heldout_windows=5, last_word_number=9,
        relation_windows=2, evaluation_batch=2,
    )  # fmt: skip
    data = EvaluationData.load(config, tokenizer)
    enable_capture(model)
    model.train()
    batches: list[int] = []
    result = evaluate_model(model, tokenizer, data, lambda ids: capture_states(model, ids), batches.append)
    assert model.training
    assert sum(batches) == evaluation_batches(data, with_relations=True) == 3 + 5 + 2
    assert evaluation_batches(data, with_relations=False) == 8
    assert result.perplexity == pytest.approx(math.exp(mean_token_loss(model, data.windows, 2)), rel=1e-6)
    assert result.mean_relation_kl("query") == pytest.approx(0, abs=1e-6)
    assert evaluate_model(model, tokenizer, data).mean_relation_kl("query") is None


def test_damage_undone() -> None:
    assert damage_undone(50, 200, 200) == pytest.approx(0)
    assert damage_undone(50, 200, 100) == pytest.approx(0.5)
    assert damage_undone(50, 200, 50) == pytest.approx(1)
    assert damage_undone(50, 200, 400) == pytest.approx(-0.5)
    assert damage_undone(50, 50, 50) is None


def test_different_tokenizers_cannot_be_compared() -> None:
    check_same_tokens(make_tokenizer(), make_tokenizer())
    other = make_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(UserError, match="different tokenizers"):
        check_same_tokens(make_tokenizer(), other)
