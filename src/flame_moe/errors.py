"""Errors a user can act on: what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any


class FlameError(Exception):
    """A mistake in what the user gave us, told in one sentence with its place and its mend.

    The command line prints the message and exits with code 2; nothing is left half-written.

    Args:
        what: what is wrong.
        where: file, key, sample or task where it was found.
        mend: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        self.what, self.where, self.mend = what, where, mend
        place = f" [{where}]" if where else ""
        advice = f" {mend}" if mend else ""
        super().__init__(f"{what}{place}.{advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Its parts, not its message, so that it is the same after a journey between processes."""
        return partial(type(self), where=self.where, mend=self.mend), (self.what,)


class RecipeError(FlameError):
    """A recipe, task, modality or option that does not make sense."""


class DataError(FlameError):
    """Raw data, a sample or a label that cannot be used."""


class StoreError(FlameError):
    """A sample store that is missing, incomplete or of another version."""


class CheckpointError(FlameError):
    """A checkpoint that is missing, incomplete, damaged or does not fit the model."""


class AdapterError(FlameError):
    """An adapter, expert, task or target of a language model that does not fit the model or the request."""


class BusyError(FlameError):
    """Something that another process is writing at this moment."""


class NonFiniteError(FlameError):
    """A loss became NaN or infinite; raised before the weights are touched."""


class ExtraMissingError(FlameError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice for a misspelt name.

    Example:
        >>> nearest("mortalty", ["mortality", "los"])
        "Did you mean 'mortality'? Known: los, mortality."
    """
    valid = sorted(known)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    guess = f"Did you mean '{close[0]}'? " if close else ""
    return f"{guess}Known: {', '.join(valid) if valid else 'none'}."
