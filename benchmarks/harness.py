"""How things are measured: two sides take turns on one thread, in processor time, one ratio per round."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 0.03
"""Seconds that one side runs in a round at the least; shorter calls are repeated."""


@dataclass(frozen=True)
class Settings:
    """What a row may be told.

    Attributes:
        rounds: turns that two sides take.
        before: git commit against which whole epochs are measured.
        raw: folder of the open data sets, by name.
    """

    rounds: int = 7
    before: str = "dd02784"
    raw: Path = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        name: of the row, and after a slash the case.
        unit: of `ours` and `theirs`.
        ours, theirs: what was measured; None where there is nothing to set beside it.
        value: what is held against the gate: by default theirs / ours.
        gate: its limit; None where the figure is only reported.
        most: whether the gate is the most that passes, instead of the least.
        note: what else there is to say.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None
    value: float
    gate: float | None
    most: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.gate is None:
            return None
        return self.value <= self.gate if self.most else self.value >= self.gate

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class Unavailable(Exception):  # noqa: N818 - it is no error: a row that cannot be measured here says why
    """A row cannot be measured on this machine."""


Clock = Callable[[], float]
Row = Callable[[Settings], Iterator[Measured]]


class Sides(NamedTuple):
    """Median seconds of both sides, and the median of their ratios per round, theirs / ours."""

    ours: float
    theirs: float
    ratio: float


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, clock: Clock = time.process_time
) -> Sides:
    """Let two sides take turns, after two calls of each that warm up. Seconds are of the clock, per call."""
    sides = (ours, theirs)
    counts = [max(1, round(SHORTEST / max(_warm(side, clock), 1e-6))) for side in sides]
    found: list[tuple[float, float]] = []
    for number in range(rounds):
        took = [0.0, 0.0]
        # Who goes first changes from round to round.
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            took[i] = seconds(sides[i], counts[i], clock)
        found.append((took[0], took[1]))
    return Sides(
        statistics.median(a for a, _ in found),
        statistics.median(b for _, b in found),
        statistics.median(b / a for a, b in found),
    )


def seconds(call: Callable[[], object], times: int = 1, clock: Clock = time.process_time) -> float:
    """Time of one of `times` calls, garbage collected before and not during."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(times):
            call()
        return (clock() - start) / times
    finally:
        gc.enable()


def _warm(call: Callable[[], object], clock: Clock) -> float:
    call()
    return seconds(call, clock=clock)


def faster(name: str, sides: Sides, gate: float, note: str = "") -> Measured:
    """A row of two sides whose ratio must reach the gate."""
    unit, scale = ("ms", 1e3) if sides.theirs < 1 else ("s", 1.0)
    return Measured(name, unit, scale * sides.ours, scale * sides.theirs, sides.ratio, gate, note=note)


def no_slower(name: str, sides: Sides, gate: float, note: str = "") -> Measured:
    """A row in which ours may take at most `gate` times as long."""
    return Measured(name, "ms", 1e3 * sides.ours, 1e3 * sides.theirs, 1 / sides.ratio, gate, most=True, note=note)


def saved_bytes(forward: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each memory once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    del result
    return found


def insist_equal(name: str, ours: Tensor, theirs: Tensor, *, atol: float = 2e-5, relative: float | None = None) -> None:
    """Stop if two results differ: by more than `atol`, or, with `relative`, by more than that share of the largest."""
    limit = atol if relative is None else relative * float(theirs.detach().abs().max())
    apart = float((ours.detach() - theirs.detach()).abs().max())
    if not apart <= limit:
        raise AssertionError(f"{name}: the two sides differ by {apart:.2e}, more than {limit:.2e}")


def child(module: str, *arguments: str, source: Path | None = None) -> str:
    """What `python -m MODULE` prints in a process of its own, on one thread.

    Args:
        module: to run, from the root of the repository.
        arguments: of the command.
        source: folder of the package's source, default this repository's.

    Raises:
        Unavailable: where another source imports what is not installed.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    env["PYTHONPATH"] = str(source or ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        if source is not None and reason.startswith("ModuleNotFoundError"):
            raise Unavailable(f"the other source needs a package that is not installed: {reason}")
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout
