"""Progress for people: a bar on the terminal while a model learns, nothing in pipes and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Table

from flame_moe.training.metrics import PRIMARY
from flame_moe.training.monitor import Monitor

if TYPE_CHECKING:  # it brings polars, which a run does not need
    from flame_moe.data.work import Say


class Bar(Monitor):
    """What is learned, how far it is and how long it will take, on one line of the terminal.

    Args:
        console: where to draw; on anything but a terminal nothing is drawn.

    Example:
        >>> with Bar(Console(stderr=True)) as bar:  # doctest: +SKIP
        ...     run(recipe, "runs/digits", monitor=bar)
    """

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._line = self._progress.add_task("reading the samples", total=None, said="")
        self._stage = ""
        self._epochs = self._epoch = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, number: int, of: int, method: str) -> None:
        self._stage = f"{method}, stage {number + 1}/{of}"

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        self._epochs, self._epoch = epochs, done
        name = f"{self._stage}: {', '.join(tasks)}"
        self._progress.reset(
            self._line, total=epochs * steps, completed=done * steps, description=name, said=self._where()
        )

    def step(self) -> None:
        self._progress.advance(self._line)

    def epoch(self, record: dict[str, Any]) -> None:
        self._epoch = record["epoch"] + 1
        self._progress.update(self._line, said=f"{self._where()}, val {_score(record['val']):.3f}")

    def end(self) -> None:
        self._progress.update(self._line, description=f"{self._stage}: measuring", said="")

    def _where(self) -> str:
        return f"epoch {min(self._epoch + 1, self._epochs)}/{self._epochs}"


@contextmanager
def waiting(console: Console, text: str, clock: Callable[[], float] = monotonic) -> Iterator[Say]:
    """A spinner with the time that has passed, and, for a part of the work whose length is known, how long it still is.

    Args:
        console: where to draw; on anything but a terminal nothing is drawn.
        text: what is done.
        clock: seconds.

    Yields:
        A function that is told in words which part is being done now, and its share that is done, if that is known.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), _Share(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, get_time=clock) as progress:
        line, now = progress.add_task(text, total=None), text

        def say(what: str, share: float | None = None, /) -> None:
            nonlocal now
            if what != now:
                now = what
                progress.reset(line, total=None if share is None else 1.0, description=f"{text}: {what}")
            progress.update(line, completed=share)

        yield say


class _Share(ProgressColumn):
    """Bar, per cent and time left of a part whose length is known; nothing for others."""

    def __init__(self) -> None:
        super().__init__()
        self._bar, self._left = BarColumn(bar_width=12), TimeRemainingColumn(compact=True)

    def render(self, task: RichTask) -> RenderableType:
        if task.total is None:
            return ""
        row = Table.grid(padding=(0, 1))
        row.add_row(self._bar(task), f"{task.percentage:.0f}%", self._left(task), "left")
        return row


def _score(val: dict[str, dict[str, float]]) -> float:
    """Mean of the tasks' primary metrics, by which epochs are chosen."""
    primary = set(PRIMARY.values())
    return fmean(value for metrics in val.values() for name, value in metrics.items() if name in primary)


def errors() -> Console:
    """Where progress and mistakes are told."""
    return Console(stderr=True)
