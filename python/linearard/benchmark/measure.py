"""Time, memory and exactness of one peer on one shape."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from linearard.benchmark.peers import Loss, Peer

Shape = tuple[int, int, int, int]  # B, H, N, D
WARM_UP = 3
MOST_ITERATIONS = 300
NOISE = 0.05  # student = teacher + NOISE x unit Gaussian: near the end of a distillation


@dataclass
class Result:
    """One peer on one shape; `skipped` says why there are no numbers."""

    peer: str
    shape: Shape
    best_ms: float | None = None
    median_ms: float | None = None
    iterations: int | None = None
    extra_mib: float | None = None  # peak beyond inputs and gradient; on CUDA only
    tflops: float | None = None  # 10 N^2 D H B FLOP / median, whatever was executed
    fraction_of_g: float | None = None
    gradient_error: float | None = None  # against float64, on the error's number of tokens
    kl_error: float | None = None
    skipped: str = ""


def counted_flop(shape: Shape) -> float:
    """FLOP of the dense algorithm, forward and backward: five products of 2 N^2 D. The same yardstick for everybody."""
    batch, heads, tokens, head_dim = shape
    return 10.0 * tokens**2 * head_dim * heads * batch


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Student, which requires grad, and teacher: unit Gaussian, the same for the same shape."""
    generator = torch.Generator(device).manual_seed(1)
    teacher = torch.randn(shape, generator=generator, device=device)
    other = torch.randn(shape, generator=generator, device=device)
    return (teacher + noise * other).to(dtype).requires_grad_(), teacher.to(dtype)


def repeated(work: Callable[[], object], device: torch.device, min_seconds: float) -> list[float]:
    """Seconds of each run after a warm-up: at least 3, until they add up to min_seconds or there are enough.

    On CUDA the runs follow each other as the steps of a training do, between events on the current stream: the host is
    waited for where its launches take longer than their kernels, and not at the beginning of every run.
    """
    for _ in range(WARM_UP):
        work()
    if device.type != "cuda":
        times: list[float] = []
        while len(times) < 3 or (sum(times) < min_seconds and len(times) < MOST_ITERATIONS):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return times
    expected = _seconds_between(work, 1)[0]
    return _seconds_between(work, max(3, min(MOST_ITERATIONS, math.ceil(min_seconds / max(expected, 1e-6)))))


def _seconds_between(work: Callable[[], object], runs: int) -> list[float]:
    """Seconds between the ends of `runs` runs on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def matrix_rate(device: torch.device, dtype: torch.dtype, min_seconds: float) -> tuple[str, float]:
    """G, FLOP/s of torch.mm: 8192^3 in bfloat16 on CUDA; on the CPU 1024^3 in the inputs' dtype."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, dtype)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    median = statistics.median(repeated(lambda: torch.mm(left, right), device, min_seconds))
    return f"torch.mm {size}^3 {str(dtype).removeprefix('torch.')}", 2.0 * size**3 / median


def step(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward; the gradient of the step before is dropped first. Returns the loss."""
    student.grad = None
    value = loss(student, teacher)
    value.backward()
    return value.detach()


def time_and_memory(result: Result, loss: Loss, dtype: torch.dtype, device: torch.device, min_seconds: float) -> None:
    """Fill in time, rate and memory of forward and backward through the loss."""
    student, teacher = inputs(result.shape, dtype, device)
    times = repeated(lambda: step(loss, student, teacher), device, min_seconds)
    result.best_ms, result.median_ms = 1e3 * min(times), 1e3 * statistics.median(times)
    result.iterations = len(times)
    result.tflops = counted_flop(result.shape) / statistics.median(times) * 1e-12
    if device.type == "cuda":
        student.grad = None
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(loss, student, teacher)
        torch.cuda.synchronize(device)
        kept = student.numel() * student.element_size()  # the gradient
        result.extra_mib = (torch.cuda.max_memory_allocated(device) - before - kept) / 2**20


class Exact(NamedTuple):
    """Float64 results for the same inputs."""

    kl: Tensor  # scalar: the loss
    gradient: Tensor  # [B, H, N, D] of the loss with respect to the student


def exact(student: Tensor, teacher: Tensor, rows: int = 256) -> Exact:
    """Loss and gradient in float64, in blocks of `rows` rows: memory grows with N.

    A first pass gives the log-sum-exps, a second the gradient scale (G + G^T) X, G = (Q - P) / number of rows.
    """
    x, y = student.detach().double(), teacher.double()
    scale, count = x.shape[-1] ** -0.5, x[..., 0].numel()
    lse_x, lse_y = (torch.cat([(scale * block @ z.mT).logsumexp(-1) for block in z.split(rows, 2)], -1) for z in (x, y))
    total, gradient = x.new_zeros(()), torch.empty_like(x)
    for start in range(0, x.shape[2], rows):
        block = slice(start, start + rows)
        s, t = (scale * z[:, :, block] @ z.mT for z in (x, y))
        log_q, log_p = s - lse_x[:, :, block, None], t - lse_y[:, :, block, None]
        total += (log_p.exp() * (log_p - log_q)).sum()
        by_row = log_q.exp() - log_p.exp()
        by_column = (s - lse_x[:, :, None]).exp() - (t - lse_y[:, :, None]).exp()
        gradient[:, :, block] = scale / count * (by_row + by_column) @ x
    return Exact(total / count, gradient)


def errors(loss: Loss, student: Tensor, teacher: Tensor, reference: Exact) -> tuple[float, float]:
    """Relative errors of the gradient (Frobenius norm) and of the loss against the exact ones of the same inputs."""
    value = step(loss, student, teacher)
    assert student.grad is not None
    difference = torch.linalg.vector_norm(student.grad.double() - reference.gradient)
    relative = (difference / torch.linalg.vector_norm(reference.gradient)).item()
    return relative, ((value.double() - reference.kl).abs() / reference.kl).item()


def free_bytes(device: torch.device) -> float:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@contextmanager
def reason_to_skip(reasons: list[str]) -> Iterator[None]:
    """Put what prevents the body into `reasons`: one peer that fails does not end the comparison."""
    try:
        yield
    except torch.OutOfMemoryError:
        reasons.append("out of memory")
    except Exception as error:  # a device, dtype or shape that a peer does not support
        reasons.append(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200])


def measure(peer: Peer, result: Result, dtype: torch.dtype, device: torch.device, min_seconds: float) -> None:
    """Time and memory, or the reason why not."""
    need, free = peer.least_bytes(result.shape, dtype.itemsize), free_bytes(device)
    if need > free:
        result.skipped = f"needs more than {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
        return
    reasons: list[str] = []
    with reason_to_skip(reasons):
        time_and_memory(result, peer.make(), dtype, device, min_seconds)
    result.skipped = "".join(reasons)


def compare(
    peers: dict[str, Peer],
    shape: Shape,
    lengths: list[int],
    error_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    min_seconds: float,
) -> Iterator[Result]:
    """Every peer at every N, the peers of one N one after the other; `shape` gives B, H and D."""
    batch, heads, _, head_dim = shape
    error_shape = (batch, heads, error_tokens, head_dim)
    reference = exact(*inputs(error_shape, dtype, device))
    errors_of: dict[str, tuple[float, float]] = {}
    reasons: dict[str, list[str]] = {name: [] for name in peers}
    for name, peer in peers.items():
        with reason_to_skip(reasons[name]):
            errors_of[name] = errors(peer.make(), *inputs(error_shape, dtype, device), reference)
    for tokens in lengths:
        for name, peer in peers.items():
            result = Result(name, (batch, heads, tokens, head_dim), skipped="".join(reasons[name]))
            if name in errors_of:
                result.gradient_error, result.kl_error = errors_of[name]
                measure(peer, result, dtype, device, min_seconds)
            yield result
