"""Whole epochs of two recipes: against an earlier commit, and what of them is loading, moments and memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Measured, Row, Settings, Unavailable, child

RECIPES = {
    "physionet2012": ROOT / "src" / "flame_moe" / "recipes" / "physionet2012.toml",
    "clinic": ROOT / "benchmarks" / "clinic.toml",
}
CLINIC = 600
TURNS = 2
FLAT = 6
SHARE = "theirs: an epoch's training steps"


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Where the stores are until this process ends."""
    return tempfile.TemporaryDirectory(prefix="flame-epochs-")


@cache
def store(name: str, raw: Path) -> Path:
    from flame_moe.data.prepare import prepare

    place = Path(_folder().name) / name
    if name == "clinic":
        return prepare("clinic", None, place, options={"samples": CLINIC}).path
    if not (raw / name).is_dir():
        raise Unavailable(f"{name} is not in {raw}; say with --raw where it is")
    return prepare(name, raw / name, place).path


@contextmanager
def source(commit: str) -> Iterator[Path]:
    """The package's source at a commit, checked out beside this one for the time of the measurement."""
    with tempfile.TemporaryDirectory(prefix="flame-before-") as place:
        tree = Path(place) / "tree"
        try:
            _git("worktree", "add", "--detach", str(tree), commit)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"commit {commit} cannot be checked out ({error})") from None
        try:
            yield tree / "src"
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*command: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *command], check=True, capture_output=True)


def epochs(name: str, raw: Path, number: int, *more: str, tree: Path | None = None) -> dict[str, Any]:
    """What a process of its own says of so many epochs of a recipe's first stage."""
    found: dict[str, Any] = json.loads(
        child("benchmarks.epoch", str(RECIPES[name]), str(store(name, raw)), str(number), *more, source=tree)
    )
    return found


def against(name: str) -> Row:
    """Second epoch, validation included, in turns; and of ours the share of loading in its training."""

    def row(settings: Settings) -> Iterator[Measured]:
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "before": []}
        store(name, settings.raw)
        with source(settings.before) as tree:
            for _ in range(TURNS):
                found["before"].append(epochs(name, settings.raw, 2, tree=tree))
                found["ours"].append(epochs(name, settings.raw, 2, "--moments"))
        ours, before = ([run["whole"][1] for run in runs] for runs in found.values())
        ratio = statistics.median(b / a for a, b in zip(ours, before, strict=True))
        took = (statistics.median(side) for side in (ours, before))
        yield Measured(f"epoch/{name}", "s", *took, ratio, 2.0, note=f"theirs: commit {settings.before}")
        load = statistics.median(run["loading"] for run in found["ours"])
        train = statistics.median(run["training"][1] for run in found["ours"])
        yield Measured(f"epoch/{name}/loading", "s", load, train, load / train, 0.1, most=True, note=SHARE)
        gathered = statistics.median(run["moments"] for run in found["ours"])
        yield Measured(f"epoch/{name}/moments", "s", gathered, train, gathered / train, 0.2, most=True, note=SHARE)

    return row


def flat(settings: Settings) -> Iterator[Measured]:
    """The process's own memory after the last epoch over that after the second; its peak, files included."""
    found = epochs("clinic", settings.raw, FLAT)
    own = found["own"]
    note = f"MB that no file backs after epoch {FLAT}, and after epoch 2"
    yield Measured("memory-flat", "MB", own[-1], own[1], own[-1] / own[1], 1.05, most=True, note=note)
    yield Measured("memory-flat/peak", "MB", found["peak"], None, found["peak"], None, note="mapped files included")


ROWS: dict[str, Row] = {
    "epoch/physionet2012": against("physionet2012"),
    "epoch/clinic": against("clinic"),
    "memory-flat": flat,
}
