"""Reading a large table of charted events into hourly values: our step beside pandas, time and memory.

    python -m benchmarks.tables [MILLION_ROWS] [--repeats N]

Writes a synthetic table in the layout of MIMIC-IV `chartevents` (11 columns, 418 items of which 18 are kept, 14 % of
the rows), plain and packed, and its `icustays`, into a temporary folder, which is removed at the end.
Both sides filter the items, parse the times of what is left, join the stays, bin by hour and take means: ours as a
`Work.step` over `read_slices`, pandas in pieces of a million rows. Each run is a process of its own, the two alternate,
and their tables must be equal. Peak memory is the resident size that the operating system reports for the process.

Limits: less than 4 GB (aim: 600 MB), at least 2 million rows a second on two cores, at least 1.5 times pandas.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

SEED = 20
ITEMS, KEPT, SHARE = 418, 18, 0.14
FIRST_ITEM = 220_000
HOURS = 48
ROWS_PER_STAY = 4000
PIECE = 1_000_000
MOST_MB, AIM_MB, ROWS_PER_SECOND, TIMES_PANDAS = 4096, 600, 2e6, 1.5
KEPT_ITEMS = [FIRST_ITEM + 5 * i for i in range(KEPT)]
KEYS = ["stay_id", "itemid", "hour"]


def write_tables(folder: Path, rows: int) -> None:
    """chartevents.csv, chartevents.csv.gz and icustays.csv."""
    generator = np.random.default_rng(SEED)
    stays = max(1, rows // ROWS_PER_STAY)
    start = np.datetime64("2150-01-01T00:00:00") + generator.integers(0, 20 * 365 * 86400, stays).astype("m8[s]")
    stay = pl.DataFrame(
        {
            "subject_id": 10_000_000 + np.arange(stays),
            "hadm_id": 20_000_000 + np.arange(stays),
            "stay_id": 30_000_000 + np.arange(stays),
            "intime": start.astype("M8[us]"),
        }
    )
    stay.write_csv(folder / "icustays.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    others = np.setdiff1d(np.arange(FIRST_ITEM, FIRST_ITEM + ITEMS), KEPT_ITEMS)
    plain, packed = folder / "chartevents.csv", folder / "chartevents.csv.gz"
    with plain.open("wb") as a, gzip.open(packed, "wb", compresslevel=1) as b:
        for first in range(0, rows, PIECE):
            piece = _piece(generator, min(PIECE, rows - first), start, others)
            text = piece.write_csv(include_header=first == 0, datetime_format="%Y-%m-%d %H:%M:%S").encode()
            a.write(text)
            b.write(text)


def _piece(generator: np.random.Generator, n: int, start: np.ndarray, others: np.ndarray) -> pl.DataFrame:
    stay = np.sort(generator.integers(0, len(start), n))
    kept = generator.random(n) < SHARE
    item = np.where(kept, generator.choice(KEPT_ITEMS, n), generator.choice(others, n))
    charted = start[stay] + generator.integers(0, 72 * 60, n).astype("m8[m]")
    number = np.round(generator.normal(80, 15, n), 1)
    missing = generator.random(n) < 0.05
    return pl.DataFrame(
        {
            "subject_id": 10_000_000 + stay,
            "hadm_id": 20_000_000 + stay,
            "stay_id": 30_000_000 + stay,
            "caregiver_id": generator.integers(10_000, 99_999, n),
            "charttime": charted.astype("M8[us]"),
            "storetime": (charted + np.timedelta64(17, "m")).astype("M8[us]"),
            "itemid": item,
            "value": pl.Series(number.astype(str)),
            "valuenum": pl.Series(np.where(missing, np.nan, number)).fill_nan(None),
            "valueuom": np.where(item % 3 == 0, "mmHg", "insp/min"),
            "warning": generator.integers(0, 2, n),
        }
    )


def ours(chart: Path, folder: Path) -> pl.DataFrame:
    from flame_moe.data.slices import read_slices
    from flame_moe.data.tables import collect, scan_table
    from flame_moe.data.work import Work

    icu = folder / "icustays.csv"

    stays = collect(scan_table(icu, {"stay_id": pl.Int64, "intime": pl.Datetime}), icu).lazy()
    columns = {"stay_id": pl.Int64, "charttime": pl.Datetime, "itemid": pl.Int64, "valuenum": pl.Float64}
    hour = (pl.col("charttime") - pl.col("intime")).dt.total_seconds().floordiv(3600).alias("hour")

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        binned = rows.drop_nulls("valuenum").join(stays, on="stay_id").with_columns(hour)
        return binned.filter(pl.col("hour").is_between(0, HOURS - 1)).select(*KEYS, "valuenum")

    work = Work(folder / f"steps-{os.getpid()}")
    make = partial(read_slices, chart, columns, each, keep={"itemid": KEPT_ITEMS})
    made = work.step("chart", [chart, icu], {"items": KEPT_ITEMS, "hours": HOURS}, make)
    return collect(made.group_by(KEYS).agg(pl.col("valuenum").mean()), chart)


def with_pandas(chart: Path, folder: Path) -> pl.DataFrame:
    import pandas as pd

    stays = pd.read_csv(folder / "icustays.csv", usecols=["stay_id", "intime"])
    stays["intime"] = pd.to_datetime(stays["intime"], format="%Y-%m-%d %H:%M:%S")
    columns = {"stay_id": "int64", "charttime": "str", "itemid": "int64", "valuenum": "float64"}
    parts = []
    for piece in pd.read_csv(chart, usecols=list(columns), dtype=columns, chunksize=PIECE):
        kept = piece[piece["itemid"].isin(KEPT_ITEMS) & piece["valuenum"].notna()].copy()
        kept["charttime"] = pd.to_datetime(kept["charttime"], format="%Y-%m-%d %H:%M:%S")
        kept = kept.merge(stays, on="stay_id")
        kept["hour"] = (kept["charttime"] - kept["intime"]).dt.total_seconds() // 3600
        kept = kept[kept["hour"].between(0, HOURS - 1)]
        parts.append(kept.groupby(KEYS)["valuenum"].agg(["sum", "count"]).reset_index())
    whole = pd.concat(parts).groupby(KEYS)[["sum", "count"]].sum().reset_index()
    whole["valuenum"] = whole["sum"] / whole["count"]
    return pl.DataFrame({name: whole[name].to_numpy() for name in [*KEYS, "valuenum"]})


SIDES: dict[str, Callable[[Path, Path], pl.DataFrame]] = {"ours": ours, "pandas": with_pandas}


def child(side: str, chart: Path, folder: Path, out: Path) -> None:
    """One run in this process; prints what it took, the clock started after the imports."""
    import pandas  # noqa: F401

    import flame_moe.data.work  # noqa: F401

    began = time.perf_counter()
    table = SIDES[side](chart, folder)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    table.write_parquet(out)
    print(json.dumps({"seconds": seconds, "megabytes": peak}))


def start_child(*arguments: str) -> str:
    """What a process of its own prints. Tables are written by one too: a process inherits its parent's peak memory."""
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measure(chart: Path, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds and largest memory of each side; refuses tables that differ."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, runs in found.items():
            runs.append(json.loads(start_child(side, str(chart), str(folder), str(folder / side))))
        refuse_difference(*(pl.read_parquet(folder / side) for side in SIDES))
    return {
        side: {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "megabytes": max(run["megabytes"] for run in runs),
        }
        for side, runs in found.items()
    }


def refuse_difference(a: pl.DataFrame, b: pl.DataFrame) -> None:
    a, b = (t.with_columns(pl.col(KEYS).cast(pl.Int64)).sort(KEYS) for t in (a, b))
    if not a.select(KEYS).equals(b.select(KEYS)):
        raise SystemExit(f"the tables differ: {len(a):,} and {len(b):,} rows")
    np.testing.assert_allclose(a["valuenum"].to_numpy(), b["valuenum"].to_numpy(), rtol=1e-9)


def report(name: str, rows: int, found: dict[str, dict[str, float]]) -> bool:
    mine, theirs = found["ours"], found["pandas"]
    speed, ratio = rows / mine["seconds"], theirs["seconds"] / mine["seconds"]
    passed = mine["megabytes"] < MOST_MB and speed >= ROWS_PER_SECOND and ratio >= TIMES_PANDAS
    for side, run in found.items():
        rate = rows / run["seconds"] / 1e6
        print(f"{name:16} {side:7} {run['seconds']:7.2f} s  {rate:5.2f} M rows/s  {run['megabytes']:6.0f} MB")
    aim = "" if mine["megabytes"] < AIM_MB else f", above the aim of {AIM_MB} MB"
    print(f"{name:16} {ratio:.2f} times pandas, {'pass' if passed else 'FAIL'}{aim}")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("million", nargs="?", type=float, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        what, place, *more = chosen.child
        if what == "write":
            write_tables(Path(place), int(more[0]))
        elif what == "measure":
            print(json.dumps(measure(Path(place), Path(place).parent, int(more[0]))))
        else:
            child(what, Path(place), *map(Path, more))
        return
    rows = round(chosen.million * 1e6)
    with tempfile.TemporaryDirectory(prefix="flame-tables-") as place:
        folder, need = Path(place), rows * 160 + (1 << 30)
        if shutil.disk_usage(folder).free < need:
            raise SystemExit(f"{need / 1e9:.0f} GB of free disk are needed in {folder.parent}; set TMPDIR")
        start_child("write", str(folder), str(rows))
        cores, load = os.cpu_count(), os.getloadavg()[0]
        print(f"{rows / 1e6:g} M rows, {cores} cores, {platform.machine()}, load {load:.1f}, polars {pl.__version__}")
        passed = [
            report(chart.name, rows, measure(chart, folder, chosen.repeats))
            for chart in (folder / "chartevents.csv", folder / "chartevents.csv.gz")
        ]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
