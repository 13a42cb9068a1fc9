"""Short-text tasks in local files: which file is which task, and whether its lines can be used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from linearard.data import read_json_lines
from linearard.errors import UserError

TEMPLATES = Path(__file__).parent / "tasks"
_GENERIC = {"multiple_choice": "multiple_choice", "loglikelihood": "last_word"}  # output type: template for any file


@dataclass(frozen=True)
class LocalTask:
    """A task in a file: its examples, and the configuration for lm-evaluation-harness.

    rows: fields query, choices, gold (multiple choice) or context, continuation (last word).
    """

    name: str
    template: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def main_metric(self) -> str:
        """The metric that counts in means over tasks."""
        return str(self.template["metadata"]["main_metric"])


def templates() -> list[str]:
    """Names of the task configurations in the package."""
    return sorted(path.stem for path in TEMPLATES.glob("*.yaml"))


def find_files(spec: str) -> list[tuple[Path, str | None]] | None:
    """(file, template or None) that an item of --tasks means: a directory, a file, TEMPLATE=FILE; None if no file."""
    template, equals, rest = spec.partition("=")
    if equals:
        if template not in templates():
            raise UserError(f"unknown task template {template!r} in {spec!r}; known: {', '.join(templates())}")
        return [(Path(rest), template)]
    path = Path(spec)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_json_lines(file))
        if not files:
            raise UserError(f"the directory {spec!r} has no .jsonl files")
        return [(file, None) for file in files]
    if _is_json_lines(path) or len(path.parts) > 1:
        return [(path, None)]
    return None


def load_task(file: Path, template: str | None, limit: int | None) -> LocalTask:
    """Read and check a file. Its template is the named one, else that of the file's name, else that of its fields.

    limit: at most so many examples, the first ones. Raises UserError for lines that cannot be used, with their number.
    """
    rows = read_json_lines(file)
    if not rows:
        raise UserError(f"the task file {str(file)!r} has no examples")
    name = file.name.split(".")[0]
    kind = "multiple_choice" if "choices" in rows[0] else "loglikelihood"
    chosen = template or (name if name in templates() else _GENERIC[kind])
    content = yaml.safe_load((TEMPLATES / f"{chosen}.yaml").read_text(encoding="utf-8"))
    check = _check_choices if content["output_type"] == "multiple_choice" else _check_last_word
    for number, row in enumerate(rows, start=1):
        reason = check(row)
        if reason:
            raise UserError(f"line {number} of {str(file)!r} {reason}")
    return LocalTask(name, content, rows[:limit])


def load_tasks(files: Sequence[tuple[Path, str | None]], limit: int | None) -> list[LocalTask]:
    """All of them; raises UserError where two have one name."""
    tasks = [load_task(file, template, limit) for file, template in files]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two task files are called {name!r}: their results could not be told apart")
    return tasks


def _is_json_lines(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _check_choices(row: dict[str, Any]) -> str | None:
    """What is wrong with a multiple-choice example, or None."""
    query, choices, gold = row.get("query"), row.get("choices"), row.get("gold")
    if not isinstance(query, str) or not query.strip():
        return "needs a field 'query' with text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return "needs a field 'choices' with a list of at least two texts"
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"needs a field 'gold' from 0 to {len(choices) - 1}, got {gold!r}"
    return None


def _check_last_word(row: dict[str, Any]) -> str | None:
    """What is wrong with a last-word example, or None; `word` is taken for `continuation`."""
    if "continuation" not in row and "word" in row:
        row["continuation"] = row["word"]
    for name in ("context", "continuation"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"needs a field {name!r} with text"
    return None
