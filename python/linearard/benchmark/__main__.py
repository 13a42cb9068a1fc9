"""The command line of the comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from linearard.benchmark import measure, report
from linearard.benchmark.peers import PEERS
from linearard.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# By device: dtype, B x H x D, N.
DEFAULTS = {
    "cuda": ("bfloat16", ["1x32x128", "1x9x64"], [512, 1024, 2048, 4096, 8192, 16384]),
    "cpu": ("float32", ["1x9x64"], [256, 512, 1024]),
}
LARGEST_N = 131072
EPILOG = f"""\
Peers: {", ".join(f"{name} ({peer.label})" for name, peer in PEERS.items())}.
Defaults on a GPU: bfloat16, 1x32x128 and 1x9x64, N = 512 .. 16384; on the CPU: float32, 1x9x64, N = 256 .. 1024."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m linearard.benchmark",
        description="Compare relation KL with what a user would otherwise take: time, memory, exactness.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--dtype", help=", ".join(DTYPES))
    parser.add_argument("--shapes", nargs="+", metavar="BxHxD", help="batch, heads and head dimension")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help=f"sequence lengths, up to {LARGEST_N}")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="all that the device supports by default")
    parser.add_argument("--error_tokens", type=int, default=2048, metavar="N", help="of the errors (default 2048)")
    parser.add_argument("--min_seconds", type=float, default=0.5, metavar="S", help="of each time (default 0.5)")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"), metavar="DIRECTORY")
    parser.add_argument("--commit", help="recorded in the results; by default what git says of this package")
    return parser


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda or cuda:<number>, got {text!r}") from None
    if device.type not in DEFAULTS:
        raise UserError(f"--device must be cpu, cuda or cuda:<number>, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {text}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return device


def _shape(text: str) -> measure.Shape:
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--shapes must be BxHxD, for example 1x32x128, got {text!r}")
    batch, heads, head_dim = map(int, numbers)
    if head_dim > 512:
        raise UserError(f"--shapes: the head dimension D must be at most 512, got {text!r}")
    return batch, heads, 0, head_dim


def _choice(option: str, value: str, known: dict) -> str:
    if value not in known:
        raise UserError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    return value


def run(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    device = _device(options.device)
    dtype_name, shape_names, lengths = DEFAULTS[device.type]
    dtype = DTYPES[_choice("--dtype", options.dtype or dtype_name, DTYPES)]
    shapes = [_shape(text) for text in options.shapes or shape_names]
    lengths = sorted(set(options.tokens or lengths))
    for name, values in (("--tokens", lengths), ("--error_tokens", [options.error_tokens])):
        if not all(1 <= value <= LARGEST_N for value in values):
            raise UserError(f"{name} must lie between 1 and {LARGEST_N}, got {' '.join(map(str, values))}")
    if not options.min_seconds >= 0:
        raise UserError(f"--min_seconds must be 0 or more, got {options.min_seconds}")
    names = [_choice("--peers", name, PEERS) for name in options.peers or PEERS]
    peers = {name: PEERS[name] for name in names if device.type in PEERS[name].devices}
    if options.peers and len(peers) < len(set(names)):
        raise UserError(f"--peers: {', '.join(sorted(set(names) - set(peers)))} cannot run on {device.type}")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {options.output_dir}: {error.strerror}") from None
    if device.index is not None:
        torch.cuda.set_device(device)

    g = measure.matrix_rate(device, dtype, options.min_seconds)
    about = report.context(device, dtype, options.error_tokens, options.commit or report.commit_of_package(), g)
    print("\n".join(f"{name}: {value}" for name, value in about.items() if value is not None))
    print(report.HEADING, flush=True)
    results = []
    for shape in shapes:
        for result in measure.compare(peers, shape, lengths, options.error_tokens, dtype, device, options.min_seconds):
            result.fraction_of_g = None if result.tflops is None else result.tflops * 1e12 / g[1]
            print(report.line(result), flush=True)
            results.append(result)
            # Each time: an interrupted run leaves what it had.
            written = report.write_numbers(results, about, options.output_dir)
    print("wrote", *written, *report.write_pictures(results, about, options.output_dir))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for arguments that cannot be used."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"linearard.benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linearard.benchmark: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
