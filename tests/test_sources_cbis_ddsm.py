"""CBIS-DDSM: findings of a breast per view, its pathology, and women who are in two tables."""

from __future__ import annotations

import csv
import gzip
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources import get_source
from flame_moe.data.work import Work
from flame_moe.errors import DataError
from tests.test_imaging import dicom

COMMON = ("left or right breast", "image view", "abnormality id", "abnormality type")
TAIL = ("assessment", "pathology", "subtlety", "image file path", "cropped image file path")
COLUMNS = {
    "mass": ("patient_id", "breast_density", *COMMON, "mass shape", "mass margins", *TAIL),
    "calc": ("patient_id", "breast density", *COMMON, "calc type", "calc distribution", *TAIL),
}
MASS = {
    "patient_id": "P_1",
    "breast_density": 3,
    "left or right breast": "LEFT",
    "image view": "CC",
    "abnormality id": 1,
    "abnormality type": "mass",
    "mass shape": "OVAL-LYMPH_NODE",
    "mass margins": "NA",
    "assessment": 4,
    "pathology": "BENIGN",
    "subtlety": 3,
    "image file path": "Mass-Training_P_1_LEFT_CC/1.2/3.4/000000.dcm\n",
    "cropped image file path": "a/b/000001.dcm\r\n",
}
CALC = {k: v for k, v in MASS.items() if k not in ("breast_density", "mass shape", "mass margins")} | {
    "breast density": 3,
    "abnormality type": "calcification",
    "calc type": "PUNCTATE-LUCENT_CENTERED",
    "calc distribution": "CLUSTERED",
}


def write(folder: Path, kind: str, part: str, *rows: dict[str, Any]) -> Path:
    """A case table with line ends inside its cells, as published."""
    folder.mkdir(exist_ok=True)
    start = MASS if kind == "mass" else CALC
    path = folder / f"{kind}_case_description_{part}_set.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS[kind])
        writer.writeheader()
        writer.writerows(start | row for row in rows)
    return path


def read(raw: Path, **options: Any) -> tuple[dict[str, Sample], Funnel]:
    source, funnel = get_source("cbis_ddsm"), Funnel()
    samples = source.read(raw, source.options(**options), funnel, Work(raw / "steps"))
    return {sample.id: sample for sample in samples}, funnel


def cells(sample: Sample, modality: str) -> dict[str, float]:
    """Observed cells of a table by channel."""
    names = {m.name: m for m in MODALITIES}[modality].channels
    found = sample.modalities[modality]
    assert found.observed is not None
    return {name: float(v) for name, v, seen in zip(names, found.values[0], found.observed[0], strict=True) if seen}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A woman in the training table of masses and the test table of calcifications."""
    folder = tmp_path / "raw"
    write(
        folder,
        "mass",
        "train",
        {},
        {"abnormality id": 2, "mass shape": "IRREGULAR", "mass margins": "SPICULATED", "subtlety": 5, "assessment": 5},
        {"image view": "MLO", "mass shape": "NA", "subtlety": 0, "image file path": "Mass-Training_P_1_LEFT_MLO/1.dcm"},
        {"left or right breast": "RIGHT", "pathology": "MALIGNANT", "breast_density": 0, "assessment": 0},
    )
    write(folder, "calc", "test", {"pathology": "BENIGN_WITHOUT_CALLBACK", "assessment": 2}, {"patient_id": "P_2"})
    global MODALITIES
    MODALITIES, _ = get_source("cbis_ddsm").describe(folder, get_source("cbis_ddsm").options())
    return folder


def test_a_breast_holds_the_union_of_its_findings_per_view(raw: Path) -> None:
    samples, _ = read(raw)
    assert list(samples) == ["P_1-L", "P_1-R", "P_2-L"]
    left = samples["P_1-L"]
    assert set(left.modalities) == {"mass_cc", "mass_mlo", "calc_cc"}
    mass = cells(left, "mass_cc")
    words = {"shape oval", "shape lymph_node", "shape irregular", "margins spiculated"}
    assert {name for name, value in mass.items() if value == 1} == words
    assert (mass["findings"], mass["subtlety"]) == (2, 5)
    assert cells(left, "mass_mlo") == {"findings": 1}
    calc = cells(left, "calc_cc")
    assert {name for name, v in calc.items() if v == 1} - {"findings"} == {
        *("type punctate", "type lucent_center", "distribution clustered")
    }


def test_the_most_serious_finding_labels_the_breast(raw: Path) -> None:
    samples, funnel = read(raw)
    got = {name: {task: float(v[0]) for task, v in sample.targets.items()} for name, sample in samples.items()}
    assert got["P_1-L"] == {"risk": 0, "birads": 2, "density": 2}
    assert got["P_1-R"] == {"risk": 1, "birads": 1}
    assert got["P_2-L"] == {"risk": 0, "birads": 2, "density": 2}
    assert funnel.counts["density 0 is outside 1 to 4, set to missing"] == 1
    assert funnel.counts["subtlety 0 is outside 1 to 5, set to missing"] == 1


def test_a_woman_in_two_tables_is_one_subject_and_counted(raw: Path) -> None:
    samples, funnel = read(raw)
    assert [sample.subject for sample in samples.values()] == ["P_1", "P_1", "P_2"]
    assert funnel.counts["women in a training table and a test table, kept in one split"] == 1


def test_a_finding_can_be_the_sample(raw: Path) -> None:
    samples, funnel = read(raw, unit="finding")
    assert list(samples) == ["P_1-L-calc-1", "P_1-L-mass-1", "P_1-L-mass-2", "P_1-R-mass-1", "P_2-L-calc-1"]
    assert set(samples["P_1-L-mass-1"].modalities) == {"mass_cc", "mass_mlo"}
    assert funnel.steps[0].text == "findings described"


def test_nothing_of_the_outcome_is_a_feature(raw: Path) -> None:
    before, _ = read(raw)
    changed = {"pathology": "MALIGNANT", "assessment": 1, "breast_density": 1}
    write(
        raw,
        "mass",
        "train",
        changed,
        changed | {"abnormality id": 2, "mass shape": "IRREGULAR", "mass margins": "SPICULATED", "subtlety": 5},
        changed | {"image view": "MLO", "mass shape": "NA", "subtlety": 0},
    )
    after, _ = read(raw)
    for name, part in before["P_1-L"].modalities.items():
        other = after["P_1-L"].modalities[name]
        assert np.array_equal(part.values, other.values)
        assert np.array_equal(part.observed, other.observed)
    assert after["P_1-L"].targets["risk"] == 1


def test_a_missing_kind_is_left_out_and_new_findings_need_no_pathology(raw: Path, tmp_path: Path) -> None:
    (raw / "calc_case_description_test_set.csv").unlink()
    modalities, tasks = get_source("cbis_ddsm").describe(raw, get_source("cbis_ddsm").options())
    assert [m.name for m in modalities] == ["mass_cc", "mass_mlo"]
    assert all(task.modalities == ("mass_cc", "mass_mlo") for task in tasks)
    _, funnel = read(raw)
    assert funnel.counts["tables of calc absent: modalities calc_cc and calc_mlo left out"] == 1
    new = tmp_path / "new"
    write(new, "mass", "test", {"pathology": None, "assessment": None, "breast_density": None})
    assert len(prepare("cbis_ddsm", new, tmp_path / "s", require_labels=False)) == 1


def test_pictures_are_found_where_download_tools_put_them(raw: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    place = films / "Mass-Training_P_1_LEFT_CC" / "07-20-2016-DDSM" / "1.000000-full"
    place.mkdir(parents=True)
    dicom(place / "1-1.dcm", np.full((8, 6), 99, dtype=np.uint8))
    options = {"pictures": str(films), "size": [8, 6]}
    samples, funnel = read(raw, **options)
    assert set(samples["P_1-L"].modalities["picture_cc"].values.ravel().tolist()) == {99}
    assert "picture_mlo" not in samples["P_1-L"].modalities
    assert funnel.counts["picture file is not there, view left out"] == 1
    modalities, tasks = get_source("cbis_ddsm").describe(raw, get_source("cbis_ddsm").options(**options))
    assert [m.kind for m in modalities] == ["table"] * 4 + ["image"] * 2
    assert "picture_mlo" in tasks[0].modalities
    with pytest.raises(DataError, match=r"there is no folder of pictures \[nowhere\]"):
        read(raw, pictures="nowhere")


def test_tables_that_cannot_be_used_are_one_sentence(raw: Path, tmp_path: Path) -> None:
    source = get_source("cbis_ddsm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no table KIND_case_description_PART_set is there .*Cancer Imaging Archive"):
        source.describe(tmp_path / "empty", source.options())
    path = write(raw, "mass", "train", {"assessment": "four"})
    with pytest.raises(DataError, match=r"'four' in column 'assessment' is no whole number \[.*mass_case"):
        read(raw)
    path.write_text(path.read_text().replace("mass margins", "margin"))
    with pytest.raises(DataError, match=r"the column 'mass margins' is missing \[.*mass_case"):
        read(raw)
    path = write(raw, "mass", "train", {})
    path.write_text(path.read_text().replace("breast_density", "denseness"))
    with pytest.raises(DataError, match=r"the column 'breast density' is missing \[.*mass_case"):
        read(raw)


def test_counts_of_the_release_are_what_a_plain_reader_finds(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "cbis-ddsm-tables"
    breasts: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for path in folder.glob("*.csv.gz"):
        for row in csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode())):
            breasts[row["patient_id"], row["left or right breast"][0]].append(row)
    malignant = {"-".join(k) for k, rows in breasts.items() if any(r["pathology"] == "MALIGNANT" for r in rows)}
    samples, funnel = read(folder)
    assert {name for name, s in samples.items() if s.targets["risk"][0] == 1} == malignant
    assert set(samples) == {"-".join(key) for key in breasts}
    assert (len(samples), len(malignant)) == (1708, 761)
    assert len({sample.subject for sample in samples.values()}) == 1566
    assert funnel.counts == {
        "density 0 is outside 1 to 4, set to missing": 2,
        "density missing or different between findings, no label of density": 1,
        "subtlety 0 is outside 1 to 5, set to missing": 2,
        "women in a training table and a test table, kept in one split": 31,
    }
    classes = [sum(sample.targets["birads"][0] == c for sample in samples.values()) for c in range(3)]
    assert classes == [176, 341, 1191]
    store = prepare("cbis_ddsm", folder, tmp_path / "s")
    splits = dict[str, set[int]]()
    for i in range(len(store)):
        splits.setdefault(store.sample(i).subject, set()).add(int(store.splits[i]))
    assert all(len(found) == 1 for found in splits.values())
