"""Memory and time of `flame prepare mimic_iv` on invented releases of growing size: the memory must not grow with it.

    python -m benchmarks.prepare [MILLION_ROWS ...] [--packed]

Writes a release in the layout of MIMIC-IV into a temporary folder: so many rows of `chartevents` (11 columns, 409 items
of which nine are vital signs, 14 % of the rows), a quarter as many of `labevents`, and a stay per 4,500 rows, in the
order of patients as published. Each release is prepared in a process of its own and removed before the next is written.
Peak memory is the resident size that the operating system reports for that process, pages of mapped files included.

Limits: less than 4 GB, and the largest release at most 1.3 times the smallest that fills a part of stays.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flame_moe.data.sources._mimic_variables import LABS, VITALS, Channel

SEED = 20
PIECE, ROWS_PER_STAY, SHARE = 1_000_000, 4500, 0.14
STAYS = PIECE // ROWS_PER_STAY
MARK = b"@@@"
MOST_MB, MOST_GROWTH = 4096, 1.3
CHARTED, TIME = 240, "%Y-%m-%d %H:%M:%S"


def write_release(raw: Path, pieces: int, *, packed: bool) -> None:
    """Every million rows are the same but for the numbers of their patients, which makes writing fast.

    Patient, admission and stay are 1, 2 or 3, the number of the million, and a number from 0.
    """
    generator = np.random.default_rng(SEED)
    begin = np.datetime64("2150-01-01") + generator.integers(0, 20 * 365 * 86400, STAYS).astype("m8[s]")
    end = begin + generator.integers(24, 360, STAYS).astype("m8[h]")
    died = generator.random(STAYS) < 0.1
    people = {"subject_id": _ids(1), "gender": "F", "anchor_age": 60, "anchor_year": 2150, "dod": ""}
    left = (end + np.timedelta64(24, "h")).astype("M8[us]")
    admissions = {
        "subject_id": _ids(1),
        "hadm_id": _ids(2),
        "admittime": (begin - np.timedelta64(2, "h")).astype("M8[us]"),
        "dischtime": left,
        "deathtime": pl.select(pl.when(pl.Series(died)).then(pl.Series(left))).to_series(),
        "admission_type": "URGENT",
        "hospital_expire_flag": died.astype(int),
    }
    stays = {"subject_id": _ids(1), "hadm_id": _ids(2), "stay_id": _ids(3)}
    stays |= {"first_careunit": "Neuro Stepdown", "intime": begin.astype("M8[us]"), "outtime": end.astype("M8[us]")}
    chart, lab = (_events(generator, channels, n, begin) for channels, n in ((VITALS, PIECE), (LABS, PIECE // 4)))
    for name, columns in (
        ("hosp/patients", people),
        ("hosp/admissions", admissions),
        ("icu/icustays", stays),
        ("icu/chartevents", chart),
        ("hosp/labevents", {name: column for name, column in lab.items() if name != "stay_id"}),
    ):
        _write(raw / f"{name}.csv", pl.DataFrame(columns), pieces, packed=packed and "events" in name)


def _ids(kind: int, stay: np.ndarray | None = None) -> pl.Series:
    number = pl.Series(np.arange(STAYS) if stay is None else stay).cast(pl.String).str.zfill(4)
    return f"{kind}{MARK.decode()}" + number


def _events(generator: np.random.Generator, channels: Sequence[Channel], n: int, begin: np.ndarray) -> dict[str, Any]:
    stay = np.sort(generator.integers(0, STAYS, n))
    items = np.array([channel.items[0] for channel in channels])
    middle = np.array([(channel.low + channel.high) / 2 for channel in channels])
    units = {channel.items[0]: next(iter(channel.units), "") for channel in channels}
    channel = generator.integers(0, len(items), n)
    item = np.where(generator.random(n) < SHARE, items[channel], generator.integers(230_000, 230_400, n))
    charted = begin[stay] + (generator.random(n) * CHARTED * 60).astype("m8[m]")
    number = np.round(middle[channel] * generator.uniform(0.8, 1.2, n), 1)
    return {
        "subject_id": _ids(1, stay),
        "hadm_id": _ids(2, stay),
        "stay_id": _ids(3, stay),
        "caregiver_id": generator.integers(10_000, 99_999, n),
        "charttime": charted.astype("M8[us]"),
        "storetime": (charted + np.timedelta64(17, "m")).astype("M8[us]"),
        "itemid": item,
        "value": number.astype(str),
        "valuenum": number,
        "valueuom": pl.Series(item).replace_strict(units, default="mmHg"),
        "warning": np.zeros(n, dtype=int),
    }


def _write(path: Path, piece: pl.DataFrame, pieces: int, *, packed: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, text = (piece.write_csv(datetime_format=TIME).encode()).split(b"\n", 1)
    with gzip.open(f"{path}.gz", "wb", compresslevel=1) if packed else path.open("wb") as file:
        file.write(header + b"\n")
        for number in range(pieces):
            file.write(text.replace(MARK, b"%03d" % number))


def child(what: str, raw: Path, *more: str) -> None:
    """One thing in this process: a release has to be written in one too, because peak memory is inherited."""
    if what == "write":
        write_release(raw, int(more[0]), packed=more[1] == "packed")
        return
    from flame_moe.data.prepare import prepare

    began = time.perf_counter()
    store = prepare("mimic_iv", raw, raw.with_name("store"), tasks=["ihm", "los"])
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = time.process_time()
    print(json.dumps({"samples": len(store), "seconds": seconds, "processor": cpu, "megabytes": peak}))


def start_child(*arguments: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("million", nargs="*", type=int, default=[10, 24, 60])
    parser.add_argument("--packed", action="store_true", help="the two large tables as .csv.gz")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        what, place, *more = chosen.child
        child(what, Path(place), *more)
        return
    print(f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}, polars {pl.__version__}")
    peaks = []
    for million in chosen.million:
        with tempfile.TemporaryDirectory(prefix="flame-prepare-") as place:
            need = million * (150 << 20) + (1 << 30)
            if shutil.disk_usage(place).free < need:
                raise SystemExit(f"{need / 1e9:.0f} GB of free disk are needed in {Path(place).parent}; set TMPDIR")
            start_child("write", f"{place}/raw", str(million), "packed" if chosen.packed else "plain")
            found = json.loads(start_child("prepare", f"{place}/raw"))
        rate = 1.25 * million / found["seconds"]
        print(
            f"{million:4} M rows {found['samples']:7,} stays {found['seconds']:7.1f} s ({found['processor']:.1f} s of "
            f"processor) {rate:5.2f} M rows/s {found['megabytes']:6.0f} MB",
            flush=True,
        )
        peaks.append(found["megabytes"])
    passed = max(peaks) < MOST_MB and max(peaks) <= MOST_GROWTH * peaks[0]
    print("pass" if passed else "FAIL")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
