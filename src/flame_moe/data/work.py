"""What a source may use while it reads: steps that are done once, a record of the files it read, a voice for progress.

Reading a large release takes minutes per table. Each table is a step: its result is a Parquet file that is written
under a temporary name, synced and renamed, so a finished step is not redone after a crash and a half-written one is
never read. The file's name holds a digest of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from flame_moe.data.publish import sibling
from flame_moe.data.slices import Watch, write_slices
from flame_moe.data.tables import explain
from flame_moe.files import sha256, sync_folder


class Say(Protocol):
    """Told in words what is being done, and what share of it is done, 0 to 1, where that is known."""

    def __call__(self, text: str, share: float | None = None, /) -> None: ...


Make = Callable[[Watch], Iterable[pl.DataFrame]]


class Work:
    """One reading of one source.

    Args:
        folder: where steps are kept; made when it is first needed.
        say: told what is being done and how far it is; default nobody.

    Example:
        def make(watch):
            return read_slices(path, columns, lambda rows: rows.filter(usable), watch)

        lab = work.step("labevents", [path], {"window": 48}, make)  # a LazyFrame of what is on the disk
    """

    def __init__(self, folder: str | Path, say: Say | None = None) -> None:
        self.folder = Path(folder)
        self.say: Say = say if say is not None else _nobody
        self._inputs: dict[Path, None] = {}

    @property
    def vectors(self) -> Path:
        """Where vectors that a pre-trained model computed are kept for the next reading, under what they were made of.

        It lies beside the steps and is shared by all stores of one folder; `clear` leaves it alone.
        """
        return self.folder.with_name(".vectors")

    def step(self, name: str, inputs: Iterable[Path], settings: Mapping[str, Any], make: Make) -> pl.LazyFrame:
        """The result of `make`, written to a file once, frame by frame, and read from it afterwards.

        Args:
            name: of the step, one word; also what is said.
            inputs: files it reads; a change of size or time of one of them makes the step anew.
            settings: whatever else it depends on, JSON-ready, the version of its own code included.
            make: given whom to tell how far it is, gives the frames, see `flame_moe.data.slices`; only called if the
                step is not done.

        Raises:
            DataError: if the data cannot be read; nothing is left behind.
        """
        files = [self.note(path) for path in inputs]
        done = self.folder / f"{name}-{_digest(name, files, settings)}.parquet"
        if not done.exists():
            self.say(name, 0.0)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = sibling(done)
            try:
                with explain(", ".join(str(file) for file in files) or name):
                    write_slices(part, make(lambda share: self.say(name, share)))
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                part.replace(done)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            sync_folder(self.folder)
        return pl.scan_parquet(done)

    def note(self, path: Path) -> Path:
        """Remember that a raw file was read, for the store's manifest; returns the path."""
        self._inputs[path] = None
        return path

    def inputs(self, root: Path) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every file noted, by its path from `root` (`../labels/a.parquet` for one beside it)."""
        found = {}
        for path in self._inputs:
            name = Path(os.path.relpath(path, root)).as_posix()
            found[name] = {"bytes": path.stat().st_size, "sha256": self._hash(path)}
        return dict(sorted(found.items()))

    def _hash(self, path: Path) -> str:
        size = max(1, path.stat().st_size)
        return sha256(path, lambda done: self.say(f"hashing {path.name}", done / size))

    def clear(self) -> None:
        """Remove the steps: the store they were made for stands."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _digest(name: str, files: Iterable[Path], settings: Mapping[str, Any]) -> str:
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([name, states, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _nobody(text: str, share: float | None = None, /) -> None:
    """Nobody is told."""
