"""The ARD loss: its value, its normalisation, padding and packed sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearard.capture import LayerStates
from linearard.errors import UserError
from linearard.losses import RELATIONS, ARDLoss, parse_relations, sequence_boundaries

SHAPE = {"query": (2, 4, 7, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 8)}
ALL = dict.fromkeys(RELATIONS, 1.0)


def states(seed: int, device: torch.device | str = "cpu", layers: int = 2) -> dict[int, LayerStates]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: LayerStates(
            *(torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in SHAPE.values()),
            scale=0.3,
        )
        for layer in range(layers)
    }


def cut(layers: dict[int, LayerStates], batch: slice, tokens: slice) -> dict[int, LayerStates]:
    return {
        index: LayerStates(*(x[batch, :, tokens] for x in (s.query, s.key, s.value)), scale=s.scale)
        for index, s in layers.items()
    }


def expected(student: Tensor, teacher: Tensor, keys: tuple[Tensor, Tensor], scale: float, causal: bool) -> Tensor:
    """Mean over heads and tokens of KL(teacher || student), from the definition in float64."""

    def log_rows(x: Tensor, y: Tensor) -> Tensor:
        logits = scale * x.double() @ y.double().repeat_interleave(x.shape[1] // y.shape[1], 1).mT
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -1e300)
        return logits.log_softmax(-1)

    log_p, log_q = log_rows(teacher, keys[1]), log_rows(student, keys[0])
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("causal", [False, True])
def test_value_from_the_definition(device: torch.device, causal: bool) -> None:
    student, teacher = states(0, device), states(1, device)
    loss, parts = ARDLoss({**ALL, "value": 2.0}, causal=causal)(student, teacher)
    by_relation = {}
    for name in ("query", "key", "value"):
        pairs = [(getattr(student[i], name), getattr(teacher[i], name)) for i in student]
        by_relation[name] = torch.stack([expected(s, t, (s, t), 8**-0.5, causal) for s, t in pairs]).mean()
    by_relation["attention"] = torch.stack(
        [expected(student[i].query, teacher[i].query, (student[i].key, teacher[i].key), 0.3, True) for i in student]
    ).mean()
    for name, value in by_relation.items():
        torch.testing.assert_close(parts[name].double(), value, rtol=1e-5, atol=1e-6)
    total = sum(by_relation.values()) + by_relation["value"]
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-6)


def test_every_relation_gives_its_tensors_gradients(device: torch.device) -> None:
    for name, reached in {"query": "query", "key": "key", "value": "value", "attention": "query key"}.items():
        student = states(0, device)
        loss, _ = ARDLoss({name: 1.0})(student, states(1, device))
        loss.backward()
        for tensor in ("query", "key", "value"):
            gradient = getattr(student[0], tensor).grad
            assert (gradient is not None) == (tensor in reached.split())


def test_the_teacher_is_detached_and_the_same_model_has_no_loss(device: torch.device) -> None:
    teacher = states(0, device)
    loss, _ = ARDLoss(ALL)(states(0, device), teacher)
    loss.backward()
    assert teacher[0].query.grad is None
    assert abs(float(loss.detach())) < 1e-5


def test_micro_batches_add_up_to_the_batch(device: torch.device) -> None:
    student, teacher = states(0, device), states(1, device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[1, 3:] = False
    whole, parts = ARDLoss(ALL)(student, teacher, key_padding_mask=mask)
    tokens = mask.sum()
    pieces = []
    for row in range(2):
        batch = slice(row, row + 1)
        piece, _ = ARDLoss(ALL)(
            cut(student, batch, slice(None)), cut(teacher, batch, slice(None)),
            key_padding_mask=mask[batch], num_items=tokens,
        )  # fmt: skip
        pieces.append(piece)
    torch.testing.assert_close(torch.stack(pieces).sum(), whole, rtol=1e-5, atol=1e-6)
    assert set(parts) == set(RELATIONS)


def test_padding_counts_for_nothing(device: torch.device) -> None:
    student, teacher = states(0, device), states(1, device)
    mask = torch.zeros(1, 7, dtype=torch.bool, device=device)
    mask[:, :4] = True
    one = slice(0, 1)
    padded, _ = ARDLoss(ALL)(cut(student, one, slice(None)), cut(teacher, one, slice(None)), key_padding_mask=mask)
    short, _ = ARDLoss(ALL)(cut(student, one, slice(0, 4)), cut(teacher, one, slice(0, 4)))
    torch.testing.assert_close(padded, short, rtol=1e-5, atol=1e-6)


def test_packed_sequences_do_not_see_each_other(device: torch.device) -> None:
    student, teacher = states(0, device), states(1, device)
    one = slice(0, 1)
    boundaries = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    packed, _ = ARDLoss(ALL)(cut(student, one, slice(None)), cut(teacher, one, slice(None)), cu_seqlens=boundaries)
    parts = [
        ARDLoss(ALL)(cut(student, one, tokens), cut(teacher, one, tokens), num_items=torch.tensor(7))[0]
        for tokens in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(packed, parts[0] + parts[1], rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_its_dtype(device: torch.device) -> None:
    student, teacher = states(0, device), states(1, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = ARDLoss({"query": 1.0})(student, teacher)
    rounded = {i: LayerStates(s.query.bfloat16(), s.key, s.value, s.scale) for i, s in student.items()}
    rounded_teacher = {i: LayerStates(s.query.bfloat16(), s.key, s.value, s.scale) for i, s in teacher.items()}
    reference, _ = ARDLoss({"query": 1.0})(rounded, rounded_teacher)
    torch.testing.assert_close(loss, reference, rtol=0, atol=0)
    loss.backward()
    assert student[0].query.grad is not None
    assert student[0].query.grad.dtype == torch.float32


def test_different_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="different layers"):
        ARDLoss(ALL)(states(0), states(1, layers=1))


def test_boundaries_from_position_ids() -> None:
    boundaries = sequence_boundaries(torch.tensor([[0, 1, 2, 0, 1, 0]]))
    assert boundaries is not None
    assert boundaries.tolist() == [0, 3, 5, 6]
    assert boundaries.dtype == torch.int32
    assert sequence_boundaries(torch.arange(5)[None]) is None
    assert sequence_boundaries(torch.arange(5).expand(2, 5)) is None


def test_relations_with_weights() -> None:
    assert parse_relations(["query", "attention:0.5"]) == {"query": 1.0, "attention": 0.5}


@pytest.mark.parametrize(
    "items", [["querry"], ["query:0"], ["query:-1"], ["query:x"], ["query:inf"], ["query", "query"], []]
)
def test_bad_relations(items: list[str]) -> None:
    with pytest.raises(UserError, match="relation"):
        parse_relations(items)


def test_layer_weights_and_temperature() -> None:
    student, teacher = states(0, layers=3), states(1, layers=3)
    values = ARDLoss({"key": 2.0}, temperature=2.0).by_layer(student, teacher)["key"]
    loss, parts = ARDLoss({"key": 2.0}, temperature=2.0, layer_weights={0: 1.0, 1: 3.0, 2: 4.0})(student, teacher)
    torch.testing.assert_close(loss, 2 * (values[0] + 3 * values[1] + 4 * values[2]) / 8)
    torch.testing.assert_close(parts["key"], torch.stack(values).mean(), msg="parts are not weighted")
    cooled = expected(student[1].key, teacher[1].key, (student[1].key, teacher[1].key), 8**-0.5 / 2, False)
    torch.testing.assert_close(values[1].double(), cooled, rtol=1e-5, atol=1e-6)


def test_attention_factor_is_divided_out_of_queries_and_keys() -> None:
    student, teacher = states(0), states(1)
    factor = 1.3
    # As YaRN leaves them: queries and keys larger by the factor, values as they are.
    larger = {i: LayerStates(factor * s.query, factor * s.key, s.value, s.scale) for i, s in student.items()}
    plain, _ = ARDLoss(ALL)(student, teacher)
    divided, _ = ARDLoss(ALL, attention_factors=dict.fromkeys(student, factor))(larger, teacher)
    torch.testing.assert_close(divided, plain, rtol=1e-5, atol=1e-6)
    assert abs(float(ARDLoss(ALL)(larger, teacher)[0].detach() - plain.detach())) > 1e-2
    # One layer has another RoPE, without a factor: it is stacked with none of the others.
    mixed = {**larger, 1: student[1]}
    factors = {0: factor, 2: factor}
    torch.testing.assert_close(ARDLoss(ALL, attention_factors=factors)(mixed, teacher)[0], plain, rtol=1e-5, atol=1e-6)
    # Before queries and keys are rounded, so that they are rounded to what they would be without it.
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = ARDLoss(ALL)(student, teacher)
        divided, _ = ARDLoss(ALL, attention_factors=dict.fromkeys(student, factor))(larger, teacher)
    torch.testing.assert_close(divided, rounded, rtol=2e-5, atol=0)
