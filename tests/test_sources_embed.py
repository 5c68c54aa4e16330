"""EMBED: what becomes a sample, what a label, and what must never be a feature."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources import get_source
from flame_moe.data.work import Work
from flame_moe.errors import DataError
from tests.example_embed import DAY, STREAMS, Release, after
from tests.test_imaging import dicom

SIZE = {"size": (8, 6)}
FOUR_YEARS, FIVE_YEARS = 1461, 1826


def read(release: Release, **options: Any) -> tuple[dict[str, Sample], Funnel]:
    """Samples by id, and the funnel."""
    source, funnel = get_source("embed"), Funnel()
    chosen = source.options(**(SIZE | options))
    raw = release.write()
    samples = source.read(raw, chosen, funnel, Work(release.folder / "steps"))
    return {sample.id: sample for sample in samples}, funnel


def labels(samples: dict[str, Sample], task: str) -> dict[str, float]:
    return {name: float(sample.targets[task][0]) for name, sample in samples.items() if task in sample.targets}


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "embed")


def test_a_sample_is_one_breast_in_one_exam_with_its_four_streams(release: Release) -> None:
    release.exam("w1.0", "e1")
    release.exam("w1", "e2", day=after(400), sides="L")
    samples, funnel = read(release)
    assert list(samples) == ["e1-L", "e1-R", "e2-L"]
    assert {sample.subject for sample in samples.values()} == {"w1"}
    left, right = (samples[name].modalities["ffdm_cc"].values.reshape(8, 6) for name in ("e1-L", "e1-R"))
    assert left[0].tolist() == [0, 40, 80, 120, 160, 200]
    assert right[0].tolist() == left[0, ::-1].tolist()
    assert set(samples["e2-L"].modalities) == {*STREAMS, "clinical"}
    assert funnel.steps[0].after == 3
    unturned, _ = read(release, mirror=False)
    assert unturned["e1-R"].modalities["ffdm_cc"].values.tolist() == [left.ravel().tolist()]


def test_cancer_within_five_years_counts_to_the_day_and_for_its_own_breast(release: Release) -> None:
    cases: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
        "exact": ({"pdate_anon": after(FIVE_YEARS)}, 1, 0),
        "late": ({"pdate_anon": after(FIVE_YEARS + 1)}, 0, 0),
        "next_day": ({"pdate_anon": after(1)}, 1, 0),
        "same_day": ({"pdate_anon": DAY}, None, 0),
        "before": ({"pdate_anon": after(-10)}, None, 0),
        "in_situ": ({"pdate_anon": after(90), "path_severity": 1}, 1, 0),
        "high_risk": ({"pdate_anon": after(90), "path_severity": 2}, 0, 0),
        "other_organ": ({"pdate_anon": after(90), "path_severity": 6}, 0, 0),
        "no_report_date": ({"procdate_anon": after(90)}, 1, 0),
        "no_date": ({}, None, 0),
        "side_of_finding": ({"pdate_anon": after(90), "bside": None, "side": "L"}, 1, 0),
        "no_side": ({"pdate_anon": after(90), "bside": None, "side": "B"}, None, None),
    }
    for name, (pathology, _, _) in cases.items():
        release.exam(name, f"{name}1", sides="LR")
        release.finding(
            name, f"{name}2", day=after(2000), **{"bside": "L", "path_severity": 0.0, "side": "B"} | pathology
        )
    samples, funnel = read(release)
    got = labels(samples, "risk")
    for name, (_, left, right) in cases.items():
        assert (got.get(f"{name}1-L"), got.get(f"{name}1-R")) == (left, right), name
    assert funnel.counts["cancer of this breast known at the exam: no label of risk"] == 2
    assert funnel.counts["cancer without a date or side: no label of risk"] == 3


def test_a_breast_without_cancer_needs_five_years_of_record(release: Release) -> None:
    for name, days in (("short", FIVE_YEARS - 1), ("enough", FIVE_YEARS)):
        release.exam(name, f"{name}1", sides="L")
        release.finding(name, f"{name}2", day=after(days))
    release.exam("picture", "picture1", sides="L")
    release.picture("picture", "picture2", "R", "ffdm_cc", day=after(FIVE_YEARS))
    samples, funnel = read(release)
    assert labels(samples, "risk") == {"enough1-L": 0, "picture1-L": 0}
    assert funnel.counts["no cancer so far, but less than five years of record: no label of risk"] == 1
    samples, _ = read(release, short_followup="negative")
    assert labels(samples, "risk")["short1-L"] == 0


def test_an_exam_after_the_diagnosis_has_no_risk_but_the_other_breast_has(release: Release) -> None:
    release.exam("w", "before", day=after(-400))
    release.finding("w", "before", day=after(-400), side="L", bside="L", pdate_anon=after(-390), path_severity=0)
    release.exam("w", "after")
    release.exam("w", "last", day=after(FIVE_YEARS))
    release.exam("k", "known", side="L", asses="K")
    release.exam("k", "known_later", day=after(30), side="L", asses="B")
    release.finding("k", "end", day=after(3000))
    samples, _ = read(release)
    got = labels(samples, "risk")
    assert got["before-L"] == 1
    assert "after-L" not in got
    assert got["after-R"] == 0
    assert {name for name in got if name.startswith("known")} == {"known-R", "known_later-R"}


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("reading", {"N": 0, "B": 1, "A": 2, "P": 2, "S": 2, "M": 2}),
        ("management", {"N": 0, "B": 0, "A": 1, "P": 1, "S": 2, "M": 2}),
        ("screening", {"N": 0, "B": 1, "A": 2}),
    ],
)
def test_every_assessment_letter_has_one_class_or_none(
    release: Release, grouping: str, expected: dict[str, int]
) -> None:
    for letter in "ANBPSMKXQ":
        release.exam(letter, f"e{letter}", sides="L", asses=letter)
    samples, funnel = read(release, birads=grouping)
    assert labels(samples, "birads") == {f"e{letter}-L": label for letter, label in expected.items()}
    assert funnel.counts["assessment Q (unknown code) is in no class: no label of birads"] == 1
    assert funnel.counts["assessment K (BI-RADS 6) is in no class: no label of birads"] == 1
    assert funnel.counts["no assessment of the breast: no label of birads"] == 1
    _, tasks = get_source("embed").describe(release.folder, get_source("embed").options(birads=grouping))
    assert all(task.loss == "focal" for task in tasks)
    assert len(tasks[0].classes) == 3


def test_the_most_serious_finding_of_the_breast_or_of_both_counts(release: Release) -> None:
    release.exam("w", "e", side="L", asses="S")
    release.finding("w", "e", side="R", asses="B", numfind=2)
    release.exam("b", "both", side="B", asses="P")
    release.exam("n", "nobody", asses="n")
    release.exam("u", "unsaid", side="L", asses="A")
    release.exam("q", "mixed", side="L", asses="S")
    release.finding("q", "mixed", side="L", asses="Q", numfind=2)
    samples, _ = read(release)
    assert labels(samples, "birads") == {
        **{"e-L": 2, "e-R": 1, "both-L": 2, "both-R": 2, "nobody-L": 0, "nobody-R": 0, "unsaid-L": 2}
    }


def test_density_is_one_of_four_and_men_are_left_out(release: Release) -> None:
    for code in (1, 2, 3, 4, 5, 9, None):
        release.exam(f"w{code}", f"e{code}", sides="L", tissueden=code)
    release.exam("w", "split", sides="L", tissueden=2)
    release.finding("w", "split", tissueden=3, numfind=2)
    samples, funnel = read(release)
    assert labels(samples, "density") == {f"e{code}-L": code - 1 for code in (1, 2, 3, 4)}
    assert "e5-L" not in samples
    assert funnel.counts["densities of one exam disagree: no label of density"] == 1
    assert funnel.counts["density code outside 1 to 4: no label of density"] == 1


def test_special_views_and_repeats_are_left_out_and_counted(release: Release) -> None:
    release.finding("w", "e")
    first = release.picture("w", "e", "L", "ffdm_cc")
    release.picture("w", "e", "L", "ffdm_cc")
    release.picture("w", "e", "L", "ffdm_mlo", spot_mag=1.0)
    release.picture("w", "e", "L", "ffdm_mlo", ViewPosition="ML")
    release.picture("w", "e", "L", "cview_mlo", FinalImageType="3D")
    release.picture("w", "e", "R", "cview_mlo", ImageLateralityFinal=None)
    release.picture("w", "e", "R", "cview_mlo", FinalImageType="ROI_SS")
    samples, funnel = read(release)
    assert set(samples["e-L"].modalities) == {"ffdm_cc", "clinical"}
    assert list(samples) == ["e-L"]
    counted = {text: n for text, n in funnel.counts.items() if "left out" in text}
    assert counted == {
        "further picture of the same view left out": 1,
        "spot or magnification view left out": 1,
        "view other than CC or MLO left out": 1,
        "picture of another type than 2D or C-view left out": 2,
        "picture without a side left out": 1,
    }
    first.unlink()
    samples, _ = read(release)
    assert "ffdm_cc" in samples["e-L"].modalities


def test_implants_stay_unless_asked_and_screening_can_be_chosen(release: Release) -> None:
    release.exam("w1", "plain", sides="L")
    release.exam("w2", "implant", sides="L", implanfind="1")
    release.exam("w3", "diagnostic", sides="L", desc="MG Diagnostic Left")
    assert len(read(release)[0]) == 3
    assert list(read(release, implants="leave_out")[0]) == ["plain-L", "diagnostic-L"]
    samples, funnel = read(release, exams="screening")
    assert list(samples) == ["plain-L", "implant-L"]
    assert funnel.steps[-2].text == "is a screening exam"


def test_a_missing_file_is_a_missing_view_and_a_broken_one_stops(release: Release) -> None:
    release.exam("w", "e", sides="L")
    files = {stream: next((release.folder / "images").glob(f"e_L_{stream}*")) for stream in STREAMS}
    files["ffdm_cc"].unlink()
    samples, funnel = read(release)
    assert set(samples["e-L"].modalities) == {*STREAMS, "clinical"} - {"ffdm_cc"}
    assert funnel.counts["picture file is not there, view left out"] == 1
    files["cview_cc"].write_bytes(b"\x89PNG and no more")
    with pytest.raises(DataError, match=r"the picture cannot be read .*e_L_cview_cc"):
        read(release)
    samples, funnel = read(release, unreadable="leave_out")
    assert "cview_cc" not in samples["e-L"].modalities
    assert funnel.counts["picture file cannot be read, view left out"] == 1


def test_the_clinical_table_is_what_is_known_before_the_reading(release: Release) -> None:
    release.exam("w", "e0", day=date(2011, 1, 1), sides="", age_at_study=53.5)
    release.exam("w", "e1", sides="L")
    release.exam("w", "e2", day=after(500), sides="L", desc="MG Diagnostic", age_at_study=200)
    samples, funnel = read(release)
    first, second = (samples[name].modalities["clinical"] for name in ("e1-L", "e2-L"))
    assert first.values[0] == pytest.approx([55.5, 1, 1, 731 / 365.25])
    assert second.observed is not None
    assert second.observed.tolist() == [[False, True, True, True]]
    assert second.values[0] == pytest.approx([0, 0, 2, 500 / 365.25])
    assert funnel.counts["age outside 18 to 110 years set to missing"] == 1


def test_nothing_of_the_report_or_of_later_exams_is_a_feature(release: Release, tmp_path: Path) -> None:
    other = Release(tmp_path / "other")
    for place, report in ((release, {}), (other, {"asses": "M", "tissueden": 4, "implanfind": "3", "side": "L"})):
        place.exam("w", "e", **report)
    other.exam("w", "later", day=after(300), bside="L", pdate_anon=after(300), path_severity=0, asses="K")
    before, after_edit = read(release)[0], read(other)[0]
    for name in ("e-L", "e-R"):
        for modality, observation in before[name].modalities.items():
            changed = after_edit[name].modalities[modality]
            assert changed.values.tolist() == observation.values.tolist()
            assert np.array_equal(changed.observed, observation.observed) or observation.observed is None
    assert labels(before, "birads") != labels(after_edit, "birads")


def test_a_dicom_file_is_a_view_unless_it_holds_no_pixels(release: Release) -> None:
    release.exam("w", "e", sides="")
    path = release.picture("w", "e", "L", "ffdm_mlo")
    dicom(path, np.full((8, 6), 77, dtype=np.uint8), PhotometricInterpretation="MONOCHROME1")
    samples, _ = read(release)
    assert set(samples["e-L"].modalities["ffdm_mlo"].values.ravel().tolist()) == {255 - 77}
    dicom(path, None)
    with pytest.raises(DataError, match=r"the DICOM file holds no pixel data \[.*e_L_ffdm_mlo"):
        read(release)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_vectors_are_found_by_path_file_or_uid(release: Release, tmp_path: Path, suffix: str) -> None:
    release.exam("w", "e", sides="L")
    names = [row["anon_dicom_path"] for row in release.pictures]
    keys = [names[0], Path(names[1]).name, Path(names[2]).stem]
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / f"v.{suffix}"
    if suffix == "npz":
        np.savez(path, keys=np.array(keys), vectors=vectors)
    else:
        pl.DataFrame({"key": keys, "vector": vectors.tolist()}).write_parquet(path)
    options = {"embeddings": str(path), "embedding_width": 4}
    samples, funnel = read(release, **options)
    found = samples["e-L"].modalities
    assert [found[stream].values.tolist() for stream in STREAMS[:3]] == [[row] for row in vectors.tolist()]
    assert funnel.counts["picture without a vector, view left out"] == 1
    modalities, _ = get_source("embed").describe(release.folder, get_source("embed").options(**options))
    assert [(m.kind, m.features) for m in modalities[:4]] == [("patches", 4)] * 4


def test_vectors_that_do_not_fit_are_one_sentence(release: Release, tmp_path: Path) -> None:
    release.exam("w", "e", sides="L")
    path = tmp_path / "v.npz"
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"keys": ["a"], "vectors": np.zeros((1, 5), np.float32)},
            r"vectors have 5 numbers, not 4 .*embedding_width = 5",
        ),
        ({"keys": ["a", "a"], "vectors": np.zeros((2, 4), np.float32)}, "a key is there twice"),
        ({"keys": ["a"], "vectors": np.zeros((2, 4), np.float32)}, r"of shape \(2, 4\) for 1 keys"),
        ({"keys": ["a"], "vector": np.zeros((1, 4), np.float32)}, "the array 'vectors' is missing .*'vector'"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=message):
            read(release, embeddings=str(path), embedding_width=4)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="the vectors cannot be read"):
        read(release, embeddings=str(path), embedding_width=4)
    with pytest.raises(DataError, match=r"there are no such vectors \[.*absent.parquet\]"):
        read(release, embeddings=str(tmp_path / "absent.parquet"), embedding_width=4)


def test_tables_that_cannot_be_used_are_one_sentence(release: Release, tmp_path: Path) -> None:
    source = get_source("embed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the table 'EMBED_OpenData_metadata' is missing .*EMBED open data"):
        source.describe(tmp_path / "empty", source.options())
    release.exam("w", "e", sides="L", path_severity="severe")
    with pytest.raises(DataError, match=r"'severe' in column 'path_severity' is no number \[.*clinical.csv"):
        read(release)
    release.findings[-1]["path_severity"] = None
    release.findings[-1]["pdate_anon"] = "01/02/2013"
    with pytest.raises(DataError, match=r"'01/02/2013' in column 'pdate_anon' is no time"):
        read(release)
    release.findings[-1]["pdate_anon"] = None
    release.picture("other", "e", "R", "ffdm_cc")
    with pytest.raises(DataError, match="exam e belongs to two persons, w and other"):
        read(release)
    for row in release.pictures:
        del row["ViewPosition"]
    with pytest.raises(DataError, match=r"the column 'ViewPosition' is missing \[.*metadata.csv"):
        read(release)
    release.pictures = []
    release.exam("v", "f", sides="L")
    with pytest.raises(DataError, match=r"there is no folder of pictures \[nowhere\]"):
        read(release, pictures="nowhere")


def test_a_store_is_prepared_and_pictures_without_reports_can_be_scored(release: Release, tmp_path: Path) -> None:
    for i in range(60):
        release.exam(f"w{i}", f"e{i}", sides="L", asses="NBS"[i % 3], tissueden=i % 4 + 1)
        cancer = {"bside": "L", "pdate_anon": after(FOUR_YEARS), "path_severity": 0} if i % 2 else {}
        release.finding(f"w{i}", f"f{i}", day=after(2000), **cancer)
    store = prepare("embed", release.write(), tmp_path / "store", options={"size": [8, 6]})
    assert len(store) == 60
    assert sorted(store.tasks) == ["birads", "density", "risk"]
    release.folder = tmp_path / "new"
    unread = Release(tmp_path / "unread")
    unread.exam("w", "e")
    raw = unread.write(clinical=False)
    store = prepare("embed", raw, tmp_path / "scored", options={"size": [8, 6]}, require_labels=False)
    assert len(store) == 2
    assert "clinical" not in store.modalities


def test_several_processes_read_the_same_in_the_same_order(release: Release) -> None:
    for i in range(9):
        release.exam(f"w{i}", f"e{i}", sides="LR"[i % 2])
        (release.folder / "images" / f"e{i}_{'LR'[i % 2]}_ffdm_cc_{4 * i}.png").unlink() if i % 4 == 1 else None
    (one, alone), (many, together) = read(release), read(release, workers=2)
    assert list(one) == list(many) == [f"e{i}-{'LR'[i % 2]}" for i in range(9)]
    for name, sample in one.items():
        assert sample.modalities.keys() == many[name].modalities.keys()
        for modality, part in sample.modalities.items():
            np.testing.assert_array_equal(part.values, many[name].modalities[modality].values)
    assert alone.counts == together.counts
    assert alone.counts["picture file is not there, view left out"] == 2
    (release.folder / "images" / "e3_R_cview_cc_14.png").write_bytes(b"no picture")
    messages = []
    for workers in (1, 2):
        with pytest.raises(
            DataError, match=r"the picture cannot be read .*e3_R_cview_cc_14.png\]\. Export it"
        ) as caught:
            read(release, workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
