"""Random problems for the property tests: shapes, strides, dtypes, masks, scales and options."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from generators import GENERATORS, perturbed
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCALES = st.one_of(st.none(), st.just(0.0), st.floats(-0.4, 0.6))


@dataclass
class Problem:
    """Arguments of a call: the tensors in order, the options of the kernels and those of the reduction."""

    inputs: tuple[Tensor, ...]
    options: dict = field(default_factory=dict)
    reduction: dict = field(default_factory=dict)

    def to(self, device: torch.device) -> Problem:
        """The same problem on a device, with the same strides."""
        options, reduction = (
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
            for values in (self.options, self.reduction)
        )
        return Problem(tuple(_strided_on(device, x) for x in self.inputs), options, reduction)


def _strided_on(device: torch.device, x: Tensor) -> Tensor:
    """Unlike x.to(device), which fills gaps between the vectors of a view."""
    if device.type == "cpu":
        return x
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.full((reach,), float("nan"), dtype=x.dtype, device=device)
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def _restride(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; the last dimension stays contiguous."""
    if layout == "tokens_first":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "heads_inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        padded = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 1), float("nan"), dtype=x.dtype)
        padded[:, :, ::2, :-1] = x
        return padded[:, :, ::2, :-1]
    return x.contiguous()


LAYOUTS = st.sampled_from(["contiguous", "tokens_first", "heads_inside", "gaps"])


@st.composite
def _boundaries(draw, tokens: int, sequences: int | None = None) -> Tensor:
    """cu_seqlens from 0 to `tokens`, with `sequences` sequences when that is given."""
    count = draw(st.integers(1, min(tokens, 6))) if sequences is None else sequences
    inner = draw(st.sets(st.integers(1, tokens - 1), min_size=count - 1, max_size=count - 1)) if count > 1 else set()
    return torch.tensor([0, *sorted(inner), tokens], dtype=draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def _mask(draw, batch: int, tokens: int, generator: torch.Generator) -> Tensor | None:
    share = draw(st.sampled_from([None, 0.0, 0.2, 0.7, 1.0]))
    return None if share is None else torch.rand(batch, tokens, generator=generator) >= share


@st.composite
def _options(draw) -> dict:
    options = {
        "causal": draw(st.booleans()),
        "divergence": draw(st.sampled_from(["forward_kl", "forward_kl", "reverse_kl", "jsd"])),
        "beta": draw(st.floats(0.01, 0.99)),
        "scale_student": draw(SCALES),
        "scale_teacher": draw(SCALES),
    }
    return {name: value for name, value in options.items() if value is not None}


@st.composite
def _reduction(draw, batch: int, tokens: int, generator: torch.Generator) -> dict:
    reduction = {"reduction": draw(st.sampled_from(["none", "sum", "mean"]))}
    if draw(st.booleans()):
        reduction["row_weight"] = torch.rand(batch, tokens, generator=generator)
    if reduction["reduction"] == "mean" and draw(st.booleans()):
        reduction["num_items"] = torch.tensor(draw(st.integers(1, 1000)))
    return reduction


@st.composite
def relation_problems(draw) -> Problem:
    """Calls of relation_kl; the teacher is Gaussian or realistic, the student near or far."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 3))
    heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 140))
    student_dim = draw(st.integers(1, 80))
    teacher_dim = draw(st.one_of(st.just(student_dim), st.integers(1, 80)))
    make = GENERATORS[draw(st.sampled_from(sorted(GENERATORS)))]
    seed = draw(st.integers(0, 2**31))
    teacher = make(batch, heads, tokens, teacher_dim, seed=seed)
    if student_dim == teacher_dim:
        student = perturbed(teacher, draw(st.sampled_from([0.0, 1e-3, 0.03, 0.3, 1.0])), seed=seed + 1)
    else:
        student = make(batch, heads, tokens, student_dim, seed=seed + 1)
    student = _restride(student.to(draw(st.sampled_from(DTYPES))), draw(LAYOUTS))
    teacher = _restride(teacher.to(draw(st.sampled_from(DTYPES))), draw(LAYOUTS))
    options = draw(_options())
    if (mask := draw(_mask(batch, tokens, generator))) is not None:
        options["key_padding_mask"] = mask
    if packed:
        options["cu_seqlens"] = draw(_boundaries(tokens))
    return Problem((student, teacher), options, draw(_reduction(batch, tokens, generator)))


@st.composite
def attention_problems(draw) -> Problem:
    """Calls of attention_kl: different numbers of queries and keys, groups, masks on both, packed or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 3))
    key_heads = draw(st.integers(1, 2))
    query_heads = key_heads * draw(st.integers(1, 3))
    queries = draw(st.integers(1, 100))
    keys = draw(st.one_of(st.just(queries), st.integers(1, 100)))
    head_dim = draw(st.integers(1, 70))
    seed = draw(st.integers(0, 2**31))
    make = GENERATORS[draw(st.sampled_from(sorted(GENERATORS)))]
    teacher = (
        make(batch, query_heads, queries, head_dim, seed=seed),
        make(batch, key_heads, keys, head_dim, seed=seed + 1),
    )
    eps = draw(st.sampled_from([0.0, 1e-3, 0.03, 0.3, 1.0]))
    student_dtype, teacher_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    student = (perturbed(teacher[0], eps, seed=seed + 2), perturbed(teacher[1], eps, seed=seed + 3))
    inputs = tuple(_restride(x.to(student_dtype), draw(LAYOUTS)) for x in student)
    inputs += tuple(_restride(x.to(teacher_dtype), draw(LAYOUTS)) for x in teacher)
    options = draw(_options())
    for name, tokens in (("query_padding_mask", queries), ("key_padding_mask", keys)):
        if (mask := draw(_mask(batch, tokens, generator))) is not None:
            options[name] = mask
    if packed:
        sequences = draw(st.integers(1, min(queries, keys, 5)))
        options["cu_seqlens"] = draw(_boundaries(queries, sequences))
        options["cu_seqlens_key"] = draw(_boundaries(keys, sequences))
    return Problem(inputs, options, draw(_reduction(batch, queries, generator)))
