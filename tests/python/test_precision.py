"""The exactness that the project promises, literally: every row, every head, against float64 on the same inputs.

kl: within 1e-4 relative from 1e-3 nats, within 1e-2 from 1e-6 nats, never below -1e-7 (float64: 1e-9 relative).
Gradients in the Frobenius norm: 2e-4 (float32), 4e-3 (bfloat16), 1e-3 (float16), 1e-9 (float64), plus the rounding
floor 5e-7 (1 + mean s_ii) |scale (P + P^T) X|. Student = teacher + eps noise, eps from 0.3 to 0.003.
"""

from __future__ import annotations

import pytest
import torch
from comparison import (
    TINY_VALUE_PROMISE,
    assert_gradient_close,
    assert_rows_close,
    assert_within,
    expected_attention,
    expected_relation,
)
from generators import GENERATORS, LARGEST_DIAGONAL, PROFILES, gaussian, perturbed, realistic

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
HEADS, TOKENS, HEAD_DIM = len(PROFILES), 200, 64
EPS = [0.3, 0.1, 0.03, 0.01, 0.003]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check_promise(student, teacher, **options) -> None:
    """No allowance for the rounding of logits in the values, none but the promised floor in the gradient."""
    expected = expected_relation(student, teacher, promised_floor=True, **options)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    gradient = ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher, **options)
    assert kl.min().item() >= -TINY_VALUE_PROMISE
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])
    if expected.dtype == torch.float64:
        # At 1e-9 the rounding of float64 logits is visible in rows near zero; it is granted there.
        assert_rows_close(kl, expected)
    else:
        assert_rows_close(kl, expected, logit_rounding=False)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("data", GENERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_is_teacher_plus_noise(device, dtype, data, eps):
    teacher = GENERATORS[data](1, HEADS, TOKENS, HEAD_DIM, device=device)
    check_promise(perturbed(teacher, eps).to(dtype), teacher.to(dtype))


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_in_proportion_to_the_activations(device, dtype, eps):
    teacher = realistic(1, HEADS, TOKENS, HEAD_DIM, seed=5, device=device)
    check_promise(perturbed(teacher, eps, multiplicative=True).to(dtype), teacher.to(dtype))


@pytest.mark.parametrize("data", GENERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_is_1_02_times_the_teacher(device, dtype, data):
    """Every logit moves in the same direction: lse differs by nats while the distributions stay close."""
    teacher = GENERATORS[data](1, HEADS, TOKENS, HEAD_DIM, seed=7, device=device).to(dtype)
    check_promise((1.02 * teacher.double()).to(dtype), teacher)


@pytest.mark.parametrize("eps", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("data", GENERATORS)
def test_causal(device, data, eps):
    teacher = GENERATORS[data](1, HEADS, TOKENS, HEAD_DIM, seed=9, device=device)
    check_promise(perturbed(teacher, eps).float(), teacher.float(), causal=True)


@pytest.mark.parametrize("head_dim", [8, 128, 256])
@pytest.mark.parametrize("data", GENERATORS)
def test_other_head_dims(device, data, head_dim):
    teacher = GENERATORS[data](1, HEADS, 150, head_dim, seed=11, device=device)
    check_promise(perturbed(teacher, 0.03).float(), teacher.float())


def test_long_sequence(device):
    """More tokens than any tile, so that partial sums of many tiles meet."""
    teacher = realistic(1, 2, 1100, HEAD_DIM, seed=13, device=device)
    check_promise(perturbed(teacher, 0.02).float(), teacher.float())


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("eps", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("data", GENERATORS)
def test_other_divergences_never_below_zero(device, divergence, eps, data):
    """The promise on the values holds for every divergence; what the rounding of the logits costs is granted here."""
    teacher = GENERATORS[data](1, HEADS, TOKENS, HEAD_DIM, seed=15, device=device).float()
    student = perturbed(teacher.double(), eps).float()
    expected = expected_relation(student, teacher, divergence=divergence)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, divergence=divergence)
    assert kl.min().item() >= -TINY_VALUE_PROMISE
    assert_rows_close(kl, expected)
    gradient = ops.relation_kl_backward(
        torch.ones_like(kl), student, teacher, lse_student, lse_teacher, divergence=divergence
    )
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


# Nearly uniform students of teachers with rows of up to 600 nats: sum_j Q_ij (r_ij - mean) cancels 570 nats, and a mean
# that is off by the rounding of sum_j Q_ij costs ten times what is allowed here.
FAR_SCALES = [(-0.044, 0.125), (-0.0032, 0.5), (0.02, 0.6)]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("scales", FAR_SCALES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_far_from_convergence(device, divergence, scales, causal):
    teacher = realistic(2, HEADS, 60, HEAD_DIM, seed=23, device=device).float()
    student = perturbed(teacher.double(), 1e-3).float()
    options = {"divergence": divergence, "causal": causal, "scale_student": scales[0], "scale_teacher": scales[1]}
    expected = expected_relation(student, teacher, **options)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    gradient = ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher, **options)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("scales", FAR_SCALES)
def test_gradient_of_attention_maps_far_from_convergence(device, scales):
    teacher = [realistic(2, HEADS, 60, HEAD_DIM, seed=seed, device=device).float() for seed in (25, 26)]
    student = [perturbed(x.double(), 1e-3, seed=seed).float() for seed, x in enumerate(teacher, 27)]
    options = {"divergence": "reverse_kl", "scale_student": scales[0], "scale_teacher": scales[1]}
    expected = expected_attention((*student, *teacher), **options)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*student, *teacher, **options)
    gradients = ops.attention_kl_backward(torch.ones_like(kl), *student, *teacher, lse_student, lse_teacher, **options)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)


@pytest.mark.parametrize("eps", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("data", GENERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_maps(device, dtype, data, eps):
    teacher = [GENERATORS[data](1, HEADS, 150, HEAD_DIM, seed=seed, device=device) for seed in (17, 18)]
    student = [perturbed(x, eps, seed=seed).to(dtype) for seed, x in enumerate(teacher, 19)]
    teacher = [x.to(dtype) for x in teacher]
    expected = expected_attention((*student, *teacher))
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*student, *teacher)
    assert kl.min().item() >= -TINY_VALUE_PROMISE
    assert_rows_close(kl, expected)
    gradients = ops.attention_kl_backward(torch.ones_like(kl), *student, *teacher, lse_student, lse_teacher)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)


def _misleading_tiles(device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries and keys whose last key, a tile of its own, has no mass and is off by 0.4 to 0.65 nats."""
    queries, keys = 200, 129
    is_last = (torch.arange(keys, device=device) == keys - 1).double()
    off = torch.linspace(0.4, 0.65, queries, dtype=torch.float64, device=device)
    query, key = (gaussian(1, 1, n, HEAD_DIM, seed=seed, device=device) for n, seed in ((queries, 31), (keys, 32)))
    student = [perturbed(query, 1.3e-3, seed=33), perturbed(key, 1.3e-3, seed=34)]
    for (x, y), extra in ((student, off), ((query, key), 0.0)):
        x[..., 0], x[..., 1] = HEAD_DIM**0.5, extra * HEAD_DIM**0.5
        y[..., 0], y[..., 1] = -20.0 * is_last, is_last
    return [x.float() for x in student], [query.float(), key.float()]


def test_rows_whose_first_tile_says_little(device):
    """The shift that the CPU takes from a row's first tile is so far off that the sums lose four digits."""
    student, teacher = _misleading_tiles(device)
    expected = expected_attention((*student, *teacher), causal=False)
    assert (expected.rows.kl < 1e-5).all()
    kl, _, _ = ops.attention_kl_forward(*student, *teacher, causal=False)
    assert_rows_close(kl, expected, logit_rounding=False)


@pytest.mark.parametrize("scale_teacher", [0.58, 1.2])
def test_rows_of_large_logits(device, scale_teacher):
    """Rows of 0.1 to 2 nats whose log-sum-exps are 10 and 80 or 150: their difference has the rounding of those."""
    teacher = [gaussian(2, 2, 257, 128, seed=35, device=device).float()] * 2
    student = [perturbed(teacher[0].double(), 0.3, seed=36).float()] * 2
    options = {"causal": False, "divergence": "reverse_kl", "scale_student": 0.1, "scale_teacher": scale_teacher}
    expected = expected_attention((*student, *teacher), **options)
    kl, _, _ = ops.attention_kl_forward(*student, *teacher, **options)
    assert_rows_close(kl, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_saturated_attention_maps(device, dtype):
    """A row that one key has wholly: its gradient is smaller than the rounding of the log-sum-exps."""
    teacher = [realistic(1, 1, 60, HEAD_DIM, seed=39, device=device)] * 2
    student = [(x * (1.0 + 1e-6)).to(dtype) for x in teacher]
    teacher = [x.to(dtype) for x in teacher]
    expected = expected_attention((*student, *teacher))
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*student, *teacher)
    gradients = ops.attention_kl_backward(torch.ones_like(kl), *student, *teacher, lse_student, lse_teacher)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor / 20.0)


def test_mean_over_a_head_is_exact_to_a_hundred_thousandth(device):
    """The errors of the rows are independent: the scalar that training sees is far more exact than a row."""
    teacher = realistic(1, HEADS, TOKENS, HEAD_DIM, seed=21, device=device)
    for eps in EPS:
        student = perturbed(teacher, eps).float()
        expected = expected_relation(student, teacher.float())
        kl, _, _ = ops.relation_kl_forward(student, teacher.float())
        exact = expected.rows.kl.mean(-1)
        # Rows within their promise, with errors of either sign: sqrt(TOKENS) times better than one row.
        promise = torch.where(exact >= 1e-3, 1e-4, 1e-2) / TOKENS**0.5
        assert_within(kl.double().mean(-1), exact, promise * exact, f"mean kl at eps {eps}")


def test_the_realistic_data_are_what_they_claim():
    """Spread of lse, ramp of the norms, outliers and saturated rows as measured on a real model."""
    x = realistic(1, HEADS, TOKENS, HEAD_DIM)
    expected = expected_relation(x, x)
    lse = expected.rows.lse_teacher[0]
    norms = torch.linalg.vector_norm(x[0], dim=-1)
    diagonal = norms**2 / HEAD_DIM**0.5
    ramp, outlier, saturated, flat = range(HEADS)
    assert lse[ramp].max() - lse[ramp].min() > 0.9 * LARGEST_DIAGONAL
    assert norms[ramp].max() / norms[ramp].min() > 60
    assert lse[outlier, :4].min() > 5 * lse[outlier, 4:].median()
    assert (diagonal[saturated] - lse[saturated]).exp().median() > 0.99
    assert (diagonal[flat] - lse[flat]).exp().median() < 0.05
