"""Random calls against the oracle and against the checks.

    python tests/fuzz/fuzz.py --minutes 1 [--seed S]

Every case has a seed of its own, printed when it fails; `--seed S --cases 1` runs that case alone. Three kinds:
* valid calls with ordinary numbers: values, statistics and gradients against the float64 oracle, with its tolerances;
* valid calls with arbitrary bit patterns (any finite numbers, subnormals, or NaNs and infinities with payloads):
  finite inputs must give finite results, and nothing may crash;
* invalid calls: one argument of a valid call is spoiled; a RuntimeError that names the operator is the only way out.
Cases run in a child process: a crash of the library is a finding like any other, with its seed. Exit status 1 on a
finding; the last line is 'N passed, M failed'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import cases

# A case takes milliseconds: one that takes this long hangs.
SECONDS_PER_CASE = 120
CASES_PER_MESSAGE = 20


def run_case(seed: int) -> str | None:
    """Run the case of a seed; the description of what went wrong, or None."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    kind = generator.choice([cases.compare_with_oracle, cases.arbitrary_bits, cases.invalid_call])
    try:
        kind(generator)
    except Exception:
        return f"{kind.__name__}\n{traceback.format_exc(limit=6)}"
    return None


def _serve(connection) -> None:
    """In the child: run the seeds that arrive and answer each."""
    torch.set_num_threads(2)
    while (seed := connection.recv()) is not None:
        connection.send(run_case(seed))


class Runner:
    """A child process that runs cases, replaced when it dies or hangs."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.start()

    def start(self) -> None:
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, seed: int) -> str | None:
        """The finding of a case; a crash or a hang is one."""
        try:
            self.connection.send(seed)
            if self.connection.poll(SECONDS_PER_CASE):
                return self.connection.recv()
            finding = f"hangs: no answer after {SECONDS_PER_CASE} s"
        except (EOFError, ConnectionError):
            self.process.join(10)
            finding = f"crashed: exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.start()
        return finding

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to run")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first case; default: a random one")
    parser.add_argument("--cases", type=int, default=None, help="stop after this number of cases")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seeds from {first} on; reproduce a case with --seed S --cases 1", flush=True)

    deadline = time.monotonic() + 60.0 * arguments.minutes
    passed, failed = 0, []
    runner = Runner()
    seed = first
    while time.monotonic() < deadline and (arguments.cases is None or passed + len(failed) < arguments.cases):
        finding = runner.run(seed)
        if finding is None:
            passed += 1
        else:
            failed.append(seed)
            print(f"seed {seed}: {finding}", flush=True)
        seed += 1
    runner.stop()
    if failed:
        print(f"failed seeds: {failed}")
    print(f"{passed} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
