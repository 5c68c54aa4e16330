"""eICU-CRD: what is read of a stay, what is not, and what is refused, against truth told by hand."""

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
from tests.eicu_release import TABLES, column, patient, release, samples, write_release


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
    found, counted = samples(folder)
    truth = {"intubated": 0, "heart_rate": 104, "temperature": None, "urine_24h": 1500.5}
    for name, value in truth.items():
        assert column(found["1"], folder, "apache", name) == [value]
    assert "apache" not in found["2"].modalities
    assert not any(text.startswith("apache") for text in counted.counts)
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
