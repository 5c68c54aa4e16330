"""The promises of the MIMIC-IV source: who is in, what is used, and what is predicted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources import get_source, mimic_iv
from flame_moe.data.sources._mimic_phenotypes import PHENOTYPES, Phenotyper
from flame_moe.data.sources._mimic_tables import STATIC
from flame_moe.data.sources._mimic_variables import LABS, VITALS
from flame_moe.data.sources.mimic_iv import SOURCE, MimicIvOptions
from flame_moe.errors import DataError, ExtraMissingError
from tests.example_mimic import MCHC, VERBAL, Hospital, at, one_stay, read

SECOND = 1 / 3600
DAY = 24.0
NO_PHENO = ("ihm", "los", "readmission")


def label(hospital: Hospital, folder: Path, task: str, **options: Any) -> float | None:
    """The label of the only sample."""
    (sample,) = read(hospital.write(folder), tasks=NO_PHENO, **options)
    return float(sample.targets[task][0]) if task in sample.targets else None


def channel(sample: Sample, name: str) -> list[tuple[float, float]]:
    """Hours from the start of the window and values of one channel where it was observed."""
    for modality, channels in (("vitals", VITALS), ("labs", LABS)):
        for i, c in enumerate(channels):
            if c.name == name and modality in sample.modalities:
                part = sample.modalities[modality]
                assert part.times is not None
                assert part.observed is not None
                seen = part.observed[:, i]
                hours = (part.times[seen] * 48).round(3).tolist()
                return list(zip(hours, part.values[seen, i].tolist(), strict=True))
    return []


def static(sample: Sample) -> dict[str, float | None]:
    part = sample.modalities["static"]
    assert part.observed is not None
    return {n: float(v) if o else None for (n, _), v, o in zip(STATIC, part.values[0], part.observed[0], strict=True)}


def same(a: Observation, b: Observation) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


# Labels at their boundaries


@pytest.mark.parametrize(
    ("hours", "death", "expected"),
    [
        (48.0, None, 0.0),
        (48.0 - SECOND, None, None),
        (48.0, 48.0, 1.0),
        (47 + 59 / 60, 47 + 59 / 60, None),
        (49.0, 47 + 59 / 60, None),  # the bed was given back later
        (60.0, 400.0, 1.0),  # in hospital, long after the unit
    ],
)
def test_mortality_is_of_those_who_outlive_their_48th_hour(
    tmp_path: Path, hours: float, death: float | None, expected: float | None
) -> None:
    hospital = one_stay(hours, death or 500.0, death)
    assert label(hospital, tmp_path, "ihm") == expected
    assert (label(hospital, tmp_path / "b", "los") is None) == (expected is None)


@pytest.mark.parametrize(
    ("hours", "death", "remaining", "short"),
    [
        (48 + 7 * DAY, None, 0.0, 0.0),
        (48 + 7 * DAY + SECOND, None, 1.0, 0.0),
        (96.0 - SECOND, None, 0.0, 1.0),
        (96.0, None, 0.0, 0.0),
        (80.0, 80.0, 0.0, 0.0),
        (80.0, 300.0, 0.0, 0.0),
    ],
)
def test_length_of_stay_counts_the_rest_or_a_short_stay_that_was_survived(
    tmp_path: Path, hours: float, death: float | None, remaining: float, short: float
) -> None:
    hospital = one_stay(hours, death or 500.0, death)
    assert label(hospital, tmp_path / "a", "los") == remaining
    assert label(hospital, tmp_path / "b", "los", los="short") == short


@pytest.mark.parametrize(
    ("gap", "kind", "every", "unplanned"),
    [
        (30 * DAY, "URGENT", 1.0, 1.0),
        (30 * DAY + SECOND, "URGENT", 0.0, 0.0),
        (0.0, "EU OBSERVATION", 1.0, 1.0),
        (10 * DAY, "ELECTIVE", 1.0, 0.0),
        (10 * DAY, "SURGICAL SAME DAY ADMISSION", 1.0, 0.0),
        (-1.0, "URGENT", 0.0, 0.0),
        (-150.0, "URGENT", 0.0, 0.0),  # an earlier admission
    ],
)
def test_readmission_is_another_admission_up_to_day_30(
    tmp_path: Path, gap: float, kind: str, every: float, unplanned: float
) -> None:
    hospital = one_stay(60.0, 100.0)
    hospital.admission(1, 11, 100.0 + gap, 100.0 + gap + 5, admission_type=kind)
    assert label(hospital, tmp_path / "a", "readmission") == every
    assert label(hospital, tmp_path / "b", "readmission", readmission="unplanned") == unplanned


def test_who_died_in_hospital_has_no_label_of_readmission_and_the_dead_are_not_readmitted(tmp_path: Path) -> None:
    assert label(one_stay(60.0, 100.0, 100.0), tmp_path / "a", "readmission") is None
    assert label(one_stay(60.0, None), tmp_path / "b", "readmission") is None
    funnel = Funnel()
    ghost = one_stay(60.0, 100.0, dod="2150-01-06").admission(1, 11, 150.0, 160.0)
    (sample,) = read(ghost.write(tmp_path / "c"), funnel, tasks=NO_PHENO)
    assert at(150.0).startswith("2150-01-07")
    assert sample.targets["readmission"] == 0
    assert funnel.counts["admission that begins after the date of death, no readmission"] == 1
    same_day = one_stay(60.0, 100.0, dod="2150-01-07").admission(1, 11, 150.0, 160.0, 160.0)
    assert label(same_day, tmp_path / "d", "readmission") == 1.0


# Cohort


def test_adults_are_18_and_everyone_over_89_is_91(tmp_path: Path) -> None:
    hospital = Hospital()
    ages = {1: (18, 2150), 2: (17, 2150), 3: (17, 2149), 4: (91, 2150), 5: (88, 2149), 6: (88, 2148), 7: (91, 2145)}
    for subject, (age, year) in ages.items():
        hospital.patient(subject, age=age, year=year).admission(subject, subject, 0.0, 99.0)
        hospital.stay(subject, subject, subject, 0.0, 60.0).chart(subject, 1.0, 80, subject=subject)
    funnel = Funnel()
    found = {s.id: static(s)["age"] for s in read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)}
    assert found == {"1": 18, "3": 18, "4": 91, "5": 89, "6": 91, "7": 91}
    assert [step.dropped for step in funnel.steps if "18 years" in step.text] == [1]


def test_the_first_stay_of_an_admission_is_the_sample_whatever_the_order_of_lines(tmp_path: Path) -> None:
    hospital = Hospital().patient(1).admission(1, 10, 0.0, 300.0).admission(1, 11, 900.0, 990.0)
    hospital.stay(1, 10, 7, 150.0, 260.0).stay(1, 10, 9, 5.0, 65.0).stay(1, 11, 8, 901.0, 950.0)
    for stay, hours in ((7, 151.0), (9, 6.0), (8, 902.0)):
        hospital.chart(stay, hours, 80)
    found = read(hospital.write(tmp_path), tasks=NO_PHENO)
    assert [(s.id, s.subject) for s in found] == [("9", "1"), ("8", "1")]
    assert static(found[1]) == static(found[1]) | {"earlier_admissions": 1.0, "hours_before": 1.0, "unit_coronary": 1.0}
    assert static(found[0])["earlier_admissions"] == 0.0


def test_lines_that_are_repeated_or_belong_to_nobody_are_counted(tmp_path: Path) -> None:
    hospital = one_stay().patient(1).admission(1, 10, -2.0, 100.0).stay(1, 10, 100, 0.0, 60.0)
    hospital.stay(1, 99, 101, 0.0, 60.0).stay(1, 10, 102, 70.0, 70.0).stay(2, 10, 103, 0.0, 60.0)
    funnel = Funnel()
    assert [s.id for s in read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)] == ["100"]
    assert [(step.before, step.after) for step in funnel.steps] == [(4, 4), (4, 2), (2, 1), (1, 1), (1, 1), (1, 1)]
    repeated = {text: n for text, n in funnel.counts.items() if "repeated" in text}
    assert repeated == {f"line of a {what} repeated, the first is kept": 1 for what in ("admission", "patient", "stay")}


def test_a_stay_without_a_measurement_is_no_sample(tmp_path: Path) -> None:
    hospital = one_stay().patient(2).admission(2, 20, 0.0, 90.0).stay(2, 20, 200, 0.0, 60.0).lab(2, 60.5, 1.0)
    funnel = Funnel()
    assert [s.id for s in read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)] == ["100"]
    assert funnel.steps[-1].dropped == 1


# Vital signs and laboratory values


def test_the_window_holds_both_its_ends_and_nothing_beyond(tmp_path: Path) -> None:
    hospital = one_stay(60.0)
    for hours, value in ((-SECOND, 70), (0.0, 71), (48.0, 72), (48 + SECOND, 73), (61.0, 74)):
        hospital.chart(100, hours, value).lab(1, hours, value / 10)
    funnel = Funnel()
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)
    assert channel(sample, "heart_rate") == [(0.0, 71.0), (0.5, 80.0), (48.0, 72.0)]
    assert channel(sample, "creatinine") == [(0.0, pytest.approx(7.1)), (48.0, pytest.approx(7.2))]
    assert sample.modalities["vitals"].times is not None
    assert sample.modalities["vitals"].times.max() == 1.0
    assert funnel.counts["vitals: measured before admission to the unit"] == 1
    assert funnel.counts["vitals: measured after the prediction time"] == 2
    assert funnel.counts["labs: measured after the prediction time"] == 1  # the one at hour 61 is after the stay


def test_a_short_stay_ends_its_window(tmp_path: Path) -> None:
    hospital = one_stay(20.0).chart(100, 20.0, 81).chart(100, 21.0, 82).lab(1, 20.0, 1.0).lab(1, 20.5, 2.0)
    (sample,) = read(hospital.write(tmp_path), tasks=NO_PHENO)
    assert channel(sample, "heart_rate") == [(0.5, 80.0), (20.0, 81.0)]
    assert channel(sample, "creatinine") == [(20.0, 1.0)]


def test_what_was_recorded_after_the_prediction_time_is_not_known(tmp_path: Path) -> None:
    hospital = one_stay(60.0)
    for value, stored in ((1.0, 48.0), (2.0, 48 + SECOND), (3.0, None)):
        hospital.lab(1, 40.0 + value, value, storetime=at(stored)).chart(
            100, 40.0 + value, value + 50, storetime=at(stored)
        )
    funnel = Funnel()
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)
    assert channel(sample, "creatinine") == [(41.0, 1.0), (43.0, 3.0)]
    assert channel(sample, "heart_rate")[1:] == [(41.0, 51.0), (43.0, 53.0)]
    for name in ("labs", "vitals"):
        assert funnel.counts[f"{name}: measured in time, but recorded after the prediction time"] == 1


def test_laboratory_values_of_the_hours_before_are_an_option_and_move_the_origin(tmp_path: Path) -> None:
    hospital = one_stay().lab(1, -1.0, 1.0).lab(1, -2.0, 1.5).lab(1, -2.5, 2.0).lab(1, 12.0, 3.0)
    raw = hospital.write(tmp_path / "raw")
    (without,) = read(raw, tasks=NO_PHENO)
    assert channel(without, "creatinine") == [(12.0, 3.0)]
    (sample,) = read(raw, tasks=NO_PHENO, before_hours=24)
    labs, vitals = sample.modalities["labs"], sample.modalities["vitals"]
    assert labs.times is not None
    assert vitals.times is not None
    # The value of hour -2.5 was measured before admission to the hospital, at hour -2.
    assert labs.times.tolist() == pytest.approx([22 / 72, 23 / 72, 36 / 72])
    assert vitals.times.tolist() == pytest.approx([24.5 / 72])


def test_laboratory_values_belong_to_the_stay_by_patient_and_time(tmp_path: Path) -> None:
    hospital = one_stay().lab(1, 3.0, 1.0, hadm_id="").lab(1, 4.0, 2.0, hadm_id=10).lab(2, 5.0, 3.0)
    hospital.patient(2).admission(1, 11, 900.0, 990.0).stay(1, 11, 101, 900.0, 960.0).lab(1, 901.0, 4.0)
    first, second = read(hospital.write(tmp_path), tasks=NO_PHENO)
    assert channel(first, "creatinine") == [(3.0, 1.0), (4.0, 2.0)]
    assert channel(second, "creatinine") == [(1.0, 4.0)]


def test_units_are_converted_and_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    hospital = one_stay()
    hospital.lab(1, 1.0, 88.4, unit="umol/L").lab(1, 2.0, 1.2, unit="").lab(1, 3.0, 1.3, unit=" MG/DL ")
    hospital.lab(1, 4.0, 9.9, unit="cups").lab(1, 5.0, 400.0).lab(1, 6.0, "").lab(1, 7.0, 7.0, item=51000)
    hospital.lab(1, 8.0, 33.0, item=MCHC, unit="%").lab(1, 9.0, 330.0, item=MCHC, unit="g/L")
    hospital.chart(100, 1.0, 0).chart(100, 2.0, 90, subject=2).chart(
        100, 3.0, "No Response-ETT", item=VERBAL, unit="", valuenum=1
    )
    hospital.chart(100, 4.0, 95, unit="").chart(101, 4.0, 96)
    funnel = Funnel()
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)
    assert channel(sample, "creatinine") == [
        (1.0, pytest.approx(1.0, abs=1e-3)),
        (2.0, 1.2000000476837158),
        (3.0, 1.2999999523162842),
    ]
    assert channel(sample, "mchc") == [(8.0, 33.0), (9.0, 33.0)]
    assert channel(sample, "heart_rate") == [(0.5, 80.0), (4.0, 95.0)]
    assert channel(sample, "gcs_verbal") == []
    expected = {
        "labs: converted from umol/L": 1,
        "labs: converted from g/L": 1,
        "labs: unit of creatinine unknown: cups": 1,
        "labs: creatinine outside its plausible range": 1,
        "labs: no number": 1,
        "vitals: heart_rate outside its plausible range": 1,
        "vitals: of another patient than the stay": 1,
        "vitals: verbal response not testable because of a tube": 1,
    }
    assert {text: n for text, n in funnel.counts.items() if text.startswith(("labs:", "vitals:"))} == expected


def test_values_at_the_same_time_become_their_mean(tmp_path: Path) -> None:
    hospital = one_stay().chart(100, 1.0, 90).chart(100, 1.0, 100).chart(100, 1.0, 110).chart(100, 1.0, 97, 220277, "%")
    funnel = Funnel()
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=NO_PHENO)
    assert channel(sample, "heart_rate") == [(0.5, 80.0), (1.0, 100.0)]
    assert channel(sample, "spo2") == [(1.0, 97.0)]
    assert len(sample.modalities["vitals"].values) == 2
    assert funnel.counts["vitals: repeated at the same time, averaged"] == 2


def test_pressures_of_arterial_lines_are_read_only_when_asked_for(tmp_path: Path) -> None:
    raw = one_stay().chart(100, 1.0, 120, 220179, "mmHg").chart(100, 2.0, 90, 220050, "mmHg").write(tmp_path / "raw")
    assert channel(read(raw, tasks=NO_PHENO)[0], "sbp") == [(1.0, 120.0)]
    assert channel(read(raw, tasks=NO_PHENO, arterial=True)[0], "sbp") == [(1.0, 120.0), (2.0, 90.0)]


def test_the_phenotypes_can_read_the_whole_stay(tmp_path: Path) -> None:
    hospital = one_stay(100.0, 120.0).chart(100, 75.0, 90).lab(1, 100.0, 2.0).diagnosis(10, "I509")
    raw = hospital.write(tmp_path / "raw")
    options = MimicIvOptions(pheno_window="stay")
    modalities, tasks = SOURCE.describe(raw, options)
    reads = {t.name: t.modalities for t in tasks}
    assert reads["ihm"][:2] == ("vitals", "labs")
    assert reads["pheno"][:2] == ("vitals_stay", "labs_stay")
    assert set(reads["pheno"][2:]) == set(reads["ihm"][2:]) == {"static", "diagnoses"}
    (sample,) = read(raw, pheno_window="stay")
    assert channel(sample, "heart_rate") == [(0.5, 80.0)]
    vitals, labs = sample.modalities["vitals_stay"], sample.modalities["labs_stay"]
    assert vitals.times is not None
    assert labs.times is not None
    assert vitals.times.tolist() == pytest.approx([0.005, 0.75])
    assert labs.times.tolist() == [1.0]
    assert set(sample.modalities) <= {m.name for m in modalities}


# Diagnoses


@pytest.mark.parametrize(
    ("code", "version", "groups"),
    [
        ("5849", 9, {"acute and unspecified renal failure"}),
        ("4019", 9, {"essential hypertension"}),
        ("25000", 9, {"diabetes mellitus without complication"}),
        ("V4581", 9, {"coronary atherosclerosis and other heart disease"}),
        ("0389", 9, {"septicemia (except in labor)"}),
        ("V3000", 9, set()),
        ("I10", 10, {"essential hypertension"}),
        ("R6521", 10, {"septicemia (except in labor)", "shock"}),
        ("J441", 10, {"chronic obstructive pulmonary disease and bronchiectasis"}),
        ("N179", 10, {"acute and unspecified renal failure"}),
        ("R7881", 10, {"septicemia (except in labor)"}),
        ("I2510", 10, {"coronary atherosclerosis and other heart disease"}),
        ("E7800", 10, {"disorders of lipid metabolism"}),  # introduced after the mapping: read as E780
        ("E1165", 10, {"diabetes mellitus with complications"}),
        ("Z3800", 10, set()),
        ("XYZ", 10, None),
    ],
)
def test_codes_go_to_their_phenotypes(code: str, version: int, groups: set[str] | None) -> None:
    found = Phenotyper().of(code, version)
    assert (None if found is None else {PHENOTYPES[i][1] for i in found}) == groups


def test_the_label_of_phenotypes_is_of_the_admission_and_codes_before_it_are_input(tmp_path: Path) -> None:
    hospital = one_stay().diagnosis(10, "N179").diagnosis(10, "R6521").diagnosis(10, "QQQ")
    hospital.admission(1, 9, -500.0, -300.0).diagnosis(9, "4280", 9).diagnosis(9, "I10")
    hospital.admission(1, 8, -700.0, -1.0).diagnosis(8, "I110")  # ends during the admission of the stay
    hospital.patient(2).admission(2, 20, 0.0, 90.0).stay(2, 20, 200, 0.0, 60.0).chart(200, 1.0, 80, subject=2)
    funnel = Funnel()
    sample, other = read(hospital.write(tmp_path), funnel)
    have = {PHENOTYPES[i][1] for i in np.flatnonzero(sample.targets["pheno"])}
    assert have == {"acute and unspecified renal failure", "septicemia (except in labor)", "shock"}
    assert "pheno" not in other.targets
    assert funnel.counts["diagnosis code that no table of phenotypes knows"] == 1
    assert funnel.counts["no label for pheno"] == 1
    assert sample.modalities["diagnoses"].values[:, 0].tolist() == [0, 1]
    assert "diagnoses" not in other.modalities
    assert "diagnoses" not in read(tmp_path, diagnoses=False)[0].modalities


def test_pheno_says_which_extra_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = one_stay().diagnosis(10, "N179").write(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ExtraMissingError, match=r"pip install 'flame-moe\[mimic\]', or name the other tasks with --task"
    ):
        SOURCE.describe(raw, MimicIvOptions())
    assert len(SOURCE.describe(raw, MimicIvOptions(tasks=("ihm",)))[1]) == 1


# Leakage, scoring, restart


def test_nothing_after_the_prediction_time_changes_a_feature(tmp_path: Path) -> None:
    def hospital(late: bool) -> Hospital:
        end, death = (400.0, 400.0) if late else (90.0, None)
        h = one_stay(400.0 if late else 60.0, end, death, dod="2150-01-17" if late else "")
        h.admission(1, 9, -500.0, -300.0).diagnosis(9, "I10").lab(1, 5.0, 1.1, storetime=at(6.0))
        h.note("radiology", "r1", 10.0, "No effusion.").note("discharge", "d0", -299.0, "Went home.", hadm_id=9)
        h.add("ed/edstays", subject_id=1, hadm_id=10, stay_id=1000, intime=at(-3.0))
        h.add("ed/triage", subject_id=1, stay_id=1000, heartrate=99, chiefcomplaint="Chest pain")
        if late:
            h.chart(100, 48.1, 200).chart(100, 40.0, 199, storetime=at(49.0)).lab(1, 48.1, 9.0)
            h.lab(1, 47.0, 9.0, storetime=at(48.1)).diagnosis(10, "R6521").diagnosis(10, "I469")
            h.note("radiology", "r2", 47.0, "Died.", storetime=at(50.0)).note("radiology", "r3", 49.0, "Died.")
            h.note("discharge", "d1", 40.0, "Died.", hadm_id=10).note("discharge", "d2", 400.0, "Died.", hadm_id=10)
            h.add("ed/edstays", subject_id=1, hadm_id=10, stay_id=1001, intime=at(50.0))
            h.add("ed/triage", subject_id=1, stay_id=1001, heartrate=44, chiefcomplaint="Died")
            h.admission(1, 12, 500.0, 600.0).stay(1, 12, 300, 500.0, 550.0)
        else:
            h.diagnosis(10, "I10")
        return h

    early = read(hospital(False).write(tmp_path / "a"))[0]
    late = read(hospital(True).write(tmp_path / "b"))[0]
    assert early.targets["ihm"] != late.targets["ihm"]
    assert early.modalities.keys() == late.modalities.keys()
    assert len(early.modalities) == 8
    for name, part in early.modalities.items():
        assert same(part, late.modalities[name]), name


def test_new_records_without_outcomes_are_read(tmp_path: Path) -> None:
    hospital = one_stay(60.0)
    raw = hospital.write(tmp_path / "raw", without=["hosp/diagnoses_icd"])
    for table, columns in (
        ("hosp/admissions", ["dischtime", "deathtime", "hospital_expire_flag"]),
        ("icu/icustays", ["outtime", "los"]),
        ("hosp/patients", ["dod"]),
    ):
        path = raw / f"{table}.csv"
        pl.read_csv(path, infer_schema=False).drop(columns).write_csv(path)
    (sample,) = read(raw)
    assert sample.targets == {}
    assert channel(sample, "heart_rate") == [(0.5, 80.0)]
    store = prepare("mimic-iv", raw, tmp_path / "store", require_labels=False)
    assert store.manifest["source"] == "mimic_iv"
    assert list(store.tasks) == ["ihm", "los", "readmission"]


def test_a_second_call_after_a_crash_does_no_finished_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = one_stay().lab(1, 2.0, 1.0).diagnosis(10, "I10").write(tmp_path / "raw")
    whole = prepare("mimic_iv", raw, tmp_path / "whole", require_labels=False)
    said: dict[str, None] = {}

    def say(text: str, share: float | None = None, /) -> None:
        said[text] = None

    with monkeypatch.context() as broken:
        broken.setattr(mimic_iv, "labs", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            prepare("mimic_iv", raw, tmp_path / "store", require_labels=False, say=say)
    assert list(said) == ["chartevents"]
    assert not (tmp_path / "store").exists()
    said.clear()
    again = prepare("mimic_iv", raw, tmp_path / "store", require_labels=False, say=say)
    assert [step for step in said if not step.startswith("hashing")] == ["labevents", "stays"]
    assert again.manifest["files"] == whole.manifest["files"]
    assert not list(tmp_path.glob(".store*"))
    assert sorted(again.manifest["inputs"]) == sorted(p.relative_to(raw).as_posix() for p in raw.rglob("*.csv"))


# Layouts and mistakes


def test_layouts_and_packing_change_nothing(tmp_path: Path) -> None:
    hospital = one_stay().lab(1, 2.0, 1.0).diagnosis(10, "I10")
    hospital.add("ed/edstays", subject_id=1, hadm_id=10, stay_id=1000, intime=at(-3.0))
    hospital.add("ed/triage", subject_id=1, stay_id=1000, heartrate=99, chiefcomplaint="Chest pain")
    plain = read(hospital.write(tmp_path / "plain"))[0]
    folder = tmp_path / "raw"
    hospital.write(folder / "mimiciv", packed=True)
    (folder / "mimic-iv-ed").mkdir()
    (folder / "mimiciv" / "ed").rename(folder / "mimic-iv-ed" / "ed")
    packed = read(folder)[0]
    assert plain.modalities.keys() == packed.modalities.keys()
    assert all(same(part, packed.modalities[name]) for name, part in plain.modalities.items())
    assert get_source("mimic-iv") is get_source("mimic_iv")


def test_an_optional_table_that_is_absent_costs_what_it_brings_and_is_counted(tmp_path: Path) -> None:
    raw = one_stay().write(tmp_path / "raw", without=["hosp/diagnoses_icd"])
    modalities, tasks = SOURCE.describe(raw, MimicIvOptions())
    assert [m.name for m in modalities] == ["vitals", "labs", "static"]
    assert {t.name: t.modalities for t in tasks} == {n: ("vitals", "labs", "static") for n in NO_PHENO}
    funnel = Funnel()
    read(raw, funnel)
    absent = [text for text in funnel.counts if "absent" in text]
    assert len(absent) == 6
    assert "table note/radiology of MIMIC-IV-Note absent: modality radiology left out" in absent
    with pytest.raises(DataError, match="the task pheno needs the table 'hosp/diagnoses_icd'"):
        SOURCE.describe(raw, MimicIvOptions(tasks=("pheno",)))


@pytest.mark.parametrize(
    ("table", "find", "put", "message"),
    [
        ("icu/chartevents", ",80,80,", ",80,fast,", r"'fast' in column 'valuenum' is no number \[.*chartevents.csv"),
        ("icu/icustays", "2150-01-01 00:00:00", "01/01/2150", r"'01/01/2150' in column 'intime' is no time"),
        ("hosp/patients", "anchor_age", "age", r"the column 'anchor_age' is missing \[.*patients.csv\]"),
        ("icu/icustays", "1,10,100", "1,77,100", "no stay is left after the rules of the cohort"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_place(
    tmp_path: Path, table: str, find: str, put: str, message: str
) -> None:
    raw = one_stay().write(tmp_path / "raw")
    path = raw / f"{table}.csv"
    text = path.read_text()
    assert find in text
    path.write_text(text.replace(find, put))
    with pytest.raises(DataError, match=message) as caught:
        prepare("mimic_iv", raw, tmp_path / "store", options={"tasks": NO_PHENO})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_needed_table_that_is_missing_or_there_twice_is_refused(tmp_path: Path) -> None:
    raw = one_stay().write(tmp_path / "raw", without=["hosp/labevents"])
    with pytest.raises(DataError, match=r"the table 'hosp/labevents' is missing .*It is part of MIMIC-IV"):
        SOURCE.describe(raw, MimicIvOptions())
    one_stay().write(tmp_path / "two" / "a")
    one_stay().write(tmp_path / "two" / "b")
    with pytest.raises(DataError, match=r"'hosp/patients' is there twice: a/hosp/patients\.csv and b/hosp"):
        SOURCE.describe(tmp_path / "two", MimicIvOptions())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"this is no folder \[.*file\]"):
        SOURCE.describe(tmp_path / "file", MimicIvOptions())


def test_the_documented_channels_are_those_of_the_code() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/sources/mimic_iv.md").read_text(encoding="utf-8")
    for c in (*VITALS, *LABS):
        items = ", ".join(map(str, c.items))
        assert f"| `{c.name}` | {c.unit} | {c.low:g} to {c.high:g} | {items}" in page
    for option in MimicIvOptions.model_fields:
        assert f"`{option}`" in page
