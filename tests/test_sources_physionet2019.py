"""The promises of the PhysioNet 2019 source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.batch import Sample
from flame_moe.data.check import check_sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources._physionet2019_tables import COLUMNS, LABEL, VARIABLES
from flame_moe.data.sources.physionet2019 import SOURCE, Physionet2019Options
from flame_moe.data.work import Work
from flame_moe.errors import DataError, FlameError

HEAD = (*COLUMNS, LABEL)
STATIC = {"Age": 60, "Gender": 1, "Unit1": 0, "Unit2": 1, "HospAdmTime": -5}
Hour = dict[str, Any]


def stay(hours: int, septic_from: int | None = None, first: int = 1, **cells: float) -> list[Hour]:
    """Hours first..hours with a heart rate of 60 + hour; the label is 1 from `septic_from` on."""
    return [
        {"ICULOS": h, "HR": 60 + h, LABEL: int(septic_from is not None and h >= septic_from), **STATIC, **cells}
        for h in range(first, hours + 1)
    ]


def psv(folder: Path, patients: dict[str, list[Hour]], head: tuple[str, ...] = HEAD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in patients.items():
        lines = ["|".join(str(row.get(column, "NaN")) for column in head) for row in rows]
        (folder / f"{name}.psv").write_text("\n".join(["|".join(head), *lines]) + "\n")
    return folder


def read(raw: Path, funnel: Funnel | None = None, **options: object) -> dict[str, Sample]:
    chosen = Physionet2019Options.parse(options, where="test")
    modalities, tasks = SOURCE.describe(raw, chosen)
    known = {m.name: m for m in modalities}, {t.name: t for t in tasks}
    stream = SOURCE.read(raw, chosen, Funnel() if funnel is None else funnel, Work(".steps"))
    return {sample.id: check_sample(sample, *known) for sample in stream}


BOUNDARIES: list[tuple[list[Hour], dict[str, float] | None]] = [
    (stay(24), None),  # ends with the window: nothing left to predict
    (stay(25), {"sepsis": 0, "sepsis_within_6h": 0, "long_stay": 0}),
    (stay(48), {"sepsis": 0, "sepsis_within_6h": 0, "long_stay": 0}),
    (stay(49), {"sepsis": 0, "sepsis_within_6h": 0, "long_stay": 1}),
    (stay(34, septic_from=1), None),
    (stay(34, septic_from=24), None),
    (stay(34, septic_from=25), {"sepsis": 1, "sepsis_within_6h": 1}),  # cut off: no label for long_stay
    (stay(40, septic_from=30), {"sepsis": 1, "sepsis_within_6h": 1}),
    (stay(40, septic_from=31), {"sepsis": 1, "sepsis_within_6h": 0}),
    (stay(49, septic_from=47), {"sepsis": 1, "sepsis_within_6h": 0, "long_stay": 1}),
    (stay(60, first=25), None),  # nothing measured within the window
    (stay(60, first=24), {"sepsis": 0, "sepsis_within_6h": 0, "long_stay": 1}),
]


def test_every_boundary_of_cohort_and_label_is_where_the_documentation_says(tmp_path: Path) -> None:
    raw = psv(tmp_path / "training_setA", {f"p{i:02}": rows for i, (rows, _) in enumerate(BOUNDARIES)}).parent
    funnel = Funnel()
    found = read(raw, funnel, horizons=[6])
    got = {name: {task: float(t[0]) for task, t in sample.targets.items()} for name, sample in found.items()}
    assert got == {f"p{i:02}": labels for i, (_, labels) in enumerate(BOUNDARIES) if labels is not None}
    assert [step.after for step in funnel.steps] == [12, 10, 9, 8]
    assert funnel.counts["stay that turns septic at some hour, of all stays found"] == 6
    assert funnel.counts["record that ends soon after sepsis, no label for long_stay"] == 3


def test_nothing_after_the_window_reaches_the_inputs(tmp_path: Path) -> None:
    later = [{**hour, **({"HR": 200, "Lactate": 9, "Age": 99} if hour["ICULOS"] > 24 else {})} for hour in stay(40)]
    plain = read(psv(tmp_path / "plain", {"p1": stay(40)}))["p1"].modalities
    edited = read(psv(tmp_path / "edited", {"p1": later}))["p1"].modalities
    assert plain.keys() == edited.keys() == {"vitals", "static"}
    for name, part in plain.items():
        for a, b in zip(part, edited[name], strict=True):
            np.testing.assert_array_equal(a, b)
    assert plain["vitals"].times is not None
    assert plain["vitals"].times[[0, -1]] == pytest.approx([1 / 24, 1.0])
    assert plain["vitals"].values[:, 0].tolist() == [60 + h for h in range(1, 25)]


def test_text_files_and_a_table_give_the_same(tmp_path: Path) -> None:
    patients = {"p1": stay(30, Temp=36.6, FiO2=40.0), "p2": stay(31, 27, Calcium=1.2)}
    psv(tmp_path / "files" / "training_setB", patients)
    rows = [{"patient": name, **hour} for name, hours in patients.items() for hour in reversed(hours)]
    (tmp_path / "table").mkdir()
    wide = pl.DataFrame(rows, infer_schema_length=None)
    wide = wide.with_columns(pl.lit(None, pl.Float32).alias(c) for c in HEAD if c not in wide.columns)
    wide.write_parquet(tmp_path / "table" / "training_setB.parquet")
    a, b = read(tmp_path / "files"), read(tmp_path / "table")
    assert a.keys() == b.keys() == {"p1", "p2"}
    for name in a:
        assert a[name].targets == b[name].targets
        assert a[name].modalities.keys() == b[name].modalities.keys()
        for part, other in zip(a[name].modalities.values(), b[name].modalities.values(), strict=True):
            np.testing.assert_array_equal(part.values, other.values)


def test_slips_are_mended_and_implausible_values_are_missing_and_both_are_counted(tmp_path: Path) -> None:
    funnel = Funnel()
    raw = psv(tmp_path / "raw", {"p1": stay(25, FiO2=50, Calcium=1.1, Temp=50)})
    labs = read(raw, funnel)["p1"].modalities["labs"]
    names = [v.name for v in VARIABLES if v.group == "labs"]
    assert labs.observed is not None
    assert labs.observed[0].nonzero()[0].tolist() == [names.index("FiO2"), names.index("Calcium_ionised")]
    assert labs.values[0, labs.observed[0]] == pytest.approx([0.5, 1.1])
    assert funnel.counts["FiO2 in percent, divided by 100"] == 24
    assert funnel.counts["Calcium of 0.3 to 2.5 taken as ionised calcium in mmol/L"] == 24
    assert funnel.counts["Temp outside 25 to 44 C, set to missing"] == 24


def test_records_without_labels_can_be_scored(tmp_path: Path) -> None:
    raw = psv(tmp_path / "new", {"p1": stay(10), "p2": stay(24)}, HEAD[:-1])
    assert [sample.targets for sample in read(raw).values()] == [{}, {}]
    assert len(prepare("physionet2019", raw, tmp_path / "store", require_labels=False)) == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("|61|", "|sixty|", 1).replace("61|", "sixty|", 1), "'sixty' in column 'HR' is no"),
        (lambda text: text.replace("HR|", "", 1), r"the column 'HR' is missing \[.*p1.psv\]"),
        (lambda text: text + "1|2\n", r"2 cells where the header has 41 \[.*line 27\]"),
        (lambda text: text + text.splitlines()[-1] + "\n", "ICULOS 25 does not go on from the hour before"),
        (lambda text: text.splitlines()[0], "the file holds no hour"),
        (lambda text: text.replace("|1|0\n", "|1|2\n", 1), "SepsisLabel is neither 0 nor 1"),
    ],
)
def test_damage_is_refused_with_its_place(tmp_path: Path, edit: Any, message: str) -> None:
    raw = psv(tmp_path / "raw", {"p1": stay(25)})
    file = raw / "p1.psv"
    file.write_text(edit(file.read_text()))
    with pytest.raises(DataError, match=message):
        read(raw)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no records of the PhysioNet 2019 set"):
        read(tmp_path)
    psv(tmp_path / "training_setA", {"p1": stay(25)})
    with pytest.raises(DataError, match=r"the set b is missing \["):
        read(tmp_path, sets=["b"])
    psv(tmp_path / "training_setB", {"p1": stay(25)})
    with pytest.raises(DataError, match="patient p1 is there twice"):
        read(tmp_path)
    with pytest.raises(FlameError, match="long_stay = 20 must be above hours = 24"):
        Physionet2019Options.parse({"long_stay": 20}, where="test")


def test_counts_of_the_open_set_are_as_published(shared_data: Path) -> None:
    funnel = Funnel()
    chosen = Physionet2019Options(horizons=(12,))
    samples = list(SOURCE.read(shared_data / "physionet2019", chosen, funnel, Work(".steps")))
    assert [step.after for step in funnel.steps] == [16_000, 15_582, 11_496, 11_493]
    assert funnel.counts["hours found, in all stays"] == 609_086
    assert funnel.counts["stay that turns septic at some hour, of all stays found"] == 902
    positive = {task: sum(int(s.targets[task][0]) for s in samples) for task in ("sepsis", "sepsis_within_12h")}
    assert positive == {"sepsis": 484, "sepsis_within_12h": 85}
    assert sum("long_stay" in s.targets for s in samples) == 11_380
