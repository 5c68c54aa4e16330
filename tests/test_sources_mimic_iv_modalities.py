"""The promises of the MIMIC-IV source about notes, the emergency department and chest X-rays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources._mimic_tables import TRIAGE
from flame_moe.data.sources.mimic_iv import SOURCE, MimicIvOptions
from flame_moe.data.text import TextOptions, embed_texts
from flame_moe.errors import DataError
from flame_moe.schema import Task
from tests.example_mimic import Hospital, at, one_stay, read

TASKS = ("ihm", "los", "readmission")
SECOND = 1 / 3600


def notes_of(sample: Sample, name: str) -> list[tuple[float, str]]:
    """Hours and which of the texts of this file every vector is."""
    part = sample.modalities[name]
    assert part.times is not None
    known = {embed_texts([text], TextOptions())[0].tobytes(): text for text in TEXTS}
    return [(round(float(t) * 48, 3), known[v.tobytes()]) for t, v in zip(part.times, part.values, strict=True)]


TEXTS = ("No effusion.", "Small effusion.", "Large effusion.", "Went home.", "Came back.", "Chest pain", "Died.")


# Notes


def test_reports_count_from_admission_to_the_prediction_time_and_only_once_they_are_recorded(tmp_path: Path) -> None:
    hospital = one_stay().note("radiology", "a", -SECOND, "Died.").note("radiology", "b", 0.0, "No effusion.")
    hospital.note("radiology", "c", 48.0, "Small effusion.").note("radiology", "d", 48 + SECOND, "Died.")
    hospital.note("radiology", "e", 20.0, "Died.", storetime=at(48 + SECOND))
    hospital.note("radiology", "f", 30.0, "Large effusion.", storetime="").note("radiology", "g", 31.0, "  ")
    hospital.note("radiology", "h", 32.0, "Died.", subject=2)
    funnel = Funnel()
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=TASKS)
    expected = [(0.0, "No effusion."), (30.0, "Large effusion."), (48.0, "Small effusion.")]
    assert notes_of(sample, "radiology") == expected
    assert funnel.counts["radiology: after the prediction time"] == 1
    assert funnel.counts["radiology: recorded after the prediction time"] == 1


def test_only_the_last_notes_are_kept(tmp_path: Path) -> None:
    hospital = one_stay()
    for i, text in enumerate(TEXTS):
        hospital.note("radiology", f"n{i}", 1.0 + i, text)
    funnel = Funnel()
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=TASKS, most_notes=2)
    assert notes_of(sample, "radiology") == [(6.0, "Chest pain"), (7.0, "Died.")]
    assert funnel.counts["radiology: not among the last 2 of the stay"] == 5


def test_a_discharge_summary_is_an_input_of_later_admissions_only(tmp_path: Path) -> None:
    hospital = one_stay().admission(1, 11, 300.0, 400.0).stay(1, 11, 101, 301.0, 360.0).chart(101, 302.0, 80)
    hospital.note("discharge", "own", 1.0, "Died.", hadm_id=10)  # as if it were written early
    hospital.note("discharge", "past", -50.0, "Went home.", hadm_id=9)
    hospital.note("discharge", "late", -40.0, "Came back.", hadm_id=8, storetime=at(5.0))
    hospital.note("discharge", "unknown", -40.0, "Died.")
    first, second = read(hospital.write(tmp_path), tasks=TASKS)
    assert notes_of(first, "history") == [(0.0, "Went home.")]
    assert notes_of(second, "history") == [(0.0, "Went home."), (0.0, "Came back."), (0.0, "Died.")]


def test_the_text_encoder_is_an_option(tmp_path: Path) -> None:
    raw = one_stay().note("radiology", "a", 1.0, "No effusion.").write(tmp_path / "raw")
    options = {"tasks": TASKS, "text": {"width": 32}}
    modalities, _ = SOURCE.describe(raw, MimicIvOptions.parse(options, where="test"))
    assert {m.name: m.features for m in modalities}["radiology"] == 32
    assert read(raw, **options)[0].modalities["radiology"].values.shape == (1, 32)


# Emergency department


def emergency(*visits: tuple[int, float], **triage: object) -> Hospital:
    """One stay, visits (number, hours of arrival) of its admission, and triage rows of all of them."""
    hospital = one_stay()
    for visit, hours in visits:
        hospital.add("ed/edstays", subject_id=1, hadm_id=10, stay_id=visit, intime=at(hours))
        hospital.add("ed/triage", subject_id=1, stay_id=visit, **{"heartrate": visit, **triage})
    return hospital


def triage(sample: Sample) -> dict[str, float]:
    part = sample.modalities["triage"]
    assert part.observed is not None
    return {m.name: float(v) for m, v, o in zip(TRIAGE, part.values[0], part.observed[0], strict=True) if o}


def test_the_last_triage_before_the_stay_counts(tmp_path: Path) -> None:
    funnel = Funnel()
    hospital = emergency((50, -9.0), (60, -3.0), (70, 1.0), chiefcomplaint="Chest pain")
    (sample,) = read(hospital.write(tmp_path), funnel, tasks=TASKS)
    assert triage(sample) == {"heartrate": 60.0}
    assert notes_of(sample, "complaint") == [(0.0, "Chest pain")]
    assert funnel.counts["triage: visit after admission to the unit"] == 1
    assert funnel.counts["triage: earlier visit of the same admission"] == 1


def test_triage_is_in_celsius_and_plausible(tmp_path: Path) -> None:
    hot = emergency((60, -3.0), temperature=98.6, pain="7", acuity=2, dbp=879, o2sat=99)
    funnel = Funnel()
    (sample,) = read(hot.write(tmp_path / "a"), funnel, tasks=TASKS)
    assert triage(sample) == pytest.approx({"temperature": 37.0, "heartrate": 60, "o2sat": 99, "pain": 7, "acuity": 2})
    assert funnel.counts["triage: temperature converted from Fahrenheit"] == 1
    assert funnel.counts["triage: dbp outside its plausible range"] == 1
    (sample,) = read(emergency((60, -3.0), temperature=36.5, pain="unable").write(tmp_path / "b"), tasks=TASKS)
    assert triage(sample) == pytest.approx({"temperature": 36.5, "heartrate": 60})


def test_a_visit_without_a_measurement_has_no_triage_table(tmp_path: Path) -> None:
    (sample,) = read(emergency((60, -3.0), heartrate="", chiefcomplaint="Chest pain").write(tmp_path), tasks=TASKS)
    assert "triage" not in sample.modalities
    assert "complaint" in sample.modalities


# Chest X-rays

SUBJECT = 12345678


def radiograph(raw: Path, study: int, dicom: str, shade: int) -> None:
    folder = raw / "files" / "p12" / f"p{SUBJECT}" / f"s{study}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20), shade, np.uint8)).save(folder / f"{dicom}.jpg", quality=100)


def imaged(*pictures: tuple[str, str, str, str]) -> Hospital:
    """Patient SUBJECT, a stay from the start of 2150, and pictures (dicom, view, date, time) of study 5."""
    hospital = Hospital().patient(SUBJECT).admission(SUBJECT, 10, 0.0, 90.0).stay(SUBJECT, 10, 100, 0.0, 60.0)
    hospital.chart(100, 1.0, 80, subject=SUBJECT)
    for dicom, view, date, time in pictures:
        row = {"dicom_id": dicom, "ViewPosition": view, "StudyDate": date, "StudyTime": time}
        hospital.add("mimic-cxr-2.0.0-metadata", subject_id=SUBJECT, study_id=5, **row)
    return hospital


PICTURES = (
    ("late", "AP", "21500103", "1.0"),  # one second after the 48 h
    ("last", "AP", "21500103", "0"),
    ("first", "PA", "21500101", "503.25"),  # five minutes and three seconds past midnight
    ("side", "LATERAL", "21500101", "120000"),
    ("gone", "AP", "21500102", "0"),
)


@pytest.fixture
def xrays(tmp_path: Path) -> Path:
    raw = imaged(*PICTURES).write(tmp_path / "raw")
    for i, (dicom, *_) in enumerate(PICTURES[:4]):
        radiograph(raw, 5, dicom, 40 * (i + 1))
    (raw / "files" / "p12" / f"p{SUBJECT}" / "s5.txt").write_text("No effusion.\n")
    return raw


def test_pictures_are_frontal_and_of_the_window(xrays: Path) -> None:
    modalities, _ = SOURCE.describe(xrays, MimicIvOptions(tasks=TASKS, cxr_size=16))
    (image,) = [m for m in modalities if m.name == "cxr"]
    assert (image.kind, image.shape) == ("image", (16, 16, 1))
    funnel = Funnel()
    (sample,) = read(xrays, funnel, tasks=TASKS, cxr_size=16)
    part = sample.modalities["cxr"]
    assert part.values.shape == (2, 256)
    assert part.values.dtype == np.uint8
    assert np.abs(part.values.mean(axis=1) - (120, 80)).max() < 2
    assert part.times is not None
    assert (part.times * 48 * 3600).tolist() == pytest.approx([303, 48 * 3600], rel=1e-4)
    assert funnel.counts["cxr: taken after the prediction time"] == 1
    assert funnel.counts["cxr: another view than PA, AP"] == 1
    assert funnel.counts["cxr: named in the metadata, but not there"] == 1
    everything = read(xrays, tasks=TASKS, cxr_size=16, cxr_views=[])[0].modalities["cxr"]
    assert len(everything.values) == 3
    assert len(read(xrays, tasks=TASKS, most_pictures=1, cxr_views=["PA"])[0].modalities["cxr"].values) == 1


def test_vectors_made_elsewhere_take_the_place_of_pictures(xrays: Path, tmp_path: Path) -> None:
    names = ["first", "last", "late", "other"]
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(xrays / "vectors.npz", dicom_id=np.array(names), embeddings=table)
    pl.DataFrame({"dicom_id": names, "embedding": table.tolist()}).write_parquet(xrays / "lists.parquet")
    wide = {"dicom_id": names, **{f"x{i}": table[:, i] for i in range(3)}}
    pl.DataFrame(wide).write_parquet(tmp_path / "wide.parquet")
    for file in ("vectors.npz", "lists.parquet", str(tmp_path / "wide.parquet")):
        options = MimicIvOptions(tasks=TASKS, cxr_vectors=file)
        modality = next(m for m in SOURCE.describe(xrays, options)[0] if m.name == "cxr")
        assert (modality.kind, modality.features) == ("timed", 3)
        part = read(xrays, tasks=TASKS, cxr_vectors=file)[0].modalities["cxr"]
        assert part.values.tolist() == table[:2].tolist()


def test_reports_of_pictures_wait_for_the_hours_it_takes_to_write_them(xrays: Path) -> None:
    (without,) = read(xrays, tasks=TASKS)
    assert "cxr_reports" not in without.modalities
    (sample,) = read(xrays, tasks=TASKS, cxr_reports=True, report_delay=10)
    assert [(round(h), text) for h, text in notes_of(sample, "cxr_reports")] == [(10, "No effusion.")]
    funnel = Funnel()
    (late,) = read(xrays, funnel, tasks=TASKS, cxr_reports=True, report_delay=48)
    assert "cxr_reports" not in late.modalities
    assert funnel.counts["cxr_reports: taken to be written after the prediction time"] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda raw: None, r"there is no file of X-ray vectors \[.*vectors.npz\]"),
        (lambda raw: (raw / "vectors.npz").write_bytes(b"nonsense"), r"no file of picture vectors.*dicom_id \(n\)"),
        (lambda raw: np.savez(raw / "vectors.npz", dicom_id=np.array(["a"]), embeddings=np.zeros(3)), "no file of"),
        (lambda raw: np.savez(raw / "vectors.npz", names=np.array(["a"])), "no file of picture vectors"),
    ],
)
def test_a_file_that_holds_no_vectors_is_refused(xrays: Path, make: object, message: str) -> None:
    assert callable(make)
    make(xrays)
    with pytest.raises(DataError, match=message):
        SOURCE.describe(xrays, MimicIvOptions(tasks=TASKS, cxr_vectors="vectors.npz"))


def test_everything_together_makes_a_store_with_every_modality_in_every_task(xrays: Path, tmp_path: Path) -> None:
    raw = xrays
    (raw / "note").mkdir()
    row = f"n,{SUBJECT},10,RR,1,2150-01-01 05:00:00,,No effusion.\n"
    (raw / "note" / "radiology.csv").write_text(
        f"note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n{row}"
    )
    store = prepare("mimic_iv", raw, tmp_path / "store", options={"cxr_reports": True}, require_labels=False)
    assert list(store.modalities) == ["vitals", "labs", "radiology", "cxr", "cxr_reports", "static", "diagnoses"]
    for task in store.tasks.values():
        assert isinstance(task, Task)
        assert task.modalities == tuple(store.modalities)
        assert task.description
        assert task.caveat
    assert store.present("radiology").all()
    assert store.present("cxr").all()
