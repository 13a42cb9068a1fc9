"""python -m linearard.benchmark: the peers are right, and the command writes what it says."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import oracle
import pytest
import torch
from generators import gaussian, perturbed

from linearard.benchmark import measure, peers
from linearard.benchmark.__main__ import main
from linearard.benchmark.peers import PEERS

SHAPE = (1, 2, 100, 32)
# Far from convergence, where 16-bit peers still have correct digits: relative error of loss and gradient.
EPS = 0.5
ALLOWED = {torch.float32: 2e-4, torch.bfloat16: 0.1}
# The fused attention calls of CUDA have no float32.
SIXTEEN_BITS_ONLY = ("cudnn", "flash")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch):
    """Two chunks of the same size and a shorter one."""
    monkeypatch.setattr(peers, "CHUNK_ROWS", 40)
    torch._dynamo.reset()


def pair(device, dtype):
    teacher = gaussian(*SHAPE, device=device)
    return perturbed(teacher, EPS).to(dtype).requires_grad_(), teacher.to(dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact)).item()


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_peers_agree_with_the_oracle(device, name, dtype):
    if device.type not in PEERS[name].devices:
        pytest.skip(f"not for {device.type}")
    if name in SIXTEEN_BITS_ONLY and dtype == torch.float32:
        pytest.skip("16-bit types only")
    student, teacher = pair(device, dtype)
    exact, (exact_gradient,) = oracle.gradients(oracle.relation_kl, (student,), (teacher,))
    value = measure.step(PEERS[name].make(), student, teacher)
    assert relative_error(value, exact) <= ALLOWED[dtype]
    assert relative_error(student.grad, exact_gradient) <= ALLOWED[dtype]
    assert student.grad.dtype == dtype


def test_the_reference_in_blocks_is_the_oracle(device):
    student, teacher = pair(device, torch.float32)
    reference = measure.exact(student, teacher, rows=33)
    exact, (exact_gradient,) = oracle.gradients(oracle.relation_kl, (student,), (teacher,))
    assert relative_error(reference.kl, exact) <= 1e-11
    assert relative_error(reference.gradient, exact_gradient) <= 1e-11


def results_of(device, peer: peers.Peer, dtype=torch.float32) -> list[measure.Result]:
    return list(measure.compare({"naive": peer}, SHAPE, [20, 30], 40, dtype, device, 0.0))


def test_what_is_measured(device):
    for result, tokens in zip(results_of(device, PEERS["naive"]), (20, 30), strict=True):
        assert result.shape == (1, 2, tokens, 32)
        assert not result.skipped
        assert 0 < result.best_ms <= result.median_ms
        assert result.tflops == pytest.approx(10 * tokens**2 * 32 * 2 / result.median_ms * 1e-9)
        assert 0 < result.gradient_error < 1e-2
        assert (result.extra_mib is not None) == (device.type == "cuda")


def test_a_peer_that_fails_is_skipped_with_the_reason(device):
    def fail(student, teacher):
        raise RuntimeError("no such kernel\nand more")

    def exhausted(student, teacher):
        raise torch.OutOfMemoryError("tried to allocate")

    for loss, reason in ((fail, "RuntimeError: no such kernel"), (exhausted, "out of memory")):
        results = results_of(device, peers.Peer("a peer", lambda loss=loss: loss))
        assert [result.skipped for result in results] == [reason, reason]
        assert results[0].best_ms is None


def test_a_peer_that_cannot_fit_is_not_tried(device):
    result = measure.Result("naive", (1, 32, 2**20, 64))
    measure.measure(PEERS["naive"], result, torch.float32, device, 0.0)
    assert result.skipped.startswith("needs more than 524288 GiB")


def test_command(device, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--device", str(device), "--dtype", "float32", "--shapes", "1x2x16", "--tokens", "40", "20"]
    arguments += ["--peers", "linearard", "naive", "--error_tokens", "50", "--min_seconds", "0"]
    assert main([*arguments, "--commit", "abc", "--output_dir", str(tmp_path / "new")]) == 0
    (data,) = (tmp_path / "new").glob("peers-*.json")
    content = json.loads(data.read_text())
    assert content["context"]["commit"] == "abc"
    assert content["context"]["torch"] == torch.__version__
    assert [(r["peer"], r["shape"][2]) for r in content["results"]] == [
        (peer, tokens) for tokens in (20, 40) for peer in ("linearard", "naive")
    ]
    with data.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["N"] for row in rows] == ["20", "20", "40", "40"]
    assert all(float(row["median_ms"]) > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "commit: abc" in printed
    if any((tmp_path / "new").glob("*.png")):  # matplotlib is there
        assert (data.parent / f"{data.stem}-time.png").stat().st_size > 10000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must lie between 1 and 131072, got 0"),
        (["--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["--error_tokens", "-3"], "--error_tokens must lie between 1 and 131072, got -3"),
        (["--shapes", "1x2"], "--shapes must be BxHxD, for example 1x32x128, got '1x2'"),
        (["--shapes", "1x2x513"], "--shapes: the head dimension D must be at most 512, got '1x2x513'"),
        (["--peers", "magic"], "--peers must be one of linearard, naive, chunks, .*, got 'magic'"),
        (["--device", "cpu", "--peers", "cudnn"], "--peers: cudnn cannot run on cpu"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:<number>, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has .* GPUs that torch can use"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--min_seconds", "-1"], "--min_seconds must be 0 or more, got -1.0"),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: Not a directory"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.fullmatch(f"linearard.benchmark: {message}", line)
