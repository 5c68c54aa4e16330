"""Who is told how far training has come. The default tells nobody; the command line shows a bar."""

from __future__ import annotations

from typing import Any


class Monitor:
    """Receives what happens during training; every method may be left as it is."""

    def stage(self, number: int, of: int, method: str) -> None:
        """Stage `number` (counted from 0) of `of` is learned next, by `method`."""

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        """A stage starts: `epochs` of `steps` each, of which `done` epochs are behind us already."""

    def step(self) -> None:
        """One optimizer step was taken."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch ended; `record` is what goes into the history."""

    def end(self) -> None:
        """The stage's training ended."""
