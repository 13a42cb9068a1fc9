"""What only a GPU has: streams, graphs, several devices, 64-bit offsets, its allocator, kernels by head dim."""

from __future__ import annotations

import pytest
import torch
from comparison import (
    assert_gradient_close,
    assert_lse_close,
    assert_rows_close,
    expected_attention,
    expected_relation,
)
from generators import gaussian, perturbed, realistic

import linearard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ops = torch.ops.linearard
CUDA = torch.device("cuda", 0)
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
GIB = 2**30


def pair(shape, dtype=torch.bfloat16, seed=0):
    teacher = gaussian(*shape, seed=seed, device=CUDA)
    return perturbed(teacher, 0.2, seed=seed + 1).to(dtype), teacher.to(dtype)


def kernels(student, teacher, **options):
    """All results of forward and backward, with a non-uniform upstream gradient."""
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    grad_kl = torch.linspace(-0.5, 1.0, student.shape[2], device=student.device).expand(kl.shape)
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, **options)
    return kl, lse_student, lse_teacher, gradient


def loss_and_gradient(student, teacher, **options):
    leaf = student.detach().requires_grad_()
    loss = ops.relation_kl(leaf, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_same_bits(left, right) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"result {index} differs by up to {(a.double() - b.double()).abs().max()}"


def need_memory(gibibytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.1f} GiB are free")


@pytest.fixture
def memory_given_back():
    """Other processes test on the same GPU."""
    yield
    torch.cuda.empty_cache()


# --- every kernel against the oracle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 64, 72, 80, 96, 128, 160, 192, 256, 300, 512])
def test_head_dims(head_dim, dtype, causal):
    """More rows than two tiles and a ragged end, three heads."""
    student, teacher = pair((2, 3, 300, head_dim), dtype)
    grad_kl = torch.rand(2, 3, 300, device=CUDA) - 0.3
    expected = expected_relation(student, teacher, grad_kl.double(), causal=causal)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, causal=causal)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, causal=causal)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("head_dim", [7, 64, 80, 96, 128, 192, 256, 300])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tokens", [(150, 170), (400, 90)], ids=str)
def test_head_dims_of_attention(head_dim, dtype, causal, deterministic, tokens):
    """Grouped queries; more keys than queries, and so few that causal, whole tiles of queries see none."""
    queries, keys = tokens
    query, query_teacher = pair((1, 6, queries, head_dim), dtype)
    key, key_teacher = pair((1, 2, keys, head_dim), dtype, seed=5)
    inputs = (query, key, query_teacher, key_teacher)
    options = {"causal": causal, "deterministic": deterministic}
    grad_kl = torch.rand(1, 6, queries, device=CUDA) - 0.3
    expected = expected_attention(inputs, grad_kl.double(), causal=causal)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs, **options)
    assert_rows_close(kl, expected)
    gradients = ops.attention_kl_backward(grad_kl, *inputs, lse_student, lse_teacher, **options)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_long_sequence_of_a_real_models_sizes(head_dim, causal):
    teacher = realistic(1, 4, 2100, head_dim, device=CUDA)
    student, teacher = perturbed(teacher, 0.02, multiplicative=True).bfloat16(), teacher.bfloat16()
    expected = expected_relation(student, teacher, causal=causal)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, causal=causal)
    assert_rows_close(kl, expected)
    gradient = ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher, causal=causal)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


# --- offsets beyond 2^31 elements ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dimension", ["head", "token"])
@pytest.mark.usefixtures("memory_given_back")
def test_strides_beyond_2_to_the_31(dtype, dimension):
    """Views whose last head, or last token, lies more than 2^31 elements behind the first: few values, long strides."""
    heads, tokens, head_dim = (3, 70, 64) if dimension == "head" else (2, 4, 64)
    far = 2**30 + 2**20
    strides = (far, head_dim, 1) if dimension == "head" else (head_dim, far, 1)
    last = (heads - 1) * strides[0] + (tokens - 1) * strides[1]
    assert last > 2**31
    need_memory(1.1 * (last + head_dim) * dtype.itemsize / GIB)
    student, teacher = pair((1, heads, tokens, head_dim), dtype)
    # One memory for both: the heads of student and teacher lie side by side.
    memory = torch.empty(last + 2**19, dtype=dtype, device=CUDA)
    far_student = memory.as_strided((1, heads, tokens, head_dim), (0, *strides), 0)
    far_teacher = memory.as_strided((1, heads, tokens, head_dim), (0, *strides), 2**18)
    far_student.copy_(student)
    far_teacher.copy_(teacher)
    for options in ({}, {"causal": True}):
        assert_same_bits(
            kernels(far_student, far_teacher, **options, deterministic=True),
            kernels(student, teacher, **options, deterministic=True),
        )


@pytest.mark.usefixtures("memory_given_back")
def test_more_than_2_to_the_31_elements():
    """Inputs and gradient of more than 2^31 elements: the last head is what it is alone."""
    tokens, head_dim = 64, 256
    heads = 2**31 // (tokens * head_dim) + 3
    need_memory(3.5 * heads * tokens * head_dim * 2 / GIB)
    teacher = torch.randn(1, heads, tokens, head_dim, dtype=torch.bfloat16, device=CUDA)
    student = torch.randn_like(teacher).mul_(0.2).add_(teacher)
    together = kernels(student, teacher, deterministic=True)
    for head in (0, heads // 2, heads - 1):
        alone = kernels(student[:, head : head + 1].clone(), teacher[:, head : head + 1].clone(), deterministic=True)
        assert_same_bits([x[:, head : head + 1] for x in together], alone)


# --- streams, graphs, devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_current_stream(dtype, masked):
    """The inputs arrive on a side stream, late: a kernel on another stream would read what was there before."""
    student, teacher = pair((1, 4, 300, 64), dtype)
    mask = torch.rand(1, 300, device=CUDA) > 0.3 if masked else None
    expected = loss_and_gradient(student, teacher, key_padding_mask=mask, deterministic=True)
    late_student, late_teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    late_mask = torch.ones_like(mask) if masked else None
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late_student.copy_(student)
        late_teacher.copy_(teacher)
        if masked:
            late_mask.copy_(mask)
        results = loss_and_gradient(late_student, late_teacher, key_padding_mask=late_mask, deterministic=True)
        copies = [result.clone() for result in results]
    stream.synchronize()
    assert_same_bits(copies, expected)


def captured(function):
    """A CUDA graph of the call and the tensors it writes, after the warm-up on a side stream that torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["dense", "causal", "masked", "jsd"])
def test_cuda_graph(dtype, kind):
    """Capture, then replay with other inputs: also ones that are so large that they take the way in double."""
    shape = (2, 3, 200, 64)
    options = {"deterministic": True, "causal": kind == "causal"}
    if kind == "masked":
        options["key_padding_mask"] = torch.arange(200, device=CUDA) < torch.tensor([[200], [120]], device=CUDA)
    if kind == "jsd":
        options["divergence"] = "jsd"
    student, teacher = pair(shape, dtype)
    graph, results = captured(lambda: loss_and_gradient(student, teacher, **options))
    largest = 100.0 if dtype == torch.float16 else 1e15
    for seed, size in ((5, 1.0), (6, largest), (7, 0.1)):
        teacher.copy_(gaussian(*shape, seed=seed, device=CUDA) * size)
        student.copy_(perturbed(teacher.double(), 0.1, multiplicative=True))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, loss_and_gradient(student, teacher, **options))
        assert all(torch.isfinite(result).all() for result in results)


def test_cuda_graph_of_attention():
    inputs = [*pair((1, 4, 100, 64)), *pair((1, 2, 130, 64), seed=5)]
    query, query_teacher, key, key_teacher = inputs

    def call():
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        loss = ops.attention_kl(*leaves, query_teacher, key_teacher, deterministic=True)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    graph, results = captured(call)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, call())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_second_gpu(dtype):
    """Tensors of a device that is not the current one: the work runs there, the current device stays."""
    student, teacher = pair((1, 4, 300, 64), dtype)
    mask = torch.rand(1, 300, device=CUDA) > 0.3
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    for options in ({}, {"key_padding_mask": mask}, {"divergence": "jsd"}):
        moved = {k: v.to(other) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        there = kernels(student.to(other), teacher.to(other), **moved, deterministic=True)
        assert all(result.device == other for result in there)
        assert torch.cuda.current_device() == 0
        here = kernels(student, teacher, **options, deterministic=True)
        assert_same_bits([result.to(CUDA) for result in there], here)


OTHER_DEVICES = ["cpu", *(["cuda:1"] if torch.cuda.device_count() > 1 else [])]


@pytest.mark.parametrize("other", OTHER_DEVICES)
def test_tensors_of_two_devices_are_refused(other):
    """The message names the argument and both devices."""
    student, teacher = pair((1, 2, 20, 16))
    there = teacher.to(other)
    message = rf"^relation_kl: teacher must be on the device of student \(cuda:0\), got {other}"
    with pytest.raises(RuntimeError, match=message):
        ops.relation_kl(student, there)
    with pytest.raises(RuntimeError, match=rf"^relation_kl: teacher .* \({other}\), got cuda:0"):
        ops.relation_kl(there, teacher)
    with pytest.raises(RuntimeError, match=rf"^attention_kl: key_teacher .* \(cuda:0\), got {other}"):
        ops.attention_kl(student, student, teacher, there)


# --- torch's tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    student, teacher = pair((1, 2, 70, 64), dtype)
    student.requires_grad_(requires_grad)
    mask = torch.rand(1, 70, device=CUDA) > 0.3
    for options in ({}, {"causal": True, "key_padding_mask": mask}):
        torch.library.opcheck(ops.relation_kl.default, (student, teacher), options)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compile(dtype, mode):
    """Inductor with computation around the operator; reduce-overhead captures forward and backward as CUDA graphs."""
    torch._dynamo.reset()
    teacher = pair((1, 3, 130, 64), dtype)[1]

    def function(x, y):
        return ops.relation_kl(x * 2.0, y, causal=True, deterministic=True) * 3.0

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for seed in range(4):  # warm-up, capture, replay
        leaves = [gaussian(1, 3, 130, 64, seed=seed, device=CUDA).to(dtype).requires_grad_() for _ in range(2)]
        results = []
        for call, leaf in zip((function, compiled), leaves, strict=True):
            loss = call(leaf, teacher)
            loss.backward()
            results.append((loss.detach().clone(), leaf.grad.clone()))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("global_switch", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_same_bits_from_run_to_run(dtype, global_switch):
    teacher = realistic(2, 4, 700, 64, device=CUDA)
    student, teacher = perturbed(teacher, 0.1).to(dtype), teacher.to(dtype)
    mask = torch.rand(2, 700, device=CUDA) > 0.2
    torch.use_deterministic_algorithms(global_switch)
    try:
        given = {} if global_switch else {"deterministic": True}
        for options in ({}, {"causal": True}, {"key_padding_mask": mask}, {"divergence": "jsd"}):
            first = (*kernels(student, teacher, **options, **given), *loss_and_gradient(student, teacher, **given))
            for _ in range(3):
                again = (*kernels(student, teacher, **options, **given), *loss_and_gradient(student, teacher, **given))
                assert_same_bits(again, first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_at_padding_are_not_read(dtype, deterministic):
    """A half's range is that of the real rows: of a mean, far below what it holds unscaled."""
    student, teacher = pair((2, 3, 256, 64), dtype)
    mask = torch.arange(256, device=CUDA) < torch.tensor([[256], [100]], device=CUDA)
    options = {"key_padding_mask": mask, "deterministic": deterministic}
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    grad_kl = torch.full_like(kl, 1e-5)
    expected = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, **options).double()
    for padding in (torch.nan, torch.inf, 1e30):
        grad_kl.masked_fill_(~mask[:, None], padding)
        gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, **options)
        assert (gradient.double() - expected).norm() <= 1e-3 * expected.norm()


# --- memory ----------------------------------------------------------------------------------------------------------


def bytes_beyond(function) -> int:
    """Peak of the caching allocator above what was there, without the results; it allocates in blocks of 512 bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = results if isinstance(results, tuple) else (results,)
    return peak - sum(-(-x.numel() * x.element_size() // 512) * 512 for x in results)


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["dense", "causal", "masked", "packed", "jsd", "reverse"])
def test_memory_is_linear_and_planned(head_dim, dtype, kind):
    """Beyond inputs and outputs at most 4 bytes x B H N (8 + D), and at most what the plan says."""
    batch, heads, tokens = (1 if kind == "packed" else 2), 4, 2048
    x = torch.randn(batch, heads, tokens, head_dim, device=CUDA)
    student, teacher = (x + 0.1 * torch.randn_like(x)).to(dtype), x.to(dtype)
    options: dict = {"causal": kind == "causal"}
    planned: dict = {}
    if kind == "masked":
        options["key_padding_mask"] = torch.rand(batch, tokens, device=CUDA) > 0.2
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 100, 1500, tokens], dtype=torch.int32, device=CUDA)
    if kind == "jsd":
        options["divergence"], planned = "jsd", {"divergence": linearard._C.Divergence.JSD}
    if kind == "reverse":
        options["divergence"], planned = "reverse_kl", {"divergence": linearard._C.Divergence.REVERSE_KL}
    plan = linearard._C.plan(student, teacher, **{**options, **planned})
    assert plan["backend"] == "cuda"
    promised = 4 * batch * heads * tokens * (8 + head_dim)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    grad_kl = torch.ones_like(kl)
    forward = bytes_beyond(lambda: ops.relation_kl_forward(student, teacher, **options))
    assert forward <= plan["workspace_bytes_forward"]
    assert forward <= promised
    backward = bytes_beyond(
        lambda: ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, **options)
    )
    assert backward <= plan["workspace_bytes_backward"]
    assert backward <= promised
    both = bytes_beyond(lambda: loss_and_gradient(student, teacher, **options))
    # The rows, their statistics and their gradient live through it; the reduction sums in float64.
    assert both <= max(forward, backward) + batch * heads * tokens * 6 * 8 + 16 * 512


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("key_heads", [2, 8])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("one_grad", [False, True])
def test_memory_of_attention(head_dim, dtype, key_heads, deterministic, one_grad):
    """Likewise, counted over the queries; the keys' gradient may be summed in float."""
    heads, tokens = 8, 2048
    query, query_teacher = pair((1, heads, tokens, head_dim), dtype)
    key, key_teacher = pair((1, key_heads, tokens, head_dim), dtype, seed=5)
    inputs = (query, key, query_teacher, key_teacher)
    options = {"causal": True, "deterministic": deterministic}
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs, **options)
    grad_kl = torch.ones((), device=CUDA).expand_as(kl) if one_grad else torch.ones_like(kl)
    promised = 4 * heads * tokens * (8 + head_dim)
    assert bytes_beyond(lambda: ops.attention_kl_forward(*inputs, **options)) <= promised
    backward = bytes_beyond(lambda: ops.attention_kl_backward(grad_kl, *inputs, lse_student, lse_teacher, **options))
    assert backward <= promised
