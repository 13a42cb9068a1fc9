"""Bad input: a RuntimeError that names the operator, the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
BATCH, HEADS, TOKENS, HEAD_DIM = 2, 3, 5, 4


def relation_inputs() -> dict:
    return {
        "student": torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM),
        "teacher": torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM),
    }


def attention_inputs() -> dict:
    return {
        name: torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM)
        for name in ("query_student", "key_student", "query_teacher", "key_teacher")
    }


def check(operator: str, arguments: dict, argument: str, *fragments: str) -> None:
    """The message begins with the operator, names the argument, and holds every fragment: expected and actual.

    What depends on values, not on shapes, is found below both the operator and its forward kernel: the name may then
    be that of either.
    """
    with pytest.raises(RuntimeError) as raised:
        getattr(ops, operator)(**arguments)
    message = str(raised.value).splitlines()[0]
    public = operator.removesuffix("_forward")
    assert message.startswith((f"{operator}: ", f"{public}: ", f"{public}_forward: ")), message
    for fragment in (argument, *fragments):
        assert fragment in message, f"{fragment!r} is not in: {message}"


def all_operators(argument: str):
    """Every operator that takes `argument`, with valid arguments and the name of the tensor to spoil."""
    relation = relation_inputs()
    if argument in relation:
        rows = torch.zeros(BATCH, HEADS, TOKENS)
        yield "relation_kl", relation
        yield "relation_kl_forward", relation
        yield "relation_kl_backward", {"grad_kl": rows, "lse_student": rows, "lse_teacher": rows, **relation}
    attention = attention_inputs()
    if argument in attention:
        rows = torch.zeros(BATCH, HEADS, TOKENS)
        yield "attention_kl", attention
        yield "attention_kl_forward", attention
        yield "attention_kl_backward", {"grad_kl": rows, "lse_student": rows, "lse_teacher": rows, **attention}
    if argument == "x":
        yield "relation_lse", {"x": torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM)}


TENSORS = ["student", "teacher", "x", "query_student", "key_student", "query_teacher", "key_teacher"]


@pytest.mark.parametrize("argument", TENSORS)
def test_rank(argument):
    for operator, arguments in all_operators(argument):
        check(operator, {**arguments, argument: torch.randn(2, 5, 4)}, argument, "4 dimensions", "3", "[2, 5, 4]")
        check(operator, {**arguments, argument: torch.tensor(1.0)}, argument, "4 dimensions", "0")
        check(operator, {**arguments, argument: torch.randn(1, 1, 1, 5, 4)}, argument, "4 dimensions", "5")


@pytest.mark.parametrize("argument", TENSORS)
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int64, "Long"), (torch.bool, "Bool"), (torch.complex64, "ComplexFloat"), (torch.float8_e5m2, "Float8")],
)
def test_dtype(argument, dtype, name):
    for operator, arguments in all_operators(argument):
        wrong = arguments[argument].to(dtype)
        check(operator, {**arguments, argument: wrong}, argument, "float32", "bfloat16")
        with pytest.raises(RuntimeError, match=rf"(?i){name}|{str(dtype).removeprefix('torch.')}"):
            getattr(ops, operator)(**{**arguments, argument: wrong})


@pytest.mark.parametrize("argument", TENSORS)
def test_last_dimension_is_contiguous(argument):
    for operator, arguments in all_operators(argument):
        strided = torch.randn(BATCH, HEADS, TOKENS, 2 * HEAD_DIM)[..., ::2]
        check(operator, {**arguments, argument: strided}, argument, "contiguous", "2")


@pytest.mark.parametrize("argument", TENSORS)
@pytest.mark.parametrize("head_dim", [0, 513])
def test_head_dim(argument, head_dim):
    for operator, arguments in all_operators(argument):
        wrong = {**arguments, argument: torch.randn(BATCH, HEADS, TOKENS, head_dim)}
        for name, partner in (("key_student", "query_student"), ("key_teacher", "query_teacher")):
            if argument in (name, partner):
                wrong[name] = wrong[partner] = wrong[argument]
        # Of a pair with the same head dim, the first is named.
        check(operator, wrong, argument.replace("key_", "query_"), "512", str(head_dim))


@pytest.mark.parametrize("size", [(1, 3, 5, 4), (2, 1, 5, 4), (2, 3, 6, 4), (2, 3, 1, 4)])
def test_student_and_teacher_of_different_shape(size):
    for operator, arguments in all_operators("teacher"):
        check(operator, {**arguments, "teacher": torch.randn(size)}, "teacher", "[2, 3, 5", str(list(size)[:3])[:-1])


@pytest.mark.parametrize(
    ("argument", "size"),
    [
        ("key_student", (1, 3, 5, 4)),
        ("key_student", (2, 3, 5, 6)),
        ("key_student", (2, 2, 5, 4)),
        ("key_teacher", (2, 2, 5, 4)),
        ("key_teacher", (2, 3, 6, 4)),
        ("key_teacher", (2, 3, 5, 7)),
        ("query_teacher", (2, 4, 5, 4)),
        ("query_teacher", (2, 3, 4, 4)),
        ("query_teacher", (1, 3, 5, 4)),
    ],
)
def test_attention_tensors_of_different_shape(argument, size):
    for operator, arguments in all_operators(argument):
        wrong = {**arguments, argument: torch.randn(size)}
        with pytest.raises(RuntimeError, match=f"^{operator}: .*(query|key)_(student|teacher)") as raised:
            getattr(ops, operator)(**wrong)
        changed = next(new for new, old in zip(size, (2, 3, 5, 4), strict=True) if new != old)
        assert str(changed) in str(raised.value).splitlines()[0]


def test_heads_of_grouped_queries():
    arguments = {**attention_inputs(), "key_student": torch.randn(BATCH, 2, TOKENS, HEAD_DIM)}
    check("attention_kl", arguments, "key_student", "divides", "3", "2")
    arguments = {**attention_inputs(), "key_teacher": torch.randn(BATCH, 6, TOKENS, HEAD_DIM)}
    check("attention_kl", arguments, "key_teacher", "divides", "3", "6")


@pytest.mark.parametrize("argument", [name for name in TENSORS if name not in ("x", "student", "query_student")])
def test_device(argument):
    for operator, arguments in all_operators(argument):
        other = {**arguments, argument: torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM, device="meta")}
        with pytest.raises(RuntimeError, match=f"^{operator}: {argument}.*(cpu|meta).*(cpu|meta)"):
            getattr(ops, operator)(**other)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("key_padding_mask", torch.ones(BATCH, TOKENS, dtype=torch.bool)),
        ("cu_seqlens", torch.tensor([0, TOKENS])),
        ("row_weight", torch.ones(BATCH, TOKENS)),
        ("lse_teacher", torch.zeros(BATCH, HEADS, TOKENS)),
    ],
)
def test_device_of_an_option(argument, value):
    inputs = {name: x[: 1 if argument == "cu_seqlens" else BATCH] for name, x in relation_inputs().items()}
    with pytest.raises(RuntimeError, match=f"^relation_kl: {argument}.*(cpu|meta).*(cpu|meta)"):
        ops.relation_kl(**inputs, **{argument: value.to("meta")})


RELATION_OPERATORS = ["relation_kl", "attention_kl"]


def valid(operator: str) -> dict:
    return relation_inputs() if operator.startswith("relation") else attention_inputs()


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
@pytest.mark.parametrize("size", [(2, 4), (1, 5), (5,), (2, 3, 5), (2, 1, 1, 5)])
def test_shape_of_the_mask(operator, size):
    mask = torch.ones(size, dtype=torch.bool)
    check(operator, {**valid(operator), "key_padding_mask": mask}, "key_padding_mask", "[2, 5]", str(list(size)))


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_dtype_of_the_mask(operator, dtype):
    mask = torch.ones(BATCH, TOKENS, dtype=dtype)
    check(operator, {**valid(operator), "key_padding_mask": mask}, "key_padding_mask", "bool")


def test_query_mask():
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        check("attention_kl", {**attention_inputs(), "query_padding_mask": mask}, "query_padding_mask")


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
@pytest.mark.parametrize("size", [(2, 4), (5,), (2, 3, 5)])
def test_shape_of_the_row_weight(operator, size):
    check(operator, {**valid(operator), "row_weight": torch.ones(size)}, "row_weight", "[2, 5]", str(list(size)))


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
def test_dtype_of_the_row_weight(operator):
    weight = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    check(operator, {**valid(operator), "row_weight": weight}, "row_weight", "floating")


@pytest.mark.parametrize("operator", ["relation_kl", "relation_kl_forward", "relation_lse", "attention_kl"])
@pytest.mark.parametrize(
    ("boundaries", "fragments"),
    [
        ([0, 3, 3, 5], ("increasing", "3")),
        ([0, 4, 2, 5], ("increasing", "2")),
        ([1, 3, 5], ("0", "1")),
        ([0, 3], ("5", "3")),
        ([0, 3, 6], ("5", "6")),
        ([-1, 5], ("0", "-1")),
        ([5], ("",)),
        ([], ("",)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_of_packed_sequences(device, operator, boundaries, fragments, dtype):
    names = ["x"] if operator == "relation_lse" else list(valid(operator))
    arguments = {name: torch.randn(1, HEADS, TOKENS, HEAD_DIM, device=device) for name in names}
    arguments["cu_seqlens"] = torch.tensor(boundaries, dtype=dtype, device=device)
    check(operator, arguments, "cu_seqlens", *fragments)


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
def test_packed_sequences_need_one_batch_entry(operator):
    cu_seqlens = torch.tensor([0, TOKENS])
    with pytest.raises(RuntimeError, match=f"^{operator}: .*cu_seqlens.*1.*2"):
        getattr(ops, operator)(**valid(operator), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
def test_rank_and_dtype_of_the_boundaries(operator):
    arguments = {name: x[:1] for name, x in valid(operator).items()}
    check(operator, {**arguments, "cu_seqlens": torch.tensor([[0, TOKENS]])}, "cu_seqlens", "1", "[1, 2]")
    check(operator, {**arguments, "cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens", "int32", "int64")


def test_boundaries_of_keys():
    arguments = {name: x[:1] for name, x in attention_inputs().items()}
    pair = {"cu_seqlens": torch.tensor([0, 2, 5]), "cu_seqlens_key": torch.tensor([0, 5])}
    check("attention_kl", {**arguments, **pair}, "cu_seqlens_key", "3", "2")
    check("attention_kl", {**arguments, "cu_seqlens_key": torch.tensor([0, 5])}, "cu_seqlens")
    longer = {**arguments, "key_student": torch.randn(1, 3, 7, 4), "key_teacher": torch.randn(1, 3, 7, 4)}
    check("attention_kl", {**longer, "cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens", "7")


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
def test_unknown_names(operator):
    check(
        operator,
        {**valid(operator), "divergence": "kl"},
        "divergence", "forward_kl", "reverse_kl", "jsd", "kl",
    )  # fmt: skip
    check(operator, {**valid(operator), "reduction": "batchmean"}, "reduction", "none", "sum", "mean", "batchmean")
    check(operator, {**valid(operator), "divergence": ""}, "divergence", "forward_kl")


def test_unknown_divergence_in_the_kernels():
    for operator, arguments in (*all_operators("student"), *all_operators("query_student")):
        check(operator, {**arguments, "divergence": "hellinger"}, "divergence", "jsd", "hellinger")


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl"])
def test_beta(beta, divergence):
    for operator, arguments in (*all_operators("student"), *all_operators("query_student")):
        check(operator, {**arguments, "divergence": divergence, "beta": beta}, "beta", "0", "1", f"{beta:g}")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale(scale):
    for operator, arguments in (*all_operators("student"), *all_operators("query_student")):
        for side in ("scale_student", "scale_teacher"):
            check(operator, {**arguments, side: scale}, side, "finite", str(scale))
    check("relation_lse", {"x": torch.randn(1, 1, 2, 2), "scale": scale}, "scale", "finite", str(scale))


@pytest.mark.parametrize("operator", RELATION_OPERATORS)
def test_num_items(operator):
    arguments = valid(operator)
    check(operator, {**arguments, "num_items": torch.ones(2)}, "num_items", "[2]")
    for reduction in ("none", "sum"):
        check(
            operator,
            {**arguments, "num_items": torch.tensor(3), "reduction": reduction},
            "num_items",
            "mean",
            reduction,
        )


@pytest.mark.parametrize("argument", ["grad_kl", "lse_student", "lse_teacher"])
def test_rows_of_the_backward(argument):
    for operator, arguments in (*list(all_operators("student"))[2:], *list(all_operators("query_student"))[2:]):
        wrong_shape = torch.zeros(BATCH, HEADS, TOKENS + 1)
        check(operator, {**arguments, argument: wrong_shape}, argument, "[2, 3, 5]", "[2, 3, 6]")
        check(operator, {**arguments, argument: torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.int64)}, argument)


def test_cached_statistics():
    for wrong in (torch.zeros(BATCH, HEADS, TOKENS - 1), torch.zeros(BATCH, TOKENS)):
        check(
            "relation_kl",
            {**relation_inputs(), "lse_teacher": wrong},
            "lse_teacher",
            "[2, 3, 5]",
            str(list(wrong.shape)),
        )
    integers = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.int64)
    check("relation_kl", {**relation_inputs(), "lse_teacher": integers}, "lse_teacher", "float32")


def test_sparse_and_quantised_tensors_are_refused():
    inputs = relation_inputs()
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.relation_kl(inputs["student"].to_sparse(), inputs["teacher"])


def test_the_same_checks_for_meta_tensors():
    """Fakes refuse what kernels refuse: an error shows while tracing, not in the middle of a run."""
    student = torch.randn(2, 3, 5, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"^relation_kl: teacher"):
        ops.relation_kl(student, torch.randn(2, 3, 6, 4, device="meta"))
    with pytest.raises(RuntimeError, match=r"^relation_kl_forward: teacher"):
        ops.relation_kl_forward(student, torch.randn(2, 3, 6, 4, device="meta"))
    with pytest.raises(RuntimeError, match=r"^relation_kl: divergence"):
        ops.relation_kl(student, student, divergence="kl")


def test_errors_leave_the_library_usable():
    inputs = relation_inputs()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="divergence"):
            ops.relation_kl(**inputs, divergence="kl")
        assert torch.isfinite(ops.relation_kl(**inputs))
