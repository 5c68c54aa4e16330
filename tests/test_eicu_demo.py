"""eICU-CRD demo 2.0.1 and the YAIB labels of its stays: counts pinned, and recomputed without the source's code."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.eicu import SOURCE, EicuOptions
from flame_moe.data.work import Work
from flame_moe.errors import DataError
from tests.eicu_release import patient, samples, write_release

DAY = 1440
HEART_RATE = 22
"""Place of the heart rate among the channels of YAIB."""


@pytest.fixture(scope="module")
def demo(shared_data: Path) -> Path:
    folder = shared_data / "eicu-demo" / "eicu-collaborative-research-database-demo-2.0.1"
    if not folder.is_dir():
        pytest.skip("the eICU demo is not among the public data")
    return folder


@pytest.fixture(scope="module")
def yaib(shared_data: Path) -> Path:
    if not (shared_data / "yaib-demo").is_dir():
        pytest.skip("the YAIB demo is not among the public data")
    return shared_data / "yaib-demo"


Read = tuple[dict[str, Sample], Funnel]


def read(folder: Path, work: Path, **options: Any) -> Read:
    funnel, chosen = Funnel(), EicuOptions.parse(options, where="options")
    found = {sample.id: sample for sample in SOURCE.read(folder, chosen, funnel, Work(work))}
    return found, funnel


@pytest.fixture(scope="module")
def stays(demo: Path, yaib: Path, tmp_path_factory: pytest.TempPathFactory) -> Read:
    return read(demo, tmp_path_factory.mktemp("steps"), yaib=str(yaib))


def rows(folder: Path, table: str) -> Iterator[dict[str, str]]:
    with gzip.open(folder / f"{table}.csv.gz", "rt", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def adult(row: dict[str, str]) -> bool:
    return row["age"] == "> 89" or (row["age"] != "" and int(row["age"]) >= 18)


def cohort(folder: Path) -> dict[str, dict[str, str]]:
    return {
        row["patientunitstayid"]: row
        for row in rows(folder, "patient")
        if adult(row) and int(row["unitdischargeoffset"]) > DAY
    }


def test_the_demo_is_the_one_that_was_published(demo: Path) -> None:
    table = list(rows(demo, "patient"))
    assert len(table) == 2520
    assert len({row["uniquepid"] for row in table}) == 1841
    assert len({row["hospitalid"] for row in table}) == 186
    assert Counter(row["unitdischargestatus"] for row in table) == {"Alive": 2392, "Expired": 126, "": 2}


def test_the_cohort_of_the_demo(demo: Path, stays: Read) -> None:
    found, funnel = stays
    assert [(step.text, step.after) for step in funnel.steps] == [
        ("unit stays in the table patient", 2520),
        ("has a known age", 2516),
        ("is of an adult (18 years or more)", 2512),
        ("lasts longer than the 24 h until prediction", 1622),
    ]
    truth = cohort(demo)
    assert found.keys() == truth.keys()
    assert {stay: sample.subject for stay, sample in found.items()} == {s: r["uniquepid"] for s, r in truth.items()}
    assert len({sample.subject for sample in found.values()}) == 1328


def test_labels_of_the_demo_follow_from_the_patient_table(demo: Path, stays: Read) -> None:
    truth: dict[str, dict[str, float]] = {"mortality": {}, "readmission": {}, "los": {}}
    table = list(rows(demo, "patient"))
    for stay, row in cohort(demo).items():
        end = int(row["unitdischargeoffset"])
        truth["mortality"][stay] = float(row["unitdischargestatus"] == "Expired")
        truth["los"][stay] = float(end > 4 * DAY)
        if row["unitdischargestatus"] == "Alive":
            left = end - int(row["hospitaladmitoffset"])
            truth["readmission"][stay] = float(
                any(
                    left < -int(other["hospitaladmitoffset"]) <= left + 30 * DAY
                    for other in table
                    if other["patienthealthsystemstayid"] == row["patienthealthsystemstayid"]
                    and other["unitstaytype"] != "stepdown/other"
                    and other["patientunitstayid"] != stay
                )
            )
    found, _ = stays
    for task, expected in truth.items():
        assert {s: float(x.targets[task][0]) for s, x in found.items() if task in x.targets} == expected
    assert [(len(known), sum(known.values())) for known in truth.values()] == [(1622, 78), (1544, 81), (1622, 364)]


def test_the_published_codes_cohort_and_labels_on_the_demo(demo: Path, tmp_path: Path) -> None:
    code = {"hours": 12, "lookback": 0, "over_89": "exclude", "max_days": 10, "readmission": "15d"}
    found, funnel = read(
        demo, tmp_path, **code, event_rules="code", event_types=["diagnosis", "treatment", "medication", "lab"]
    )
    count = Counter[str]()
    for table, text, offsets in (
        ("diagnosis", ("diagnosisstring",), ("diagnosisoffset",)),
        ("treatment", ("treatmentstring",), ("treatmentoffset",)),
        ("medication", ("drugname", "drughiclseqno"), ("drugstartoffset", "drugorderoffset")),
        ("lab", ("labname",), ("labresultoffset",)),
    ):
        for row in rows(demo, table):
            known = table != "lab" or int(row["labresultrevisedoffset"]) <= 720
            in_time = max(int(row[offset]) for offset in offsets) <= 719
            count[row["patientunitstayid"]] += known and in_time and any(row[column].strip() for column in text)
    truth = {
        row["patientunitstayid"]: row
        for row in rows(demo, "patient")
        if row["age"] != "> 89" and adult(row) and 720 < int(row["unitdischargeoffset"]) <= 10 * DAY
    }
    assert {stay: len(x.modalities["events"].values) for stay, x in found.items()} == {
        stay: count[stay] for stay in truth if 3 <= count[stay] <= 256
    }
    assert [step.after for step in funnel.steps] == [2520, 2516, 2512, 2414, 2067, 1990, 1862]
    deaths = {stay for stay, x in found.items() if x.targets["mortality"][0]}
    assert deaths == {stay for stay in found if truth[stay]["unitdischargestatus"] == "Expired"}
    assert (len(deaths), sum(x.targets["readmission"][0] for x in found.values())) == (77, 223)


def test_the_values_of_the_demo_are_those_of_its_tables(demo: Path, stays: Read) -> None:
    found, funnel = stays
    names = {m.name: m.channels for m in SOURCE.describe(demo, EicuOptions())[0]}
    cuff: dict[tuple[str, int], list[float]] = {}
    for row in rows(demo, "vitalAperiodic"):
        minute = int(row["observationoffset"])
        if -360 <= minute <= DAY and row["noninvasivemean"] and 1 <= float(row["noninvasivemean"]) <= 300:
            cuff.setdefault((row["patientunitstayid"], minute), []).append(float(row["noninvasivemean"]))
    at = names["vitals"].index("cuff_mean")
    seen = {}
    for stay, sample in found.items():
        if "vitals" in sample.modalities:
            values, times, observed = sample.modalities["vitals"]
            assert times is not None
            assert observed is not None
            minutes = np.round(times * 1800 - 360).astype(int)
            cells = zip(minutes, values[:, at], observed[:, at], strict=True)
            seen |= {(stay, int(minute)): float(value) for minute, value, known in cells if known}
    expected = {key: float(np.median(values)) for key, values in cuff.items() if key[0] in found}
    assert len(seen) == 76568
    assert seen == expected
    present = Counter(name for sample in found.values() for name in sample.modalities)
    assert present == {
        "static": 1622,
        "events": 1605,
        "yaib_series": 1589,
        "vitals": 1545,
        "notes": 1534,
        "apache": 1490,
        "fluids": 1271,
        "respiratory": 779,
        "labs": 112,
    }
    assert funnel.counts["stay without a usable row in the window: modality labs absent"] == 1510
    subset = "labs absent in most stays: the table may be a subset, values taken all the same"
    assert funnel.counts[subset] == 1510
    assert funnel.counts["table vitalPeriodic absent: its values or events are left out"] == 1


def test_every_known_drug_of_the_first_day_is_an_event(demo: Path, tmp_path: Path) -> None:
    found, _ = read(demo, tmp_path, event_types=["medication"], max_events=100_000)
    truth: dict[str, set[tuple[int, str]]] = {}
    for row in rows(demo, "medication"):
        known = max(int(row["drugorderoffset"]), int(row["drugstartoffset"]))
        name = " ".join(row["drugname"].lower().split()) or (row["drughiclseqno"] and f"hicl {row['drughiclseqno']}")
        if known <= DAY and name:
            truth.setdefault(row["patientunitstayid"], set()).add((known, name))
    drawn = {stay: sample.modalities["events"] for stay, sample in found.items() if "events" in sample.modalities}
    counts = {stay: len(part.values) for stay, part in drawn.items()}
    assert counts == {stay: len(drugs) for stay, drugs in truth.items() if stay in found}
    assert (len(counts), sum(counts.values())) == (1182, 27979)


def test_labels_of_yaib_agree_with_the_discharge_status_of_all_1367_stays(demo: Path, yaib: Path, stays: Read) -> None:
    outcome = {row["patientunitstayid"]: row["unitdischargestatus"] == "Expired" for row in rows(demo, "patient")}
    label = pl.read_parquet(yaib / "mortality24" / "eicu_demo" / "outc.parquet")
    pairs = [(bool(died), outcome[str(stay)]) for stay, died in label.rows()]
    assert Counter(pairs) == {(False, False): 1297, (True, True): 70}
    _, funnel = stays
    assert funnel.counts["yaib_mortality24 differs from unitdischargestatus"] == 0
    assert funnel.counts["yaib_mortality24: stay with a label that is not in the cohort"] == 1


def test_labels_of_yaib_are_those_of_the_hour_of_prediction(yaib: Path, stays: Read) -> None:
    found, _ = stays
    got = {
        task: {s: float(x.targets[task][0]) for s, x in found.items() if task in x.targets}
        for task in ("yaib_mortality24", "yaib_kidney_function", "yaib_aki", "yaib_sepsis", "yaib_los")
    }

    def hourly(task: str) -> dict[str, dict[int, float]]:
        by_stay: dict[str, dict[int, float]] = {}
        for stay, time, label in pl.read_parquet(yaib / task / "eicu_demo" / "outc.parquet").rows():
            by_stay.setdefault(str(stay), {})[round(time.total_seconds() / 3600)] = float(label)
        return {stay: hours for stay, hours in by_stay.items() if stay in found}

    for task in ("aki", "sepsis"):
        truth = {}
        for stay, hours in hourly(task).items():
            marked = [hour for hour, label in hours.items() if label]
            if max(hours) >= 24 and not (marked and min(marked) + 6 <= 24):
                truth[stay] = float(bool(marked))
        assert got[f"yaib_{task}"] == truth
    assert got["yaib_los"] == {stay: hours[24] for stay, hours in hourly("los").items() if 24 in hours}
    sizes = {task: (len(known), sum(known.values())) for task, known in got.items() if task != "yaib_los"}
    assert sizes["yaib_mortality24"] == (1366, 70)
    assert sizes["yaib_aki"] == (1000, 262)
    assert sizes["yaib_sepsis"] == (562, 18)
    assert sizes["yaib_kidney_function"][0] == 801
    assert len(got["yaib_los"]) == 1589


def test_the_hourly_series_ends_before_the_hour_of_prediction(yaib: Path, stays: Read) -> None:
    found, _ = stays
    table = pl.read_parquet(yaib / "los" / "eicu_demo" / "dyn.parquet")
    hour = (pl.col("time").dt.total_milliseconds() / 3_600_000).round()
    first = table.with_columns(hour.alias("hour")).filter(pl.col("hour") < 24)
    truth = {(str(s), int(h)): v for s, h, v in first.select("stay_id", "hour", "hr").rows() if v is not None}
    seen = {}
    for stay, sample in found.items():
        if "yaib_series" in sample.modalities:
            values, times, observed = sample.modalities["yaib_series"]
            assert times is not None
            assert observed is not None
            assert times.max() < 29.5 / 30
            hours = np.round(times * 30 - 6).astype(int)
            cells = zip(hours, values[:, HEART_RATE], observed[:, HEART_RATE], strict=True)
            seen |= {(stay, int(h)): float(v) for h, v, known in cells if known}
    assert seen == {key: pytest.approx(value, rel=1e-6) for key, value in truth.items() if key[0] in found}


def hourly_files(folder: Path, task: str, marked: dict[int, list[int]], last: int) -> None:
    """A YAIB task whose stays are marked at the given hours, up to hour `last`."""
    place = folder / task / "eicu_demo"
    place.mkdir(parents=True)
    data = [(s, h * 3_600_000, h in hours) for s, hours in marked.items() for h in range(last + 1)]
    kinds = {"stay_id": pl.Int32, "time": pl.Int64, "label": pl.Boolean}
    frame = pl.DataFrame(data, schema=kinds, orient="row").with_columns(pl.col("time").cast(pl.Duration("ms")))
    frame.write_parquet(place / "outc.parquet")


def test_an_illness_up_to_the_hour_of_prediction_gives_no_label(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "raw", {"patient": [patient(stay) for stay in (1, 2, 3, 4)]})
    # YAIB marks the six hours before an onset: marked from 18 on is an onset in hour 24, from 19 on one after it.
    hourly_files(folder, "aki", {1: [18, 19], 2: [19, 20], 3: [], 9: []}, last=40)
    found, funnel = samples(folder)
    assert {stay: x.targets["yaib_aki"].tolist() for stay, x in found.items() if "yaib_aki" in x.targets} == {
        "2": [1.0],
        "3": [0.0],
    }
    assert funnel.counts["yaib_aki: stay with a label that is not in the cohort"] == 1
    assert funnel.counts["file sepsis/outc.parquet of YAIB absent: task yaib_sepsis left out"] == 1
    _, tasks = SOURCE.describe(folder, EicuOptions())
    assert [task.name for task in tasks] == ["mortality", "readmission", "los", "yaib_aki"]
    late = EicuOptions(hours=25)
    assert [task.name for task in SOURCE.describe(folder, late)[1]] == ["mortality", "readmission", "los"]
    _, funnel = samples(folder, hours=25)
    assert funnel.counts["labels of YAIB are about hour 24: task yaib_aki left out"] == 1


def test_a_stay_with_two_labels_of_yaib_is_refused(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "raw", {"patient": [patient(1)]})
    place = folder / "mortality24" / "eicu_demo"
    place.mkdir(parents=True)
    pl.DataFrame({"stay_id": [1, 1], "label": [0, 1]}).write_parquet(place / "outc.parquet")
    with pytest.raises(DataError, match=r"stay 1 has two labels \[.*outc.parquet\]"):
        samples(folder)
