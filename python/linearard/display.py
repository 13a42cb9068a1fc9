"""The terminal: one-line messages, progress bars with a note, and plain lines where there is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class StageProgress:
    """The progress of one stage."""

    def __init__(self, name: str, total: int, console: Console, bar: Progress | None, task: TaskID | None) -> None:
        self._name = name
        self._total = total
        self._console = console
        self._bar = bar
        self._task = task
        self._done = 0
        self._note = ""

    def advance(self, amount: int) -> None:
        """So much more is done."""
        self.reach(self._done + amount)

    def reach(self, done: int) -> None:
        """So much is done in all. Without a terminal, every tenth of the stage is a line."""
        tenth_before, tenth_now = self._done * 10 // self._total, done * 10 // self._total
        self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif tenth_now > tenth_before:
            self._console.print(f"{self._name}: {done}/{self._total} {self._note}".rstrip(), highlight=False)

    def note(self, text: str) -> None:
        """Shown beside the bar from now on."""
        self._note = text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, note=text)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads on: the command line ends, with the same status wherever it happens."""
        raise  # what rich is handling


class Display:
    """Messages and progress on a rich console; a quiet one shows nothing."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or _Console(quiet=quiet)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[StageProgress]:
        """A bar over `total` units of work."""
        if not self.console.is_terminal:
            yield StageProgress(name, total, self.console, None, None)
            return
        columns = (
            TextColumn("{task.description:<15}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="bold"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, expand=True) as bar:
            yield StageProgress(name, total, self.console, bar, bar.add_task(name, total=total, note=""))
