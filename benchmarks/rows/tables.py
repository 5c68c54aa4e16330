"""The chart-table step against pandas; `benchmarks/tables.py` measures more sizes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Measured, Row, Settings, Unavailable

ROWS_READ, REPEATS, MOST_MB = 10_000_000, 2, 600


def row(settings: Settings) -> Iterator[Measured]:
    """Ten million packed rows: wall time after the imports, and the largest resident memory."""
    from benchmarks import tables  # with polars, which the other rows do without

    with tempfile.TemporaryDirectory(prefix="flame-tables-") as place:
        folder, need = Path(place), ROWS_READ * 160 + (1 << 30)
        if shutil.disk_usage(folder).free < need:
            raise Unavailable(f"{need / 1e9:.0f} GB of free disk are needed in {folder.parent}; set TMPDIR")
        tables.start_child("write", str(folder), str(ROWS_READ))
        # In a process without PyTorch: what it starts would inherit the peak memory of this one.
        found = json.loads(tables.start_child("measure", str(folder / "chartevents.csv.gz"), str(REPEATS)))
    mine, theirs = found["ours"], found["pandas"]
    yield Measured("data-bin/time", "s", mine["seconds"], theirs["seconds"], theirs["seconds"] / mine["seconds"], 1.5)
    peak = mine["megabytes"]
    yield Measured("data-bin/memory", "MB", peak, theirs["megabytes"], peak, MOST_MB, most=True)


ROWS: dict[str, Row] = {"data-bin": row}
