"""The promises of the MEDS source."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.batch import Observation, Sample
from flame_moe.data.check import check_sample
from flame_moe.data.codes import code_id
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources._meds_mapping import TYPES
from flame_moe.data.sources.meds import SOURCE, MedsOptions
from flame_moe.data.work import Work
from flame_moe.errors import DataError, FlameError

START = datetime(2030, 1, 1)
HEART, CREATININE = "LAB//220045//bpm", "LAB//50912//mg/dL"
MAPPING = """
[[series]]
name = "vitals"
[[series.channels]]
name = "heart_rate"
code = "LAB//220045"
unit = "bpm"
low = 10
high = 300
[[series.channels]]
name = "temperature"
regex = "^LAB//22376[12]"
unit = "C"
factor = 0.5555555555555556
offset = -17.77777777777778
low = 30
high = 44

[codes]
rest = "drop"
[[codes.types]]
name = "drug"
code = ["MEDICATION", "INFUSION_START"]
[[codes.types]]
name = "diagnosis"
code = "DIAGNOSIS"

[[static]]
name = "male"
code = "GENDER//M"
opposite = "GENDER//F"
[[static]]
name = "age"
kind = "age"
[[static]]
name = "weight"
kind = "value"
code = "WEIGHT"
unit = "kg"
high = 300

[[tasks]]
name = "dies"
family = "outcome"
classes = ["alive", "dead"]
description = "death in the unit"
"""


def event(subject: int, days: float | None, code: str, value: float | None = None) -> dict[str, Any]:
    time = None if days is None else START + timedelta(days=days)
    return {"subject_id": subject, "time": time, "code": code, "numeric_value": value}


def at(days: float) -> datetime:
    return START + timedelta(days=days)


def label(subject: int, days: float, value: Any, column: str = "boolean_value") -> dict[str, Any]:
    return {"subject_id": subject, "prediction_time": at(days), column: value}


def dataset(
    root: Path,
    shards: dict[str, list[dict[str, Any]]],
    labels: dict[str, list[dict[str, Any]]] | None = None,
    splits: dict[int, str] | None = None,
    mapping: str | None = None,
) -> Path:
    for name, rows in shards.items():
        path = root / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
        pl.DataFrame(rows, schema=kinds).write_parquet(path)
    for task, rows in (labels or {}).items():
        path = root / "labels" / task / "train" / "0.parquet"
        path.parent.mkdir(parents=True)
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    if splits is not None:
        (root / "metadata").mkdir()
        frame = pl.DataFrame({"subject_id": list(splits), "split": list(splits.values())})
        frame.write_parquet(root / "metadata" / "subject_splits.parquet")
    if mapping is not None:
        (root / "mapping.toml").write_text(mapping)
    return root


def read(raw: Path, funnel: Funnel | None = None, **options: object) -> dict[str, Sample]:
    chosen = MedsOptions.parse(options, where="test")
    modalities, tasks = SOURCE.describe(raw, chosen)
    known = {m.name: m for m in modalities}, {t.name: t for t in tasks}
    work = Work(raw / ".steps")
    stream = SOURCE.read(raw, chosen, Funnel() if funnel is None else funnel, work)
    return {sample.id: check_sample(sample, *known) for sample in stream}


def codes(part: Observation) -> list[tuple[int, int]]:
    return [(int(kind), int(code)) for kind, code in part.values]


def same(a: Sample, b: Sample) -> bool:
    return a.modalities.keys() == b.modalities.keys() and all(
        x is y is None or np.array_equal(x, y)
        for name, part in a.modalities.items()
        for x, y in zip(part, b.modalities[name], strict=True)
    )


def test_without_a_mapping_every_code_is_an_event_of_the_type_that_its_first_part_says(tmp_path: Path) -> None:
    rows = [
        event(1, None, "GENDER//F"),
        event(1, 0, HEART, 80),
        event(1, 5, "DIAGNOSIS//ICD//10//I50"),
        event(1, 10, "Something else"),
        event(1, 10.5, "MEDS_DEATH"),
    ]
    raw = dataset(tmp_path, {"train/0": rows}, {"dies": [label(1, 10, True)]})
    (sample,) = read(raw, history_days=10).values()
    assert (sample.id, sample.subject) == ("1@2030-01-11T00:00:00", "1")
    assert sample.targets == {"dies": np.float32(1)}
    part = sample.modalities["codes"]
    types = [TYPES.index(name) for name in ("GENDER", "LAB", "DIAGNOSIS")] + [len(TYPES)]
    assert codes(part) == list(zip(types, [code_id(row["code"]) for row in rows[:4]], strict=True))
    assert part.times is not None
    assert part.times.tolist() == [0, 0, 0.5, 1]


def test_events_count_from_the_first_of_the_window_to_the_prediction_time(tmp_path: Path) -> None:
    days = [-0.001, 0, 9.999, 10, 10.001]
    raw = dataset(tmp_path, {"0": [event(1, d, f"LAB//{d}") for d in days]}, {"dies": [label(1, 10, False)]})

    def seen(**options: Any) -> list[float]:
        (sample,) = read(raw, history_days=10, **options).values()
        kept = {code for _, code in codes(sample.modalities["codes"])}
        return [d for d in days if code_id(f"LAB//{d}") in kept]

    assert seen() == [0, 9.999, 10]
    assert seen(strict=True) == [0, 9.999]
    assert seen(last=2) == [9.999, 10]


def test_a_mapping_makes_series_types_and_a_static_table(tmp_path: Path) -> None:
    rows = [
        event(1, None, "GENDER//M"),
        event(1, -36525, "MEDS_BIRTH"),
        event(1, -500, "WEIGHT", 70),
        event(1, 1, HEART, 80),
        event(1, 1, HEART, 90),
        event(1, 2, HEART, 301),
        event(1, 2, "LAB//223761//F", 98.6),
        event(1, 3, HEART),
        event(1, 3, "MEDICATION//aspirin"),
        event(1, 4, "TRANSFER_TO//ward"),
        event(2, 1, HEART, 77),
        event(2, 1, "WEIGHT", 999),
    ]
    labels = {"dies": [label(1, 5, True), label(2, 5, False)], "days": [label(1, 5, 2.5, "float_value")]}
    raw = dataset(tmp_path, {"0": rows}, labels, mapping=MAPPING)
    funnel = Funnel()
    one, two = read(raw, funnel, mapping="mapping.toml", history_days=5).values()
    vitals, static = one.modalities["vitals"], one.modalities["static"]
    assert vitals.times is not None
    assert vitals.observed is not None
    assert vitals.times == pytest.approx([0.2, 0.4])
    assert vitals.observed.tolist() == [[True, False], [False, True]]
    assert vitals.values.ravel() == pytest.approx([85, 0, 0, 37])
    assert codes(one.modalities["codes"]) == [(0, code_id("MEDICATION//aspirin"))]
    assert static.values[0] == pytest.approx([1, 36530 / 365.25, 70])
    assert two.modalities.keys() == {"vitals"}
    assert {name: float(t[0]) for name, t in one.targets.items()} == {"days": 2.5, "dies": 1.0}
    assert funnel.counts == {
        "heart_rate outside its plausible range, left out": 1,
        "heart_rate without a number, left out": 1,
        "weight outside its plausible range, left out": 1,
    }
    tasks = {task.name: task for task in SOURCE.describe(raw, MedsOptions(mapping="mapping.toml"))[1]}
    assert (tasks["dies"].classes, tasks["dies"].family) == (("alive", "dead"), "outcome")
    assert tasks["days"].kind == "regression"


def test_nothing_after_the_prediction_time_reaches_the_inputs(tmp_path: Path) -> None:
    before = [event(1, None, "GENDER//F"), event(1, 1, HEART, 80), event(1, 5, "WEIGHT", 60)]
    later = [
        event(1, 5.0001, "WEIGHT", 90),
        event(1, 6, HEART, 200),
        event(1, 7, "GENDER//M"),
        event(1, 8, "DIAGNOSIS"),
    ]
    labels = {"dies": [label(1, 5, True)]}
    plain = dataset(tmp_path / "plain", {"0": before}, labels, mapping=MAPPING)
    edited = dataset(tmp_path / "edited", {"0": before + later}, labels, mapping=MAPPING)
    for options in ({}, {"mapping": "mapping.toml"}):
        (a,), (b,) = read(plain, **options).values(), read(edited, **options).values()
        assert same(a, b)


def test_published_splits_are_kept_and_subjects_without_one_are_counted(tmp_path: Path) -> None:
    shards = {f"{s}": [event(s, 0, HEART, 80), event(s, 1, "LAB//x")] for s in range(8)}
    splits = {0: "train", 1: "train", 2: "train", 3: "tuning", 4: "tuning", 5: "held_out", 6: "held_out"}
    labels = {"dies": [label(s, 2, s % 2 == 0) for s in range(8)]}
    raw = dataset(tmp_path / "raw", shards, labels, splits)
    store = prepare("meds", raw, tmp_path / "store")
    assert store.splits.tolist() == [0, 0, 0, 1, 1, 2, 2]
    plain = prepare("meds", raw, tmp_path / "new", require_labels=False)
    assert set(plain.splits.tolist()) == {2}
    funnel = Funnel()
    read(raw, funnel)
    assert [(step.text.split()[0], step.after) for step in funnel.steps][:2] == [("predictions:", 8), ("the", 7)]


def test_categories_become_classes_and_labels_of_several_tasks_meet(tmp_path: Path) -> None:
    labels = {
        "Stage of AKI": [label(1, 2, "two", "categorical_value"), label(1, 3, "one", "categorical_value")],
        "dies": [label(1, 3, None), label(1, 3, True), label(1, 3, True)],
    }
    raw = dataset(tmp_path, {"0": [event(1, 1, HEART, 80)]}, labels)
    _, tasks = SOURCE.describe(raw, MedsOptions())
    assert {t.name: (t.kind, t.classes) for t in tasks} == {
        "stage_of_aki": ("multiclass", ("one", "two")),
        "dies": ("binary", ("no", "yes")),
    }
    funnel = Funnel()
    got = [{k: float(v[0]) for k, v in s.targets.items()} for s in read(raw, funnel).values()]
    assert got == [{"stage_of_aki": 1}, {"stage_of_aki": 0, "dies": 1}]
    assert funnel.counts == {
        "label of 'dies' given twice, the same": 1,
        "prediction without a value of 'dies', no label": 1,
    }
    assert len(read(raw, tasks=["dies"])) == 1


def test_a_data_set_without_labels_gives_one_sample_per_subject_at_its_last_event(tmp_path: Path) -> None:
    raw = dataset(tmp_path, {"0": [event(1, 1, HEART), event(1, 3, HEART), event(2, 2, HEART)]})
    funnel = Funnel()
    assert list(read(raw, funnel)) == ["1@2030-01-04T00:00:00", "2@2030-01-03T00:00:00"]
    assert funnel.counts == {"no labels: one sample per subject, at its last event": 2}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("[[serie]]", "unknown key 'serie'.*Did you mean 'series'"),
        ("series = [{name = 'v', channels = [{name = 'h', cod = 'x'}]}]", "unknown key 'cod'.*Did you mean 'code'"),
        ("series = [{name = 'v', channels = [{name = 'h', regex = '('}]}]", "no regular expression"),
        ("series = [{name = 'v', channels = [{name = 'h'}]}]", "channel 'h' needs code or regex"),
        ("series = [", "the mapping is not valid TOML"),
        ("[columns]\nnumeric_value = 'valu'\n[[static]]\nname='w'\nkind='value'\ncode='W'", "column 'valu' is missing"),
        ("[[tasks]]\nname = 'dyes'", "the mapping describes an unknown task 'dyes'.*Did you mean 'dies'"),
        ("[[tasks]]\nname = 'dies'\nclasses = ['a', 'b', 'c']", "needs exactly two classes"),
    ],
)
def test_a_wrong_mapping_is_told_in_one_sentence(tmp_path: Path, mapping: str, message: str) -> None:
    raw = dataset(tmp_path, {"0": [event(1, 1, HEART)]}, {"dies": [label(1, 2, True)]}, mapping=mapping)
    with pytest.raises(FlameError, match=message):
        read(raw, mapping="mapping.toml")


def test_damage_is_refused_with_its_place(tmp_path: Path) -> None:
    shard = [event(1, 1, HEART)]
    with pytest.raises(DataError, match="there are no event files"):
        read(tmp_path)
    with pytest.raises(DataError, match="subject 1 is in two event files"):
        read(dataset(tmp_path / "a", {"0": shard, "1": shard}, {"dies": [label(1, 2, True)]}))
    with pytest.raises(DataError, match=r"one prediction time has two different labels.*subject 1"):
        read(dataset(tmp_path / "b", {"0": shard}, {"dies": [label(1, 2, True), label(1, 2, False)]}))
    with pytest.raises(DataError, match=r"unknown split 'test'.*Known: held_out, train, tuning"):
        read(dataset(tmp_path / "c", {"0": shard}, {"dies": [label(1, 2, True)]}, {1: "test"}))
    with pytest.raises(DataError, match=r"no labels of the task 'dyes'.*Did you mean 'dies'"):
        read(tmp_path / "c", tasks=["dyes"])
    with pytest.raises(DataError, match="the mapping cannot be read"):
        read(tmp_path / "c", mapping="none.toml")
    bad = dataset(tmp_path / "d", {}, {"dies": [label(1, 2, True)]})
    (bad / "data").mkdir()
    pl.DataFrame({"subject": [1], "time": [START], "code": ["x"]}).write_parquet(bad / "data" / "0.parquet")
    with pytest.raises(DataError, match=r"the column 'subject_id' is missing.*Did you mean 'subject'.*\[columns\]"):
        read(bad)


DEMO = """
[columns]
numeric_value = "value"
[[series]]
name = "vitals"
channels = [{name = "heart_rate", code = "LAB//220045", unit = "bpm", low = 10, high = 300}]
[codes]
[[static]]
name = "male"
code = "GENDER//M"
opposite = "GENDER//F"
[[static]]
name = "age"
kind = "age"
"""


def test_the_open_data_with_labels_from_its_unit_stays(shared_data: Path, tmp_path: Path) -> None:
    demo = shared_data / "mimic-iv-demo"
    moves = pl.read_parquet(demo / "meds" / "mimic_iv_demo_meds_events.parquet").filter(
        pl.col("code").str.starts_with("ICU_")
    )
    entry = moves.filter(pl.col("code").str.starts_with("ICU_ADMISSION")).select("subject_id", entry="time")
    leave = moves.filter(pl.col("code").str.starts_with("ICU_DISCHARGE")).select("subject_id", leave="time")
    stays = entry.join(leave, on="subject_id").filter(pl.col("leave") > pl.col("entry"))
    stays = stays.sort("leave").group_by("subject_id", "entry").first()
    kept = stays.filter(pl.col("leave") - pl.col("entry") >= timedelta(days=1))
    labels = kept.select(
        "subject_id",
        prediction_time=pl.col("entry") + timedelta(days=1),
        boolean_value=pl.col("leave") - pl.col("entry") > timedelta(days=3),
    )
    (tmp_path / "labels").mkdir()
    labels.write_parquet(tmp_path / "labels" / "long_stay.parquet")
    (tmp_path / "demo.toml").write_text(DEMO)
    options = {"labels": str(tmp_path / "labels"), "mapping": str(tmp_path / "demo.toml"), "history_days": 1}
    store = prepare("meds", demo / "meds", tmp_path / "store", options=options)
    # The published table of stays is an independent witness of the events.
    published = pl.read_csv(demo / "mimic-iv-clinical-database-demo-2.2" / "icu" / "icustays.csv.gz")
    days = published["los"]
    assert (len(stays), len(store)) == (140, int((days >= 1).sum()))
    target = store.target("long_stay", np.arange(len(store)))
    assert int(target.sum()) == int((days > 3).sum())
    static = store.gather("static", np.arange(len(store))).values
    assert 18 <= static[:, 1].min() <= static[:, 1].max() < 100
    # The first day of a stay holds about one heart rate an hour.
    assert 20 <= np.median(store.lengths("vitals", np.arange(len(store)))) <= 40
