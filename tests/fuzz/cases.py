"""What a fuzz case does: draw a call from a random.Random, make it, and judge the outcome."""

from __future__ import annotations

import random

import torch
from comparison import (
    assert_gradient_close,
    assert_lse_close,
    assert_rows_close,
    expected_attention,
    expected_relation,
)
from generators import GENERATORS, perturbed
from torch import Tensor

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def _length(generator: random.Random) -> int:
    """Mostly small, often next to a power of two, where tiles begin and end."""
    if generator.random() < 0.3:
        return max(1, 2 ** generator.randrange(9) + generator.choice([-1, 0, 1]))
    return generator.randrange(1, 150)


def _boundaries(generator: random.Random, length: int, sequences: int) -> Tensor:
    inner = sorted(generator.sample(range(1, length), sequences - 1)) if sequences > 1 else []
    return torch.tensor([0, *inner, length], dtype=generator.choice([torch.int32, torch.int64]))


def _mask(generator: random.Random, batch: int, length: int) -> Tensor:
    return torch.rand(batch, length) < generator.choice([0.0, 0.3, 0.8, 1.0])


def _restride(generator: random.Random, x: Tensor) -> Tensor:
    """The same bits under other strides; gaps hold NaN."""
    kind = generator.randrange(4)
    if kind == 0:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if kind == 2:
        padded = torch.full((*x.shape[:3], x.shape[3] + generator.randrange(1, 9)), float("nan"), dtype=x.dtype)
        padded[..., : x.shape[3]] = x
        return padded[..., : x.shape[3]]
    return x


def _options(generator: random.Random) -> dict:
    options = {"causal": generator.random() < 0.5, "divergence": generator.choice(DIVERGENCES)}
    if generator.random() < 0.5:
        options["beta"] = generator.uniform(0.01, 0.99)
    for side in ("scale_student", "scale_teacher"):
        if generator.random() < 0.3:
            options[side] = generator.choice([0.0, generator.uniform(-0.4, 0.6)])
    return options


class Call:
    """A valid call: operator, tensors by name, and options of the kernels."""

    def __init__(self, generator: random.Random, fill) -> None:
        """`fill(shape, dtype)` makes the tensors of a student and of a teacher: it is called once for each pair."""
        self.operator = generator.choice(["relation_kl", "relation_kl", "attention_kl"])
        packed = generator.random() < 0.25
        batch = 1 if packed else generator.randrange(1, 4)
        student_dtype, teacher_dtype = generator.choice(DTYPES), generator.choice(DTYPES)
        queries = _length(generator)
        keys = queries if self.operator == "relation_kl" or generator.random() < 0.5 else _length(generator)
        key_heads = generator.randrange(1, 4)
        heads = key_heads * generator.randrange(1, 4) if self.operator == "attention_kl" else key_heads
        dimension = generator.choice([generator.randrange(1, 100), 64, 128, generator.randrange(1, 513)])
        self.options = _options(generator)
        if self.operator == "relation_kl":
            pairs = {("student", "teacher"): (batch, heads, queries, dimension)}
        else:
            pairs = {
                ("query_student", "query_teacher"): (batch, heads, queries, dimension),
                ("key_student", "key_teacher"): (batch, key_heads, keys, dimension),
            }
        made = {}
        for (student, teacher), shape in pairs.items():
            x, y = fill(shape, student_dtype, teacher_dtype)
            made[student], made[teacher] = _restride(generator, x), _restride(generator, y)
        order = ["student", "teacher"]
        if self.operator == "attention_kl":
            order = ["query_student", "key_student", "query_teacher", "key_teacher"]
        self.tensors = {name: made[name] for name in order}
        self.rows = (batch, heads, queries)
        self._draw_masks(generator, packed, batch, queries, keys)

    def _draw_masks(self, generator: random.Random, packed: bool, batch: int, queries: int, keys: int) -> None:
        if generator.random() < 0.4:
            self.options["key_padding_mask"] = _mask(generator, batch, keys)
        if self.operator == "attention_kl" and generator.random() < 0.4:
            self.options["query_padding_mask"] = _mask(generator, batch, queries)
        if packed:
            sequences = generator.randrange(1, min(queries, keys, 6) + 1)
            self.options["cu_seqlens"] = _boundaries(generator, queries, sequences)
            if self.operator == "attention_kl":
                self.options["cu_seqlens_key"] = _boundaries(generator, keys, sequences)

    def run(self, grad_kl: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """(kl, lse_student, lse_teacher, gradients of the student's tensors)."""
        inputs = tuple(self.tensors.values())
        kl, lse_student, lse_teacher = getattr(ops, f"{self.operator}_forward")(*inputs, **self.options)
        backward = getattr(ops, f"{self.operator}_backward")
        gradients = backward(grad_kl.to(kl.dtype), *inputs, lse_student, lse_teacher, **self.options)
        return kl, lse_student, lse_teacher, (gradients,) if isinstance(gradients, Tensor) else tuple(gradients)


def compare_with_oracle(generator: random.Random) -> None:
    """Ordinary numbers: everything agrees with the oracle within the stated tolerances."""
    make = GENERATORS[generator.choice(sorted(GENERATORS))]
    eps = generator.choice([0.0, 1e-3, 0.03, 0.3, 1.0])
    seed = generator.randrange(2**31)

    def fill(shape, student_dtype, teacher_dtype):
        teacher = make(*shape, seed=seed)
        return perturbed(teacher, eps, seed=seed + 1).to(student_dtype), teacher.to(teacher_dtype)

    call = Call(generator, fill)
    grad_kl = torch.rand(call.rows, dtype=torch.float64).float().double() - 0.25
    inputs = tuple(call.tensors.values())
    if call.operator == "relation_kl":
        expected = expected_relation(*inputs, grad_kl, **call.options)
    else:
        expected = expected_attention(inputs, grad_kl, **call.options)
    kl, lse_student, lse_teacher, gradients = call.run(grad_kl)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)


def _random_bits(shape, dtype: torch.dtype) -> Tensor:
    """Every bit pattern of the dtype with equal probability: all exponents, subnormals, NaNs with payloads."""
    integer = INTEGER_OF_SIZE[torch.finfo(dtype).bits // 8]
    info = torch.iinfo(integer)
    low, high = info.min // 2, info.max // 2  # random_ spans less than the whole of int64
    return (torch.empty(shape, dtype=integer).random_(low, high) * 2 + torch.randint(2, shape)).to(integer).view(dtype)


def arbitrary_bits(generator: random.Random) -> None:
    """Finite bit patterns give finite results; others may give anything in the heads that they touch, but no crash."""
    finite = generator.random() < 0.6
    narrow = generator.random() < 0.5

    def one(shape, dtype):
        x = _random_bits(shape, dtype)
        if narrow:  # one exponent for the tensor: sizes at which sums, not single products, overflow
            x = torch.randn(shape, dtype=torch.float64) * 2.0 ** generator.randrange(-140, 128)
            x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        return torch.where(torch.isfinite(x), x, torch.zeros((), dtype=dtype)) if finite else x

    call = Call(generator, lambda shape, student, teacher: (one(shape, student), one(shape, teacher)))
    kl, lse_student, lse_teacher, gradients = call.run(torch.ones(call.rows))
    if finite:
        named = {"kl": kl, "lse_student": lse_student, "lse_teacher": lse_teacher}
        named |= {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
        for name, value in named.items():
            bad = ~torch.isfinite(value)
            assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} not finite; {describe(call)}"
        options = {k: v for k, v in call.options.items() if "lse" not in k}
        for reduction in ("sum", "mean"):
            value = getattr(ops, call.operator)(*call.tensors.values(), reduction=reduction, **options)
            assert torch.isfinite(value), f"{reduction} is {value.item()}; {describe(call)}"


def describe(call: Call) -> str:
    """Shapes, dtypes and plain options of a call."""
    tensors = {name: (tuple(x.shape), str(x.dtype)) for name, x in call.tensors.items()}
    options = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in call.options.items()}
    return f"{call.operator} {tensors} {options}"


def _spoil_tensor(generator: random.Random, call: Call) -> None:
    name = generator.choice(list(call.tensors))
    x = call.tensors[name]
    spoiled = [
        x.to(generator.choice([torch.int32, torch.bool, torch.complex64])),
        x[0],
        x[None],
        torch.cat([x, x], 2),
        torch.cat([x, x], 0),
        torch.zeros(*x.shape[:3], 2 * x.shape[3] + 2)[..., ::2],
        torch.zeros(*x.shape[:3], 513),
        torch.zeros(*x.shape[:3], 0),
        x.to("meta"),
    ]
    call.tensors[name] = generator.choice(spoiled)


def _spoil_option(generator: random.Random, call: Call) -> None:
    batch, heads, queries = call.rows
    boundaries = [[], [0], [1, queries], [0, queries + 1], [0, -1, queries], [0, 0, queries], [2**31, 5], [queries, 0]]
    spoiled = {
        "divergence": generator.choice(["", "kl", "FORWARD_KL", "forward_kl "]),
        "beta": generator.choice([0.0, 1.0, -1.0, 2.0, float("nan"), float("inf")]),
        "scale_student": generator.choice([float("nan"), float("inf"), -float("inf")]),
        "key_padding_mask": generator.choice(
            [torch.ones(batch, queries + 999, dtype=torch.bool), torch.ones(heads), torch.ones(batch, queries)]
        ),
        "cu_seqlens": torch.tensor(generator.choice(boundaries), dtype=torch.int64),
    }
    name = generator.choice(list(spoiled))
    call.options[name] = spoiled[name]


def invalid_call(generator: random.Random) -> None:
    """One spoiled argument: RuntimeError from the operator, with its name first."""
    call = Call(
        generator, lambda shape, student, teacher: (torch.randn(shape).to(student), torch.randn(shape).to(teacher))
    )
    generator.choice([_spoil_tensor, _spoil_option])(generator, call)
    name = call.operator + generator.choice(["", "_forward"])
    try:
        getattr(ops, name)(*call.tensors.values(), **call.options)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        # What depends on values is found by the kernel, which has a name of its own.
        assert first.startswith((f"{name}: ", f"{call.operator}: ", f"{call.operator}_forward: ")), (
            f"not in our words: {first}; {describe(call)}"
        )
        return
    raise AssertionError(f"accepted: {describe(call)}")
