"""No source lets validation or test data into what is fitted: statistics stand when those rows are edited."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.data.prepare import prepare
from flame_moe.data.store import Store

SUBJECTS = 60
Make = Callable[[Path, set[str]], Path]
"""Writes a raw folder in which the values (not the labels) of the named subjects are edited."""


def value(subject: int, step: int, edited: bool) -> float:
    return 80.0 + subject + step + (17.0 if edited else 0.0)


def physionet2012(root: Path, edited: set[str]) -> Path:
    (root / "set-a").mkdir(parents=True)
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for i in range(SUBJECTS):
        name = str(1000 + i)
        lines = [f"00:00,RecordID,{name}", "00:00,Age,60", "00:00,Gender,1", "00:00,Height,170", "00:00,ICUType,3"]
        lines += [f"{h:02}:00,HR,{value(i, h, name in edited)}" for h in range(1, 4)]
        (root / "set-a" / f"{name}.txt").write_text("\n".join(["Time,Parameter,Value", *lines, ""]))
        outcomes.append(f"{name},{5 + i % 7},{i % 5},{3 + i % 9},{-1 if i % 3 else 2},{int(i % 3 == 0)}")
    (root / "Outcomes-a.txt").write_text("\n".join([*outcomes, ""]))
    return root


def physionet2019(root: Path, edited: set[str]) -> Path:
    from flame_moe.data.sources._physionet2019_tables import COLUMNS, LABEL

    head = (*COLUMNS, LABEL)
    root.mkdir(parents=True)
    for i in range(SUBJECTS):
        rows = []
        for hour in range(1, 40 + 20 * (i % 2)):
            known = {"HR": value(i, hour, f"p{i}" in edited), "Age": 50 + i, "Gender": i % 2, "ICULOS": hour}
            known[LABEL] = int(i % 3 == 0 and hour > 36)
            rows.append("|".join(str(known.get(name, "NaN")) for name in head))
        (root / f"p{i}.psv").write_text("\n".join(["|".join(head), *rows, ""]))
    return root


def meds(root: Path, edited: set[str]) -> Path:
    start = datetime(2030, 1, 1)
    events = [
        (i, start + timedelta(hours=h), f"LAB//{i % 4 + (50 if str(i) in edited else 0)}", value(i, h, False))
        for i in range(SUBJECTS)
        for h in range(5)
    ]
    labels = [(i, start + timedelta(hours=2), i % 3 == 0) for i in range(SUBJECTS)]
    for path, rows, names in (
        ("data/0.parquet", events, ["subject_id", "time", "code", "numeric_value"]),
        ("labels/dies/0.parquet", labels, ["subject_id", "prediction_time", "boolean_value"]),
    ):
        (root / path).parent.mkdir(parents=True)
        pl.DataFrame(rows, schema=names, orient="row").write_parquet(root / path)
    return root


def folder(root: Path, edited: set[str]) -> Path:
    root.mkdir(parents=True)
    samples = [f"s{i},p{i // 2},{40 + i},{int(i % 3 == 0)}" for i in range(2 * SUBJECTS)]
    rows = [f"s{i},{h},{value(i, h, f'p{i // 2}' in edited)}" for i in range(2 * SUBJECTS) for h in range(3)]
    (root / "samples.csv").write_text("\n".join(["id,subject,age,died", *samples, ""]))
    (root / "vitals.csv").write_text("\n".join(["id,hours,hr", *rows, ""]))
    (root / "flame.toml").write_text("""
        [samples]
        file = "samples.csv"
        subject = "subject"
        [modalities.vitals]
        kind = "series"
        file = "vitals.csv"
        time = "hours"
        columns = ["hr"]
        [tasks.died]
        kind = "binary"
        column = "died"
    """)
    return root


SOURCES: dict[str, tuple[Make, dict[str, Any]]] = {
    "physionet2012": (physionet2012, {"sets": ["a"]}),
    "physionet2019": (physionet2019, {}),
    "meds": (meds, {}),
    "folder": (folder, {}),
}


def subjects_of(store: Store) -> dict[str, set[int]]:
    """Subject -> the splits it is in."""
    found: dict[str, set[int]] = {}
    for subject, split in zip(store.subjects(np.arange(len(store))), store.splits.tolist(), strict=True):
        found.setdefault(subject, set()).add(split)
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_statistics_of_a_source_do_not_see_validation_and_test(name: str, tmp_path: Path) -> None:
    make, options = SOURCES[name]
    plain = prepare(name, make(tmp_path / "raw", set()), tmp_path / "plain", options=options)
    splits = subjects_of(plain)
    unseen = {subject for subject, found in splits.items() if 0 not in found}
    assert 0 < len(unseen) < len(splits)
    other = prepare(name, make(tmp_path / "edited", unseen), tmp_path / "other", options=options)
    assert plain.manifest["statistics"] == other.manifest["statistics"]
    # The edit is real, and one of a training subject is seen: the comparison above can fail.
    assert {f: r["sha256"] for f, r in plain.manifest["files"].items() if f.endswith("values.bin")} != {
        f: r["sha256"] for f, r in other.manifest["files"].items() if f.endswith("values.bin")
    }
    seen = prepare(name, make(tmp_path / "seen", set(splits) - unseen), tmp_path / "third", options=options)
    assert plain.manifest["statistics"] != seen.manifest["statistics"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_subject_of_a_source_is_in_one_split_only(name: str, tmp_path: Path) -> None:
    make, options = SOURCES[name]
    for seed in (0, 1):
        chosen = {**options, "seed": seed}
        store = prepare(name, make(tmp_path / f"raw{seed}", set()), tmp_path / f"store{seed}", options=chosen)
        found = subjects_of(store)
        assert all(len(splits) == 1 for splits in found.values())
        assert set.union(*found.values()) == {0, 1, 2}
