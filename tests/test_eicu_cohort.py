"""eICU-CRD: which stays become samples and how they are labelled, at every boundary, against truth told by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flame_moe.errors import DataError
from tests.eicu_release import TABLES, patient, samples, write_release


def kept(tmp_path: Path, patients: list[dict[str, Any]], **options: Any) -> list[str]:
    return list(samples(write_release(tmp_path / "raw", {"patient": patients}), **options)[0])


def labels(tmp_path: Path, patients: list[dict[str, Any]], task: str, **options: Any) -> dict[str, float | None]:
    found, _ = samples(write_release(tmp_path / "raw", {"patient": patients}), **options)
    return {name: float(s.targets[task][0]) if task in s.targets else None for name, s in found.items()}


def test_a_stay_must_last_longer_than_the_time_of_prediction(tmp_path: Path) -> None:
    ends = {1: 1439, 2: 1440, 3: 1441, 4: ""}
    patients = [patient(stay, unitdischargeoffset=end) for stay, end in ends.items()]
    assert kept(tmp_path, patients) == ["3", "4"]
    assert kept(tmp_path, patients, hours=23) == ["1", "2", "3", "4"]
    assert kept(
        tmp_path, [patient(1, unitdischargeoffset=14400), patient(2, unitdischargeoffset=14401)], max_days=10
    ) == ["1"]


def test_only_adults_of_known_age_are_kept_and_over_89_is_90_or_left_out(tmp_path: Path) -> None:
    ages = {1: "17", 2: "18", 3: "> 89", 4: "", 5: "89", 6: ">89"}
    patients = [patient(stay, age=age) for stay, age in ages.items()]
    assert kept(tmp_path, patients) == ["2", "3", "5", "6"]
    assert kept(tmp_path, patients, over_89="exclude") == ["2", "5"]
    found, _ = samples(tmp_path / "raw")
    assert [found[stay].modalities["static"].values[0, 0] for stay in "2356"] == [18, 90, 89, 90]


def test_the_first_stay_is_that_of_the_first_visit_in_the_first_year(tmp_path: Path) -> None:
    person = {"uniquepid": "p"}
    patients = [
        patient(1, **person, hospitaldischargeyear=2015),
        patient(2, **person, hospitaldischargeyear=2014, patienthealthsystemstayid=9, unitvisitnumber=2),
        patient(3, **person, hospitaldischargeyear=2014, patienthealthsystemstayid=9, unitvisitnumber=1),
        patient(4, unitstaytype="stepdown/other"),
    ]
    assert kept(tmp_path, patients, stays="first") == ["3", "4"]
    assert kept(tmp_path, patients, step_down=False) == ["1", "2", "3"]
    # The first stay is chosen before its length is asked for: a patient whose first stay is short has none.
    patients[2]["unitdischargeoffset"] = 60
    assert kept(tmp_path, patients, stays="first") == ["4"]


def test_a_death_counts_if_it_comes_after_the_prediction(tmp_path: Path) -> None:
    dead = {"unitdischargestatus": "Expired", "hospitaldischargestatus": "Expired"}
    patients = [
        patient(1, **dead, unitdischargeoffset=1440),
        patient(2, **dead, unitdischargeoffset=1441),
        patient(3, hospitaldischargestatus="Expired"),
        patient(4, unitdischargestatus=""),
    ]
    assert labels(tmp_path, patients, "mortality") == {"2": 1.0, "3": 0.0, "4": None}


def test_a_stay_is_long_if_more_than_three_days_remain(tmp_path: Path) -> None:
    patients = [patient(1, unitdischargeoffset=4 * 1440), patient(2, unitdischargeoffset=4 * 1440 + 1)]
    assert labels(tmp_path, patients, "los") == {"1": 0.0, "2": 1.0}
    assert labels(tmp_path, patients, "los", los_days=2) == {"1": 1.0, "2": 1.0}


def admission(*stays: tuple[int, int, str]) -> list[dict[str, Any]]:
    """Unit stays (start, end in minutes after admission to the hospital, type) of one hospital admission."""
    shared = {"patienthealthsystemstayid": 5, "uniquepid": "p"}
    return [
        patient(
            i + 1,
            **shared,
            hospitaladmitoffset=-start,
            unitdischargeoffset=end - start,
            unitstaytype=kind,
            unitvisitnumber=i + 1,
        )
        for i, (start, end, kind) in enumerate(stays)
    ]


MONTH = 30 * 1440


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ((3000 + MONTH, "readmit"), 1.0),
        ((3000 + MONTH + 1, "readmit"), 0.0),
        ((3001, "readmit"), 1.0),
        ((3000, "transfer"), 0.0),
        ((3500, "stepdown/other"), 0.0),
    ],
)
def test_a_readmission_is_a_return_to_intensive_care_within_thirty_days_of_the_end(
    tmp_path: Path, second: tuple[int, str], expected: float
) -> None:
    start, kind = second
    found = labels(tmp_path, admission((100, 3000, "admit"), (start, start + 2000, kind)), "readmission")
    assert found == {"1": expected, "2": 0.0}


def test_a_return_after_a_step_down_stay_is_a_readmission_of_both(tmp_path: Path) -> None:
    stays = admission((0, 3000, "admit"), (3000, 6000, "stepdown/other"), (6001, 9000, "readmit"))
    assert labels(tmp_path, stays, "readmission") == {"1": 1.0, "2": 1.0, "3": 0.0}


def test_a_return_is_seen_even_if_the_stay_it_leads_to_is_no_sample(tmp_path: Path) -> None:
    stays = admission((0, 3000, "admit"), (4000, 4100, "readmit"))
    assert labels(tmp_path, stays, "readmission") == {"1": 1.0}


def test_who_died_or_whose_order_of_stays_is_unknown_has_no_label_of_readmission(tmp_path: Path) -> None:
    dead = patient(3, unitdischargestatus="Expired")
    unclear = admission((0, 3000, "admit"), (4000, 7000, "readmit"))
    unclear[1]["hospitaladmitoffset"] = ""
    alone = patient(4, hospitaladmitoffset="")
    found = labels(tmp_path, [*unclear, dead, alone], "readmission")
    assert found == {"1": None, "2": None, "3": None, "4": 0.0}


@pytest.mark.parametrize(("start", "expected"), [(100 + 15 * 1440, 1.0), (101 + 15 * 1440, 0.0), (3000, 1.0)])
def test_the_readmission_of_the_published_code_counts_from_start_to_start(
    tmp_path: Path, start: int, expected: float
) -> None:
    stays = admission((100, 3000, "admit"), (start, start + 2000, "stepdown/other"))
    assert labels(tmp_path, stays, "readmission", readmission="15d") == {"1": expected, "2": 0.0}
    # Another admission of the same patient is never one.
    stays[1]["patienthealthsystemstayid"] = 6
    assert labels(tmp_path, stays, "readmission", readmission="15d") == {"1": 0.0, "2": 0.0}


def test_a_release_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    write_release(tmp_path / "data" / "eicu-crd-2.0", {"patient": TABLES["patient"]})
    assert list(samples(tmp_path / "data")[0]) == ["1", "2"]


def test_an_exact_repetition_of_a_stay_is_one_and_a_contradiction_is_refused(tmp_path: Path) -> None:
    found, funnel = samples(write_release(tmp_path / "raw", {"patient": [patient(1), patient(1)]}))
    assert list(found) == ["1"]
    assert funnel.steps[1][:3] == ("is not an exact repetition of another row", 2, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([patient(1), patient(1, age="61")], r"unit stay 1 is there twice with different content \[.*patient.csv\]"),
        ([patient(1, age="old")], r"the age 'old' of unit stay 1 is neither a number of years nor '> 89'"),
        ([patient(1, age="150")], r"the age '150' of unit stay 1"),
        ([patient(1, unitdischargestatus="Gone")], r"the unitdischargestatus 'Gone' of unit stay 1 is unknown"),
        ([patient(1, uniquepid="")], r"a stay has no uniquepid \[.*patient.csv\]"),
        ([patient(1, admissionweight="heavy")], r"'heavy' in column 'admissionweight' is no number"),
    ],
)
def test_a_wrong_patient_table_is_refused_in_one_sentence(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    folder = write_release(tmp_path / "raw", {"patient": rows})
    with pytest.raises(DataError, match=message):
        samples(folder)
