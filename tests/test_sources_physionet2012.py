"""The promises of the PhysioNet 2012 source."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_moe.batch import Sample
from flame_moe.data.check import check_sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._physionet2012_clean import REPEATED, clean
from flame_moe.data.sources._physionet2012_records import parse_record, record_files
from flame_moe.data.sources._physionet2012_scores import SAPS, SOFA, saps, sofa
from flame_moe.data.sources._physionet2012_summary import (
    carry_forward,
    summarise,
    summary_columns,
    ventilated_hours,
)
from flame_moe.data.sources._physionet2012_tables import DESCRIPTORS, INDEX, SLIPS, VARIABLES
from flame_moe.data.sources.physionet2012 import SOURCE, Physionet2012Options
from flame_moe.data.work import Work
from flame_moe.errors import DataError, FlameError

HEAD = (
    "Time,Parameter,Value\n00:00,RecordID,{id}\n00:00,Age,60\n00:00,Gender,1\n"
    "00:00,Height,170\n00:00,ICUType,3\n00:00,Weight,80\n"
)
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n"


def record_text(lines: str = "01:00,HR,90\n", id: int = 1) -> str:
    return HEAD.format(id=id) + lines


def raw_folder(root: Path, records: dict[int, str], outcomes: str | None = None) -> Path:
    folder = root / "set-a"
    folder.mkdir(parents=True)
    for id, text in records.items():
        (folder / f"{id}.txt").write_text(text)
    if outcomes is not None:
        (root / "Outcomes-a.txt").write_text(OUTCOMES + outcomes)
    return root


def read(raw: Path | None, funnel: Funnel | None = None, **options: object) -> list[Sample]:
    settings = Physionet2012Options.parse({"sets": ["a"], **options}, where="test")
    return list(SOURCE.read(raw, settings, Funnel() if funnel is None else funnel, Work(".steps")))


def cleaned(lines: str) -> tuple[dict[str, list[float]], Counter[str]]:
    """Observed values by variable of a record with these lines, and the tally."""
    tally: Counter[str] = Counter()
    stay = clean(parse_record(record_text(lines), "1.txt"), tally)
    columns = {v.name: stay.values[:, i] for i, v in enumerate(VARIABLES)}
    return {name: c[~np.isnan(c)].tolist() for name, c in columns.items() if not np.isnan(c).all()}, tally


def summary_of(lines: str) -> dict[str, float]:
    stay = clean(parse_record(record_text(lines), "1.txt"), Counter())
    return dict(zip([name for name, _ in summary_columns()], summarise(stay).tolist(), strict=True))


# Reading


def test_a_record_becomes_series_tables_and_labels_in_natural_units(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, {7: record_text("12:00,HR,90\n12:00,K,4.1\n24:00,HR,80\n", 7)}, "7,12,5,9,-1,0\n")
    (sample,) = read(raw)
    assert (sample.id, sample.subject) == ("7", "7")
    vitals = sample.modalities["vitals"]
    assert vitals.times is not None
    assert vitals.times.tolist() == [0.25, 0.5]
    assert vitals.values[:, 0].tolist() == [90, 80]
    assert vitals.observed is not None
    assert vitals.observed.sum() == 2
    assert sample.modalities["labs"].values.shape == (1, 22)
    assert sample.modalities["support"].values[0, 3] == 80
    assert sample.modalities["static"].values[0].tolist() == [60, 1, 170, 80, 0, 0, 1, 0]
    assert {k: v.tolist() for k, v in sample.targets.items()} == {
        "mortality": [0.0],
        "los": [9.0],
        "long_stay": [1.0],
        "year_mortality": [0.0],
        "saps": [12.0],
        "sofa": [5.0],
    }


def test_samples_fit_what_the_source_describes(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, {1: record_text(), 2: record_text("01:00,K,4\n", 2)}, "1,3,4,5,-1,1\n2,3,4,5,-1,0\n")
    options = Physionet2012Options(sets=("a",), by_unit=True)
    modalities, tasks = SOURCE.describe(None, options)
    for sample in SOURCE.read(raw, options, Funnel(), Work(".steps")):
        check_sample(sample, {m.name: m for m in modalities}, {t.name: t for t in tasks})
        assert "mortality_medical" in sample.targets
        assert "mortality_surgical" not in sample.targets


def test_folder_archive_and_bare_records_give_the_same_samples(tmp_path: Path) -> None:
    texts = {1: record_text(id=1), 2: record_text("02:00,Temp,37\n", 2)}
    folder = raw_folder(tmp_path / "folder", texts)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "set-a.tar.gz", "w:gz") as tar:
        for id, text in texts.items():
            info = tarfile.TarInfo(f"set-a/{id}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    results = [read(folder), read(packed), read(folder / "set-a")]
    for samples in results[1:]:
        assert [s.id for s in samples] == ["1", "2"]
        for a, b in zip(samples, results[0], strict=True):
            assert all(np.array_equal(a.modalities[m].values, b.modalities[m].values) for m in b.modalities)


def test_records_without_outcomes_can_be_read_for_scoring(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text(record_text())
    (sample,) = read(tmp_path)
    assert sample.targets == {}


def test_minus_one_in_an_outcome_is_no_label(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, {1: record_text()}, "1,-1,-1,-1,-1,1\n")
    funnel = Funnel()
    (sample,) = read(raw, funnel)
    assert list(sample.targets) == ["mortality", "year_mortality"]
    assert funnel.counts["SAPS-I missing (-1), no label"] == 1


def test_a_death_within_a_year_counts_whether_in_hospital_or_after(tmp_path: Path) -> None:
    rows = {1: "1,1,1,7,-1,0\n", 2: "2,1,1,8,365,0\n", 3: "3,1,1,8,366,0\n", 4: "4,1,1,8,8,1\n", 5: "5,1,1,8,20,-1\n"}
    raw = raw_folder(tmp_path, {i: record_text(id=i) for i in rows}, "".join(rows.values()))
    found = [s.targets["year_mortality"].tolist() if "year_mortality" in s.targets else None for s in read(raw)]
    assert found == [[0.0], [1.0], [0.0], [1.0], None]


def test_a_stay_of_seven_days_is_not_long(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, {1: record_text(), 2: record_text(id=2)}, "1,1,1,7,-1,0\n2,1,1,8,-1,0\n")
    assert [s.targets["long_stay"].tolist() for s in read(raw)] == [[0.0], [1.0]]


def test_a_record_without_series_is_dropped_and_counted(tmp_path: Path) -> None:
    funnel = Funnel()
    samples = read(raw_folder(tmp_path, {1: HEAD.format(id=1), 2: record_text(id=2)}), funnel)
    assert [s.id for s in samples] == ["2"]
    assert (funnel.steps[0].after, funnel.remaining) == (2, 1)


def test_the_summary_can_be_left_out(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, {1: record_text()})
    assert "summary" not in read(raw, summary=False)[0].modalities
    _, tasks = SOURCE.describe(None, Physionet2012Options(summary=False))
    assert all("summary" not in task.modalities for task in tasks)


# Defects


def test_every_slip_is_impossible_as_written_and_plausible_once_mended() -> None:
    ranges = {d.name: (d.low, d.high) for d in DESCRIPTORS} | {v.name: (v.low, v.high) for v in VARIABLES}
    for slip in SLIPS:
        low, high = ranges[slip.name]
        assert slip.low > high
        for value in (slip.low, slip.high):
            assert low <= value * slip.factor + slip.offset <= high, slip


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [("pH,735", "pH", 7.35), ("WBC,12500", "WBC", 12.5), ("FiO2,40", "FiO2", 0.4), ("Temp,98.6", "Temp", 37.0)],
)
def test_a_slip_of_unit_is_mended_and_counted(line: str, name: str, value: float) -> None:
    values, tally = cleaned(f"01:00,{line}\n")
    assert values[name] == [value]
    assert sum(tally[slip.text] for slip in SLIPS) == 1


def test_a_height_that_was_converted_twice_is_mended() -> None:
    text = record_text().replace("Height,170", "Height,462.3")
    stay = clean(parse_record(text, "1.txt"), tally := Counter())
    assert stay.descriptors["Height"] == pytest.approx(182, abs=0.1)
    assert tally[next(s.text for s in SLIPS if s.name == "Height")] == 1


@pytest.mark.parametrize("line", ["HR,0", "Temp,-17.8", "pH,94", "SaO2,1.06", "SysABP,0", "Weight,5", "MechVent,0"])
def test_an_impossible_value_is_missing_and_counted_with_its_range(line: str) -> None:
    values, tally = cleaned(f"01:00,{line}\n01:00,K,4\n")
    name = line.split(",")[0]
    assert name not in values or values[name] == [80.0]
    assert [n for text, n in tally.items() if text.startswith(f"{name} outside")] == [1]


def test_minus_one_is_missing() -> None:
    values, tally = cleaned("01:00,Weight,-1\n01:00,K,4\n")
    assert values["Weight"] == [80.0]
    assert tally["Weight written as -1, the set's sign for missing"] == 1


def test_urine_at_the_same_minute_adds_up_and_everything_else_is_averaged() -> None:
    values, tally = cleaned(
        "01:00,Urine,100\n01:00,Urine,50\n01:00,MAP,60\n01:00,MAP,70\n01:00,Temp,0\n01:00,Temp,37\n"
    )
    assert (values["Urine"], values["MAP"], values["Temp"]) == ([150], [65], [37])
    assert tally[REPEATED] == 3


# Refusals


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("01:00,HR,fast", "not a number"),
        ("01:00,HR,", "not a number"),
        ("01:00,HR,nan", "not a number"),
        ("1h,HR,80", "not a time"),
        ("01:75,HR,80", "not a time"),
        ("49:00,HR,80", "after the first 48 hours"),
        ("01:00,Creatinin,1", "Did you mean 'Creatinine'"),
        ("01:00,HR", "not Time,Parameter,Value"),
    ],
)
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(raw_folder(tmp_path, {1: record_text(f"01:00,K,4\n{line}\n")}))
    assert said in str(caught.value)
    assert "1.txt, line 9" in str(caught.value)


def test_a_missing_header_or_record_id_is_refused() -> None:
    with pytest.raises(DataError, match="line 1"):
        parse_record("00:00,RecordID,1\n", "1.txt")
    with pytest.raises(DataError, match="line 1"):
        parse_record("", "1.txt")
    with pytest.raises(DataError, match="RecordID"):
        parse_record("Time,Parameter,Value\n01:00,HR,80\n", "1.txt")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs raw data"):
        read(None)
    with pytest.raises(DataError, match="no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="set a is not there"):
        read(tmp_path)
    (tmp_path / "set-a").mkdir()
    with pytest.raises(DataError, match="no record files"):
        read(tmp_path)


def test_a_truncated_or_empty_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "set-a.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    with pytest.raises(DataError, match="no record files"):
        read(tmp_path)
    text = record_text("".join(f"01:00,HR,{i * 7919 % 97}.{i * 104729 % 991}\n" for i in range(3000)))
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("set-a/1.txt")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text.encode()))
    archive.write_bytes(archive.read_bytes()[:-4000])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read(tmp_path)


def test_a_record_in_two_places_is_refused(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, {1: record_text(), 2: record_text(id=1)})
    with pytest.raises(DataError, match="twice"):
        read(raw)
    (raw / "set-a" / "2.txt").unlink()
    (raw / "set-b").mkdir()
    (raw / "set-b" / "1.txt").write_text(record_text())
    with pytest.raises(DataError, match="two sets"):
        read(raw, sets=["a", "b"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RecordID,SAPS-I,SOFA,Length_of_stay,Survival\n1,1,1,1,1\n", "'In-hospital_death' is missing"),
        ("", "'RecordID' is missing"),
        (OUTCOMES + "1,1,1,x,1,0\n", "line 2"),
        (OUTCOMES + "1,1,1,1,1\n", "5 cells instead of 6"),
        (OUTCOMES + "1,1,1,1,1,2\n", "In-hospital_death is 2"),
        (OUTCOMES + "1,1,1,1,1,0\n1,1,1,1,1,0\n", "listed twice"),
    ],
)
def test_a_malformed_outcomes_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    raw = raw_folder(tmp_path, {1: record_text()})
    (raw / "Outcomes-a.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        read(raw)


def test_an_unknown_set_or_option_is_refused() -> None:
    with pytest.raises(FlameError):
        Physionet2012Options.parse({"sets": ["z"]}, where="test")
    with pytest.raises(FlameError, match="Did you mean 'summary'"):
        Physionet2012Options.parse({"sumary": True}, where="test")


# Summary


def test_summary_has_one_value_per_described_column() -> None:
    names = [name for name, _ in summary_columns()]
    assert len(set(names)) == len(names)
    modalities, _ = SOURCE.describe(None, Physionet2012Options())
    assert next(m for m in modalities if m.name == "summary").channels == tuple(names)


def test_summary_tells_both_halves_and_the_derived_quantities() -> None:
    row = summary_of(
        "02:00,HR,100\n02:00,NISysABP,80\n02:00,FiO2,0.5\n03:00,PaO2,90\n"
        "10:00,Urine,200\n30:00,Urine,300\n30:00,HR,60\n30:00,SysABP,120\n30:00,NISysABP,90\n"
    )
    assert (row["HR.first"], row["HR.last"], row["HR.late_max"], row["HR.since_last"]) == (100, 60, 60, 18)
    assert (row["SBP.first"], row["SBP.last"]) == (80, 120)
    assert row["ShockIndex.max"] == 1.25
    assert row["PF.min"] == 180
    assert (row["urine_day1"], row["urine_day2"]) == (200, 300)
    assert row["urine_per_kg_hour_day1"] == pytest.approx(200 / 80 / 24)
    assert np.isnan(row["Lactate.mean"])
    assert row["Lactate.count"] == 0


def test_ventilated_hours_skip_long_silences_and_split_by_day() -> None:
    entries = np.array([20.0, 26.0, 40.0, 44.0])
    assert ventilated_hours(entries, 0, 24) == 4
    assert ventilated_hours(entries, 24, 48) == 6
    assert ventilated_hours(entries[:1], 0, 24) == 0


def test_carry_forward_does_not_look_ahead() -> None:
    assert carry_forward(np.array([])).tolist() == []
    np.testing.assert_equal(carry_forward(np.array([np.nan, 2, np.nan])), [np.nan, 2, 2])


def test_scores_match_hand_counted_examples() -> None:
    nothing = {name: np.array([]) for name in SAPS}
    assert saps(nothing, age=np.nan, urine=np.nan, ventilated=False) == 0
    # Heart rate 145: 3; the worse of two potassium values: 4; age 70: 3; urine 600 mL: 2; ventilated: 3.
    sick = {**nothing, "HR": np.array([80.0, 145.0]), "K": np.array([4.0, np.nan, 7.2])}
    assert saps(sick, age=70, urine=600, ventilated=True) == 15
    organs = {name: np.array([]) for name in SOFA}
    organs |= {"PF": np.array([90.0]), "Creatinine": np.array([1.5])}
    # Lung below 100: 4 when ventilated, else 2; kidney: creatinine gives 1, urine of 100 mL gives 4.
    assert sofa(organs, urine=100, ventilated=True) == 8
    assert sofa(organs, urine=np.nan, ventilated=False) == 3


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2880), st.sampled_from(sorted(INDEX)), st.floats(-1000, 20000, allow_nan=False, width=32)
        ),
        min_size=1,
        max_size=40,
    )
)
def test_any_readable_record_gives_a_plausible_grid_and_a_finite_summary(rows: list[tuple[int, str, float]]) -> None:
    lines = "".join(f"{m // 60:02d}:{m % 60:02d},{name},{value}\n" for m, name, value in rows)
    stay = clean(parse_record(record_text(lines), "1.txt"), Counter())
    assert (np.diff(stay.hours) > 0).all()
    for i, variable in enumerate(VARIABLES):
        seen = stay.values[~np.isnan(stay.values[:, i]), i]
        assert (seen >= variable.low).all()
        assert variable.repeats == "sum" or (seen <= variable.high + 1e-9).all()
    assert not np.isinf(summarise(stay)).any()


# The real set


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Path:
    return shared_data / "physionet2012"


@pytest.mark.parametrize(
    ("letter", "found", "empty", "deaths", "no_los", "no_saps", "no_sofa", "repeats"),
    [("a", 3600, 3, 508, 57, 172, 129, 3426), ("b", 4000, 7, 568, 54, 162, 137, 3961)],
)
def test_the_funnel_counts_what_is_known_of_the_published_set(
    published: Path,
    letter: str,
    found: int,
    empty: int,
    deaths: int,
    no_los: int,
    no_saps: int,
    no_sofa: int,
    repeats: int,
) -> None:
    funnel = Funnel()
    options = Physionet2012Options(sets=(letter,), summary=False)
    n = sum(1 for _ in SOURCE.read(published, options, funnel, Work(".steps")))
    assert (funnel.steps[0].after, funnel.remaining, n) == (found, found - empty, found - empty)
    assert funnel.counts["In-hospital_death is 1, of all records found"] == deaths
    assert funnel.counts["Length_of_stay missing (-1), no label"] == no_los
    assert funnel.counts["SAPS-I missing (-1), no label"] == no_saps
    assert funnel.counts["SOFA missing (-1), no label"] == no_sofa
    assert funnel.counts[REPEATED] == repeats


def test_only_numbered_text_files_are_records(tmp_path: Path) -> None:
    for name in ("1.txt", "notes.txt", "2.csv", "Outcomes-a.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in record_files(tmp_path)] == ["1.txt"]
