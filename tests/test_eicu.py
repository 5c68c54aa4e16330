"""eICU-CRD: invented patients at every boundary of cohort, labels and window, against truth told by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.data.codes import code_id
from flame_moe.data.prepare import prepare
from flame_moe.data.sources.eicu import SOURCE, EicuOptions
from flame_moe.data.text import TextOptions, embed_texts
from flame_moe.errors import DataError, RecipeError
from tests.eicu_release import column, patient, samples, write_release

TABLES: dict[str, list[dict[str, Any]]] = {
    "patient": [patient(1), patient(2, unitdischargestatus="Expired", unitdischargelocation="Death")],
    "hospital": [{"hospitalid": 7, "numbedscategory": "250 - 499", "teachingstatus": "t", "region": "West"}],
    "vitalPeriodic": [{"observationoffset": minute, "heartrate": 80 + minute / 60} for minute in (-361, -360, 0, 1440)],
    "vitalAperiodic": [{"observationoffset": 0, "noninvasivemean": 75}],
    "lab": [
        {"labname": "sodium", "labresultoffset": 30, "labresultrevisedoffset": 70, "labresult": 140},
        {"labname": "sodium", "labresultoffset": 1430, "labresultrevisedoffset": 1440, "labresult": 141},
        {"labname": "sodium", "labresultoffset": 1431, "labresultrevisedoffset": 1441, "labresult": 142},
    ],
    "diagnosis": [{"diagnosisoffset": 10, "diagnosisstring": "Renal|Failure", "activeupondischarge": "True"}],
    "treatment": [{"treatmentoffset": -2000, "treatmentstring": "renal|dialysis", "activeupondischarge": "False"}],
    "medication": [{"drugorderoffset": 50, "drugstartoffset": 20, "drugname": "ASPIRIN  81 MG", "drughiclseqno": 1820}],
    "note": [
        {
            "noteoffset": 20,
            "noteenteredoffset": 35,
            "notetype": "Admission",
            "notepath": "notes/Progress Notes/Social History/Smoking Status/current smoker",
            "notetext": "current smoker",
        }
    ],
    "admissionDx": [{"admitdxenteredoffset": 5, "admitdxpath": "admission diagnosis|Sepsis"}],
    "infusiondrug": [{"infusionoffset": 1440, "drugname": "Propofol (ml/hr)"}],
    "pastHistory": [{"pasthistoryoffset": 1, "pasthistoryenteredoffset": 9, "pasthistorypath": "COPD"}],
    "respiratoryCharting": [
        {"respchartoffset": 60, "respchartentryoffset": 65, "respchartvaluelabel": "FiO2", "respchartvalue": "40%"}
    ],
    "intakeOutput": [
        {
            "intakeoutputoffset": 60,
            "intakeoutputentryoffset": 60,
            "cellpath": "flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Urine",
            "cellvaluenumeric": 200,
        }
    ],
    "apacheApsVar": [{"intubated": 0, "heartrate": 104, "temperature": -1, "urine": 1500.5}],
    "apachePatientResult": [{"actualicumortality": "ALIVE", "predictedicumortality": 0.01}],
}


def release(tmp_path: Path, **tables: list[dict[str, Any]]) -> Path:
    return write_release(tmp_path / "raw", {**TABLES, **tables})


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


def test_the_window_reaches_from_the_lookback_to_the_prediction_inclusive(tmp_path: Path) -> None:
    folder = release(tmp_path)
    found, _ = samples(folder)
    assert found["1"].modalities["vitals"].times == pytest.approx([0, 0.2, 1])
    assert column(found["1"], folder, "vitals", "heart_rate") == [74, 80, 104]
    assert column(found["1"], folder, "vitals", "cuff_mean") == [None, 75, None]
    later, _ = samples(folder, lookback=0)
    assert later["1"].modalities["vitals"].times == pytest.approx([0, 1])


def test_a_result_counts_at_its_draw_if_it_was_known_in_time(tmp_path: Path) -> None:
    folder = release(tmp_path)
    found, _ = samples(folder, lookback=0)
    assert column(found["1"], folder, "labs", "sodium") == [140, 141]
    assert found["1"].modalities["labs"].times == pytest.approx([30 / 1440, 1430 / 1440])


def test_units_and_slips_of_laboratory_values_are_mended_and_counted(tmp_path: Path) -> None:
    def lab(name: str, value: float | str, system: str, reported: str = "", minute: int = 9) -> dict[str, Any]:
        units = {"labmeasurenamesystem": system, "labmeasurenameinterface": reported}
        return {
            "labname": name,
            "labresultoffset": minute,
            "labresultrevisedoffset": minute,
            "labresult": value,
            **units,
        }

    rows = [
        lab("ionized calcium", 1.1, "mg/dL", "mmol/L"),
        lab("magnesium", 1.6, "mg/dL", "mEq/L"),
        lab("CRP", 30, "mg/dL", "mg/L"),
        lab("FiO2", 0.4, "%"),
        lab("FiO2", 4, "%", "lpm", 10),
        lab("FiO2", 10000, "%", "%", 11),
        lab("lactate", 18, "mg/dL"),
        lab("creatinine", "", "mg/dL"),
        lab("sodium", 1400, "mmol/L", "mmol/L"),
        lab("AST (SGOT)", 20, "Units/L", "IU/L"),
    ]
    folder = release(tmp_path, lab=rows)
    found, funnel = samples(folder)
    truth = {
        "ionized_calcium": 4.4088,
        "magnesium": 1.944,
        "crp": 3.0,
        "gas_fio2": 40.0,
        "lactate": None,
        "sodium": None,
    }
    for channel, value in {**truth, "creatinine": None, "ast": 20.0}.items():
        assert column(found["1"], folder, "labs", channel) == [None if value is None else pytest.approx(value)], channel
    for text in (
        "ionized calcium in mmol/L converted to mg/dL",
        "labs magnesium reported in meq/l, converted",
        "labs CRP reported in mg/l, converted",
        "FiO2 of a blood gas given as a fraction converted to %",
        "labs FiO2 reported in lpm, left out",
        "labs gas_fio2 outside 20 to 100 %, set to missing",
        "labs lactate in unit 'mg/dl', left out",
        "labs result that is text only, left out",
        "labs sodium outside 80 to 200 mmol/L, set to missing",
    ):
        assert funnel.counts[text] == 1, text


def test_of_a_draw_with_two_results_the_last_that_was_known_counts(tmp_path: Path) -> None:
    draw = {"labname": "sodium", "labresultoffset": 30}
    rows = [
        draw | {"labresultrevisedoffset": 90, "labresult": 131},
        draw | {"labresultrevisedoffset": 60, "labresult": 130},
        draw | {"labresultrevisedoffset": 1441, "labresult": 132},
    ]
    folder = release(tmp_path, lab=rows)
    found, funnel = samples(folder)
    assert column(found["1"], folder, "labs", "sodium") == [131]
    assert funnel.counts["labs revised result of one draw, the last known taken"] == 1


def test_vital_signs_measured_twice_in_a_minute_become_their_median_and_artefacts_are_missing(tmp_path: Path) -> None:
    rows = [
        {"observationoffset": 5, "heartrate": rate, "temperature": t} for rate, t in ((80, 98.6), (90, ""), (0, 300))
    ]
    folder = release(tmp_path, vitalPeriodic=rows, vitalAperiodic=[])
    found, funnel = samples(folder)
    assert column(found["1"], folder, "vitals", "heart_rate") == [85]
    assert column(found["1"], folder, "vitals", "temperature") == [pytest.approx(37.0)]
    assert funnel.counts["vitals measured twice in one minute, median taken"] == 1
    assert funnel.counts["temperature in F converted to C"] == 1
    assert funnel.counts["vitals heart_rate outside 1 to 300 1/min, set to missing"] == 1


def test_ventilator_text_becomes_numbers_and_volumes_are_sums(tmp_path: Path) -> None:
    def charted(label: str, value: str, entered: int = 60) -> dict[str, Any]:
        return {
            "respchartoffset": 60,
            "respchartentryoffset": entered,
            "respchartvaluelabel": label,
            "respchartvalue": value,
        }

    def cell(path: str, value: float, minute: int = 60) -> dict[str, Any]:
        full = f"flowsheet|Flowsheet Cell Labels|I&O|{path}"
        return {
            "intakeoutputoffset": minute,
            "intakeoutputentryoffset": minute,
            "cellpath": full,
            "cellvaluenumeric": value,
        }

    charts = [charted("FiO2", "0.4"), charted("FIO2 (%)", "50"), charted("PEEP", "five"), charted("PEEP", "5", 1441)]
    cells = [
        cell("Output (ml)|Urine", 100),
        cell("Output (ml)|Foley cath", 50),
        cell("Output (ml)|Stool", 30),
        cell("Output (ml)|Total Out", 180),
        cell("Output (ml)|Urine Count", 1),
        cell("Intake (ml)|Crystalloids (ml)|NS", 500),
        cell("Weight|Bodyweight (kg)", 70, 61),
    ]
    folder = release(tmp_path, respiratoryCharting=charts, intakeOutput=cells)
    found, funnel = samples(folder)
    # The mean of 0.4 and 50 would be nonsense: each is in % before anything else is done.
    assert column(found["1"], folder, "respiratory", "fio2") == [pytest.approx(45)]
    assert column(found["1"], folder, "respiratory", "peep") == [None]
    assert funnel.counts["respiratory value that is no number, left out"] == 1
    for channel, value in (("urine", 150), ("output", 180), ("intake", 500), ("dialysis_out", None)):
        assert column(found["1"], folder, "fluids", channel) == [value], channel
    assert funnel.counts["fluids cell that is a total or a count, left out"] == 2


def events(tmp_path: Path, folder: Path, **options: Any) -> list[tuple[str, int, float]]:
    """(type, code, hours after admission) of stay 1."""
    chosen = EicuOptions.parse(options, where="options")
    found, _ = samples(folder, **options)
    values, times, _ = found["1"].modalities["events"]
    assert times is not None
    hours = times * (chosen.hours + chosen.lookback) - chosen.lookback
    names = chosen.event_types
    return [(names[kind], int(code), round(float(hour), 3)) for (kind, code), hour in zip(values, hours, strict=True)]


def test_events_are_typed_coded_and_timed_by_when_they_were_known(tmp_path: Path) -> None:
    found = events(tmp_path, release(tmp_path))
    assert found == [
        ("treatment", code_id("renal|dialysis"), -6.0),
        ("admission", code_id("admission diagnosis|sepsis"), round(5 / 60, 3)),
        ("diagnosis", code_id("renal|failure"), round(10 / 60, 3)),
        ("lab", code_id("sodium"), 0.5),
        ("medication", code_id("aspirin 81 mg"), round(50 / 60, 3)),
        ("lab", code_id("sodium"), round(1430 / 60, 3)),
        ("infusion", code_id("propofol"), 24.0),
    ]
    assert events(tmp_path, tmp_path / "raw", event_types=["history"]) == [
        ("history", code_id("copd"), round(1 / 60, 3))
    ]
    assert events(tmp_path, tmp_path / "raw", event_types=["medication"], drug_code="hicl")[0][1] == code_id(
        "hicl 1820"
    )


def test_a_drug_that_is_ordered_or_starts_after_the_prediction_is_no_event(tmp_path: Path) -> None:
    drug = {"drugname": "x", "drugorderoffset": 0, "drugstartoffset": 0}
    rows = [drug, drug | {"drugorderoffset": 1441}, drug | {"drugstartoffset": 1441}, drug | {"drugname": ""}]
    found = events(tmp_path, release(tmp_path, medication=rows), event_types=["medication"])
    assert found == [("medication", code_id("x"), 0.0)]


def test_repeated_events_count_once_and_the_latest_are_kept(tmp_path: Path) -> None:
    rows = [{"diagnosisoffset": minute, "diagnosisstring": "d"} for minute in (1, 1, 2, 3)]
    folder = release(tmp_path, diagnosis=rows)
    minutes = [round(60 * hour) for _, _, hour in events(tmp_path, folder, event_types=["diagnosis"], max_events=2)]
    assert minutes == [2, 3]
    _, funnel = samples(folder, event_types=["diagnosis"], max_events=2)
    assert funnel.counts["event repeated in one minute, one kept"] == 1
    assert funnel.counts["event before the latest 2 of its stay, left out"] == 1


def test_the_published_codes_rules_round_hours_up_and_ask_for_three_to_256_events(tmp_path: Path) -> None:
    def stay(number: int, minutes: list[int]) -> list[dict[str, Any]]:
        return [{"patientunitstayid": number, "diagnosisoffset": m, "diagnosisstring": f"d{m}"} for m in minutes]

    code = {"hours": 12, "lookback": 0, "event_rules": "code", "event_types": ["diagnosis"]}
    edge = [-500, 0, 59, 60, 719, 720]
    rows = stay(1, edge) + stay(2, [1, 2]) + stay(3, list(range(256))) + stay(4, list(range(257))) + stay(5, [1, 1, 1])
    patients = [patient(number) for number in range(1, 7)]
    folder = release(tmp_path, patient=patients, diagnosis=rows)
    found, funnel = samples(folder, **code)
    assert list(found) == ["1", "3", "5"]
    assert funnel.steps[-1][:3] == ("has 3 to 256 events before the prediction", 6, 3)
    assert events(tmp_path, folder, **code) == [
        ("diagnosis", code_id(f"d{minute}"), hour) for minute, hour in zip(edge, [1, 1, 1, 2, 12], strict=False)
    ]


def test_within_an_hour_events_keep_the_order_of_their_minutes(tmp_path: Path) -> None:
    rows = [{"diagnosisoffset": m, "diagnosisstring": text} for m, text in ((3, "a"), (2, "b"), (1, "c"))]
    folder = release(tmp_path, diagnosis=rows)
    found = events(tmp_path, folder, event_rules="code", event_types=["diagnosis"])
    assert [code for _, code, _ in found] == [code_id("c"), code_id("b"), code_id("a")]


def test_what_is_known_at_admission(tmp_path: Path) -> None:
    odd = patient(
        3, admissionheight=0.3, gender="", unitadmitsource="Moon", hospitaladmitoffset=30, admissionweight=515
    )
    folder = release(tmp_path, patient=[patient(1), odd])
    found, funnel = samples(folder, hospital=True)
    names = {"age": 60, "height": 165.1, "weight": 70.5, "hours_in_hospital_before": 1.5, "male": 0, "female": 1}
    names |= {"asian": 1, "caucasian": 0, "medical_unit": 1, "from_ward": 1, "from_emergency": 0, "first_admission": 1}
    for name, value in {**names, "unit_visit": 1, "hospital_beds": 3, "teaching_hospital": 1}.items():
        assert column(found["1"], folder, "static", name, hospital=True) == [pytest.approx(value)], name
    for name in ("height", "weight", "female", "from_ward", "hours_in_hospital_before"):
        assert column(found["3"], folder, "static", name, hospital=True) == [None], name
    assert funnel.counts["static unitadmitsource without a column of its own, set to missing"] == 1


def test_minus_one_is_missing_in_the_apache_variables_and_they_need_a_whole_day(tmp_path: Path) -> None:
    folder = release(tmp_path)
    found, _ = samples(folder)
    truth = {"intubated": 0, "heart_rate": 104, "temperature": None, "urine_24h": 1500.5}
    for name, value in truth.items():
        assert column(found["1"], folder, "apache", name) == [value]
    assert "apache" not in found["2"].modalities
    early, funnel = samples(folder, hours=23)
    assert "apache" not in early["1"].modalities
    assert funnel.counts["apache left out: its 24 h reach beyond the prediction at 23 h"] == 1
    described, _ = SOURCE.describe(folder, EicuOptions(hours=23))
    assert "apache" not in [m.name for m in described]


def test_a_note_is_one_document_at_the_time_it_was_complete(tmp_path: Path) -> None:
    def entry(path: str, text: str, offset: int, entered: int) -> dict[str, Any]:
        times = {"noteoffset": offset, "noteenteredoffset": entered, "notetype": "Admission"}
        return {"notepath": f"notes/{path}", "notetext": text, **times}

    rows = [
        entry("Progress Notes/Social History/Smoking Status", "denies smoking", 10, 30),
        entry("Progress Notes/Surgery/general", "general", 10, 40),
        entry("Shared/View and Save/Save Options/Print/Copies/Copies", "1", 10, 30),
        entry("Progress Notes/Surgery/late", "late", 10, 1441),
        entry("Progress Notes/Family", "none", -9000, -8000),
    ]
    folder = release(tmp_path, note=rows)
    found, funnel = samples(folder, text={"width": 32})
    values, times, _ = found["1"].modalities["notes"]
    texts = ["Family: none", "Social History / Smoking Status: denies smoking\nSurgery / general"]
    assert np.array_equal(values, embed_texts(texts, TextOptions(width=32)))
    assert times == pytest.approx([0, 400 / 1800])
    assert "notes" not in found["2"].modalities
    assert funnel.counts["notes entry about saving or printing, left out"] == 1
    assert "notes" not in [m.name for m in SOURCE.describe(folder, EicuOptions(notes=False))[0]]


AFTER = 1441
OFFSETS = {
    "vitalPeriodic": "observationoffset",
    "vitalAperiodic": "observationoffset",
    "lab": "labresultrevisedoffset",
    "diagnosis": "diagnosisoffset",
    "treatment": "treatmentoffset",
    "medication": "drugorderoffset",
    "note": "noteenteredoffset",
    "admissionDx": "admitdxenteredoffset",
    "infusiondrug": "infusionoffset",
    "pastHistory": "pasthistoryenteredoffset",
    "respiratoryCharting": "respchartentryoffset",
    "intakeOutput": "intakeoutputentryoffset",
}


def test_nothing_that_was_known_only_after_the_prediction_changes_a_feature(tmp_path: Path) -> None:
    types = [*EicuOptions().event_types, "history"]
    before, _ = samples(write_release(tmp_path / "raw", TABLES), event_types=types, hospital=True)
    changed = copy.deepcopy(TABLES)
    for table, offset in OFFSETS.items():
        for row in TABLES[table]:
            wild = {key: value * 3 if isinstance(value, float) else value for key, value in row.items()}
            changed[table].append(wild | {offset: AFTER})
            changed[table].append(wild | {offset: AFTER, "patientunitstayid": 2})
    for row in changed["patient"]:
        row |= {"unitdischargeoffset": 99_999, "unitdischargestatus": "Expired", "unitdischargelocation": "Death"}
        row |= {"hospitaldischargeoffset": 100_000, "hospitaldischargestatus": "Expired", "dischargeweight": 1}
        row |= {"hospitaldischargelocation": "Death", "hospitaldischargeyear": 2014}
    for table in ("diagnosis", "treatment"):
        for row in changed[table]:
            row["activeupondischarge"] = "False" if row["activeupondischarge"] == "True" else "True"
    changed["apachePatientResult"] = [{"actualicumortality": "EXPIRED", "predictedicumortality": 0.99}]
    after, _ = samples(write_release(tmp_path / "other", changed), event_types=types, hospital=True)
    assert before.keys() == after.keys()
    for name, sample in before.items():
        assert sample.modalities.keys() == after[name].modalities.keys()
        for modality, part in sample.modalities.items():
            for left, right in zip(part, after[name].modalities[modality], strict=True):
                assert left is right is None or np.array_equal(left, right), (name, modality)
    assert len(before["1"].modalities) == 8
    assert after["1"].targets["mortality"] == 1.0 != before["1"].targets["mortality"]


def test_absent_tables_leave_their_modalities_out_and_the_funnel_says_so(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "raw", {"patient": TABLES["patient"], "vitalAperiodic": TABLES["vitalAperiodic"]})
    modalities, tasks = SOURCE.describe(folder, EicuOptions(hospital=True))
    assert [m.name for m in modalities] == ["vitals", "static"]
    assert modalities[0].channels[0] == "cuff_systolic"
    assert [(task.name, task.modalities) for task in tasks] == [
        (name, ("vitals", "static")) for name in ("mortality", "readmission", "los")
    ]
    _, funnel = samples(folder, hospital=True)
    for text in (
        "table vitalPeriodic absent: its values or events are left out",
        "table lab absent: modality labs left out",
        "table apacheApsVar absent: modality apache left out",
        "table of all event types absent: modality events left out",
        "table hospital absent: beds and teaching status left out",
    ):
        assert funnel.counts[text] == 1, text


def test_new_patients_without_any_discharge_column_can_be_scored(tmp_path: Path) -> None:
    lines = (write_release(tmp_path / "full", TABLES) / "patient.csv").read_text().splitlines()
    dropped = ("unitdischargeoffset", "unitdischargestatus", "hospitaldischargeyear")
    keep = [i for i, name in enumerate(lines[0].split(",")) if name not in dropped]
    folder = release(tmp_path)
    (folder / "patient.csv").write_text("\n".join(",".join(line.split(",")[i] for i in keep) for line in lines))
    found, funnel = samples(folder)
    assert {name: dict(sample.targets) for name, sample in found.items()} == {"1": {}, "2": {}}
    assert funnel.counts["stay without unitdischargeoffset, kept without labels"] == 2
    store = prepare("eicu", folder, tmp_path / "store", require_labels=False)
    assert len(store) == 2


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


def test_wrong_folders_options_and_cells_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the table 'patient' is missing \[.*empty\]. It is part of eICU-CRD"):
        SOURCE.describe(tmp_path / "empty", EicuOptions())
    folder = release(tmp_path, lab=[{"labname": "sodium", "labresultoffset": 5, "labresult": "high"}])
    with pytest.raises(DataError, match=r"'high' in column 'labresult' is no number \[.*lab.csv\]"):
        prepare("eicu", folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match=r"there is no task of YAIB \[.*empty\]"):
        SOURCE.describe(folder, EicuOptions(yaib=str(tmp_path / "empty")))
    with pytest.raises(RecipeError, match=r"unknown value '7d'.*readmission"):
        EicuOptions.parse({"readmission": "7d"}, where="options")
