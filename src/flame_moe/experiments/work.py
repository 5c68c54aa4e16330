"""Jobs that are done once and kept: several at a time, with progress for people."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LOG = logging.getLogger(__name__)
Tell = Callable[[int, int], None]
"""Called with how much was done in this call and how much there is left to do at most."""


class Job(Protocol):
    """Something to do that leaves a folder, whole or not at all."""

    @property
    def folder(self) -> Path:
        """Where it is kept; that it is there says that it is done."""

    def work(self) -> None:
        """Do it."""


class Work:
    """Does jobs, several at a time; tells how many are done and left."""

    def __init__(self, workers: int, tell: Tell) -> None:
        self.workers, self.tell, self.done = workers, tell, 0

    def off(self, jobs: Sequence[Job], then: int) -> None:
        """Do the jobs that are not done. One that breaks does not keep the others from being done first.

        Args:
            jobs: in order.
            then: how many there are to come at most after these.
        """
        todo = [job for job in jobs if not job.folder.exists()]
        self.tell(self.done, len(todo) + then)
        broken = []
        for number, error in enumerate(_errors(todo, self.workers), start=1):
            self.done += 1
            self.tell(self.done, len(todo) - number + then)
            if error is not None:
                broken.append(error)
        if broken:
            raise broken[0]


def _errors(jobs: Sequence[Job], workers: int) -> Iterator[BaseException | None]:
    """What each job ended with, as they end."""
    if workers == 0 or not jobs:
        for job in jobs:
            job.work()
            yield None
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_work, job): job.folder.name for job in jobs}
        for future in as_completed(running):
            if (error := future.exception()) is not None:
                _LOG.error("%s: %s", running[future], error)
            yield error


def _work(job: Job) -> None:
    job.work()


class Bar(Progress):
    """Cells done and the time left, on the terminal; nothing in pipes."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("cells"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[said]}")
        super().__init__(*columns, left, console=console, transient=True, disable=not console.is_terminal)
        self._line = self.add_task("cells", total=None, said="")
        self._began = time.monotonic()

    def tell(self, done: int, left: int) -> None:
        """Every cell takes about as long as the mean of those that were done now."""
        self.update(
            self._line, total=done + left, completed=done, said=said(done, left, time.monotonic() - self._began)
        )


def said(done: int, left: int, seconds: float) -> str:
    """How long it will take still; nothing where nothing was done yet to judge by."""
    if done == 0:
        return ""
    minutes = round(seconds / done * left / 60)
    return f"about {minutes // 60}:{minutes % 60:02d} h left"
