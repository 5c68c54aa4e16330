"""OASIS: three classes of dementia, conversion from before it happens, and people who are in both tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources.oasis import OasisOptions, describe, read
from flame_moe.data.work import Work
from flame_moe.errors import DataError

CROSS = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay"
LONG = "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF"


def cross(folder: Path, *lines: str) -> None:
    (folder / "oasis_cross-sectional.csv").write_text("\n".join([CROSS, *lines]) + "\n")


def longitudinal(folder: Path, *lines: str) -> None:
    (folder / "oasis_longitudinal.csv").write_text("\n".join([LONG, *lines]) + "\n")


def visit(who: int, number: int, days: int, cdr: str, group: str, **other: str) -> str:
    rest = {"sex": "F", "age": "80", "educ": "12", "ses": "2", "mmse": "28", "etiv": "1400", "nwbv": "0.72"} | other
    tail = f"{rest['educ']},{rest['ses']},{rest['mmse']},{cdr},{rest['etiv']},{rest['nwbv']},1.2"
    return f"OAS2_{who:04d},OAS2_{who:04d}_MR{number},{group},{number},{days},{rest['sex']},R,{rest['age']},{tail}"


def load(folder: Path, **options: object) -> tuple[dict[str, Sample], Funnel]:
    funnel = Funnel()
    found = read(folder, OasisOptions.parse(options, where="test"), funnel, Work(folder / "steps"))
    return {sample.id: sample for sample in found}, funnel


def labels(samples: dict[str, Sample], task: str) -> dict[str, float | None]:
    return {name: float(s.targets[task][0]) if task in s.targets else None for name, s in samples.items()}


def test_the_real_tables_have_their_counts(shared_data: Path, tmp_path: Path) -> None:
    store = prepare("oasis", shared_data / "oasis", tmp_path / "store")
    everyone = np.arange(len(store))
    assert [step["after"] for step in store.manifest["funnel"]["steps"]] == [809, 693, 693]
    assert len(set(store.subjects(everyone))) == 416 + 150 - 116
    rated = store.target("diagnosis", everyone)[:, 0]
    assert [int((rated == c).sum()) for c in range(3)] == [276, 154, 62]
    assert int(np.isnan(rated).sum()) == 201
    future = store.target("converts", everyone)[:, 0]
    assert (int((future == 0).sum()), int((future == 1).sum())) == (116, 17)
    assert int(store.present("cognition").sum()) == 490
    assert store.manifest["counts"] == {
        "train": {"samples": 488, "subjects": 315},
        "val": {"samples": 64, "subjects": 45},
        "test": {"samples": 141, "subjects": 90},
    }
    assert all(share > 0 for split in ("train", "val", "test") for share in prevalence(store.manifest, split))


def prevalence(manifest: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]], split: str) -> list[float]:
    return [s for task in ("diagnosis", "converts") for s in manifest["labels"][task][split]["prevalence"].values()]


def test_one_table_alone_has_all_of_its_sessions(shared_data: Path, tmp_path: Path) -> None:
    samples, _ = load(shared_data / "oasis", sets=["cross_sectional"])
    assert len(samples) == 436
    assert len({s.subject for s in samples.values()}) == 416
    _, tasks = describe(shared_data / "oasis", OasisOptions(sets=("cross_sectional",)))
    assert [task.name for task in tasks] == ["diagnosis"]


def test_an_absent_table_is_counted_with_what_is_lost(tmp_path: Path) -> None:
    cross(tmp_path, "OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A")
    samples, funnel = load(tmp_path)
    assert len(samples) == 1
    assert funnel.counts["table oasis_longitudinal absent: task converts left out"] == 1


@pytest.mark.parametrize(("cdr", "expected"), [("0", 0.0), ("0.5", 1.0), ("1", 2.0), ("2", 2.0), ("", None)])
def test_the_dementia_rating_gives_the_class(tmp_path: Path, cdr: str, expected: float | None) -> None:
    cross(tmp_path, f"OAS1_0001_MR1,F,R,74,2,3,29,{cdr},1344,0.743,1.306,N/A")
    samples, _ = load(tmp_path)
    assert labels(samples, "diagnosis") == {"OAS1_0001_MR1": expected}


def test_conversion_is_predicted_from_sessions_before_it_only(tmp_path: Path) -> None:
    longitudinal(
        tmp_path,
        visit(1, 1, 0, "0", "Converted"),
        visit(1, 2, 300, "0", "Converted"),
        visit(1, 3, 700, "0.5", "Converted"),
        visit(1, 4, 900, "0", "Converted"),
        visit(2, 1, 0, "0", "Nondemented"),
        visit(2, 2, 400, "0", "Nondemented"),
        visit(3, 1, 0, "0.5", "Demented"),
        visit(3, 2, 500, "1", "Demented"),
        visit(4, 1, 0, "0.5", "Converted"),
        visit(4, 2, 500, "0", "Converted"),
    )
    samples, _ = load(tmp_path)
    found = labels(samples, "converts")
    assert found == {
        "OAS2_0001_MR1": 1.0,
        "OAS2_0001_MR2": 1.0,
        "OAS2_0001_MR3": None,
        "OAS2_0001_MR4": None,
        "OAS2_0002_MR1": 0.0,
        "OAS2_0002_MR2": None,
        "OAS2_0003_MR1": None,
        "OAS2_0003_MR2": None,
        "OAS2_0004_MR1": None,
        "OAS2_0004_MR2": None,
    }


TWIN = "OAS1_0007_MR1,F,R,80,2,2,28,0.5,1400,{nwbv},1.2,N/A"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (TWIN.format(nwbv="0.720"), False),
        (TWIN.format(nwbv="0.749"), False),
        (TWIN.format(nwbv="0.751"), True),
        (TWIN.format(nwbv="0.720").replace(",F,", ",M,"), True),
        (TWIN.format(nwbv="0.720").replace(",80,", ",81,"), True),
        (TWIN.format(nwbv="0.720").replace(",1400,", ",1401,"), True),
        (TWIN.format(nwbv="0.720").replace(",2,2,", ",3,2,"), True),
        (TWIN.format(nwbv="0.720").replace(",28,", ",27,"), True),
        (TWIN.format(nwbv="0.720").replace(",28,", ",,"), False),
    ],
)
def test_a_person_in_both_tables_is_kept_once_whatever_the_label(tmp_path: Path, line: str, kept: bool) -> None:
    longitudinal(tmp_path, visit(1, 1, 0, "0", "Nondemented"))
    cross(tmp_path, line, line.replace("_MR1", "_MR2").replace(",1400,", ",1300,"))
    samples, funnel = load(tmp_path)
    assert ("OAS1_0007_MR1" in samples) is kept
    assert ("OAS1_0007_MR2" in samples) is kept
    assert funnel.steps[1].dropped == (0 if kept else 2)


def test_years_of_education_become_the_levels_of_the_other_table(tmp_path: Path) -> None:
    years = ("6", "11", "12", "13", "15", "16", "17", "23")
    longitudinal(tmp_path, *(visit(i, 1, 0, "0", "Nondemented", educ=y) for i, y in enumerate(years)))
    samples, funnel = load(tmp_path)
    assert [s.modalities["demographics"].values[0, 2] for s in samples.values()] == [1, 1, 2, 3, 3, 4, 5, 5]
    assert funnel.counts["years of education turned into the five levels of OASIS-1"] == 8


def test_missing_cells_are_not_observed_and_a_missing_test_is_absent(tmp_path: Path) -> None:
    longitudinal(tmp_path, visit(1, 1, 0, "0", "Nondemented", ses="", mmse="N/A"))
    samples, _ = load(tmp_path)
    (sample,) = samples.values()
    flags = sample.modalities["demographics"].observed
    assert flags is not None
    assert flags.tolist() == [[True, True, True, False]]
    assert "cognition" not in sample.modalities


def test_labels_are_no_inputs_and_the_cognitive_test_is_asked_for(tmp_path: Path) -> None:
    lines = [visit(1, 1, 0, "0", "Nondemented"), visit(1, 2, 500, "0", "Nondemented")]
    longitudinal(tmp_path, *lines)
    before, _ = load(tmp_path)
    longitudinal(
        tmp_path, *(line.replace("Nondemented", "Converted") for line in lines[:1]), lines[1].replace(",0,14", ",1,14")
    )
    after, _ = load(tmp_path)
    assert labels(before, "converts") != labels(after, "converts")
    assert labels(before, "diagnosis") != labels(after, "diagnosis")
    for name, sample in before.items():
        for part, seen in sample.modalities.items():
            assert np.array_equal(seen.values, after[name].modalities[part].values)
    plain, asked = (describe(tmp_path, OasisOptions(cognition=c))[1][0] for c in (False, True))
    assert "cognition" not in plain.modalities
    assert "cognition" in asked.modalities


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("80,12", "eighty,12"), "'eighty' is no number .age."),
        (("80,12", "802,12"), "age is 802, outside of 18 to 110"),
        ((",F,", ",X,"), "'X' in column 'M/F' is neither M nor F"),
        (("Nondemented", "Healthy"), "unknown group 'Healthy'"),
    ],
)
def test_a_wrong_cell_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    longitudinal(tmp_path, visit(1, 1, 0, "0", "Nondemented"), visit(2, 1, 0, "0", "Nondemented").replace(*change))
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path)
    assert "line 3" in str(error.value)


def test_a_folder_without_tables_or_a_table_without_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no oasis_cross-sectional"):
        load(tmp_path)
    (tmp_path / "oasis_cross-sectional.csv").write_text(CROSS.replace("eTIV", "volume") + "\n")
    with pytest.raises(DataError, match="the column 'eTIV' is missing"):
        load(tmp_path)
