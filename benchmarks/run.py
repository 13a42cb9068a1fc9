"""Run linearard_benchmark and write benchmarks/results/cpu-<cpu>-<threads>t.json or gpu-<gpu>.json.

    python benchmarks/run.py build/release/benchmarks/linearard_benchmark [--device=cuda] [options of the benchmark]

The file holds Google Benchmark's JSON; this script adds the commit and the GPU's driver to the context that the binary
writes (CPU or GPU, threads, versions, date) and refuses to label numbers with a commit that the working tree differs
from.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the numbers depend on: a change elsewhere does not make them wrong.
MEASURED = ["include", "src", "cuda", "cmake", "CMakeLists.txt", "benchmarks/*.cpp", "benchmarks/*.h"]


def commit() -> str:
    """The commit of the working tree, with -dirty when the measured sources differ from it."""
    head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], text=True).strip()
    changed = subprocess.check_output(["git", "-C", ROOT, "status", "--porcelain", "--", *MEASURED], text=True).strip()
    return f"{head}-dirty" if changed else head


def driver() -> str:
    """Version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.check_output(command, text=True).splitlines()[0]


def slug(name: str) -> str:
    """NVIDIA H200 -> nvidia-h200, for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def merge(destination: Path, new: dict) -> dict:
    """Replace the benchmarks of the same name in an existing file of the same commit, keep the others."""
    if not destination.exists():
        return new
    old = json.loads(destination.read_text())
    if old["context"].get("commit") != new["context"]["commit"]:
        return new
    names = {benchmark["name"] for benchmark in new["benchmarks"]}
    kept = [benchmark for benchmark in old["benchmarks"] if benchmark["name"] not in names]
    return {"context": new["context"], "benchmarks": kept + new["benchmarks"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy of the tree without git")
    arguments, options = parser.parse_known_args()
    tree = arguments.commit or commit()
    temporary = arguments.results / ".running.json"
    arguments.results.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(
            [
                arguments.binary,
                f"--benchmark_context=commit={tree}",
                f"--benchmark_out={temporary}",
                "--benchmark_out_format=json",
                *options,
            ],
            check=True,
        )
        result = json.loads(temporary.read_text())
    finally:
        temporary.unlink(missing_ok=True)
    context = result["context"]
    for key in ("host_name", "executable", "load_avg"):  # of one machine and one moment, of no use to a reader
        context.pop(key, None)
    if "gpu" in context:
        context["driver"] = driver()
        name = f"gpu-{slug(context['gpu'])}"
    else:
        name = f"cpu-{slug(context['cpu'])}-{context['threads']}t"
    destination = arguments.results / f"{name}.json"
    destination.write_text(json.dumps(merge(destination, result), indent=1) + "\n")
    print(f"wrote {destination.relative_to(ROOT) if destination.is_relative_to(ROOT) else destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
