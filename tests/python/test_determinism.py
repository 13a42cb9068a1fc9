"""deterministic=True: the same bits from run to run, and from one and from two threads."""

from __future__ import annotations

import pytest
import torch
from generators import gaussian, perturbed, realistic

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
OPTIONS = [
    {},
    {"causal": True},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "causal": True},
    {"cu_seqlens": torch.tensor([0, 100, 333, 700])},
]


@pytest.fixture
def threads():
    """Set the number of intra-op threads for a test and restore it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relation_results(student, teacher, **options):
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    gradient = ops.relation_kl_backward(kl, student, teacher, lse_student, lse_teacher, **options)
    return kl, lse_student, lse_teacher, gradient, ops.relation_kl(student, teacher, reduction="sum", **options)


def attention_results(query, key, query_teacher, key_teacher, **options):
    inputs = (query, key, query_teacher, key_teacher)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs, **options)
    return kl, *ops.attention_kl_backward(kl, *inputs, lse_student, lse_teacher, **options)


def assert_same_bits(left, right) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"output {index} differs by up to {(a.double() - b.double()).abs().max()}"


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()} | {"deterministic": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_relation_from_run_to_run(device, options, dtype):
    teacher = realistic(1, 4, 700, 40, device=device)
    student, teacher = perturbed(teacher, 0.1).to(dtype), teacher.to(dtype)
    options = on(device, options)
    first = relation_results(student, teacher, **options)
    for _ in range(3):
        assert_same_bits(relation_results(student, teacher, **options), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_relation_with_one_and_two_threads(threads, options, dtype):
    teacher = realistic(1, 3, 700, 40)
    student, teacher = perturbed(teacher, 0.1).to(dtype), teacher.to(dtype)
    options = on("cpu", options)
    threads(1)
    one = relation_results(student, teacher, **options)
    threads(2)
    assert_same_bits(relation_results(student, teacher, **options), one)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_with_one_and_two_threads(threads, options):
    teacher = [gaussian(1, heads, 700, 40, seed=heads).float() for heads in (4, 2)]
    student = [perturbed(x.double(), 0.1).float() for x in teacher]
    options = on("cpu", options)
    threads(1)
    one = attention_results(*student, *teacher, **options)
    threads(2)
    for _ in range(2):
        assert_same_bits(attention_results(*student, *teacher, **options), one)


def test_unset_follows_the_global_switch(device):
    """torch.use_deterministic_algorithms decides when the argument is None."""
    teacher = gaussian(1, 2, 300, 32, device=device).float()
    student = perturbed(teacher.double(), 0.1).float()
    explicit = relation_results(student, teacher, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(relation_results(student, teacher), explicit)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_batch_entry_does_not_depend_on_its_neighbours(device):
    """What a head gives alone it gives in any batch, bit by bit."""
    teacher = realistic(2, 4, 200, 32, device=device)
    student, teacher = perturbed(teacher, 0.1).float(), teacher.float()
    together = relation_results(student, teacher, deterministic=True)[:4]
    for b in range(2):
        for h in range(4):
            at = (slice(b, b + 1), slice(h, h + 1))
            alone = relation_results(student[at], teacher[at], deterministic=True)[0]
            assert torch.equal(alone, together[0][at])
