"""ADNI: invented people at every boundary of the rules, in tables of the real schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources._adni_files import find
from flame_moe.data.sources.adni import AdniOptions, describe, read
from flame_moe.data.work import Work
from flame_moe.errors import DataError, RecipeError
from tests.example_adni import REGIONS, cohort, day, nifti, write

BASE = "2010-06-15"
BIOMARKERS = "UPENNBIOMK_ROCHE_ELECSYS"
SMALL = {"volume": [8, 8, 8], "block": 4}


def dx(rid: int = 2, when: str = BASE, diagnosis: str = "1", **cells: str) -> dict[str, str]:
    return {"RID": str(rid), "VISCODE2": "bl", "EXAMDATE": when, "DIAGNOSIS": diagnosis} | cells


def demog(rid: int = 2, when: str = BASE, **cells: str) -> dict[str, str]:
    usual = {"PTGENDER": "2", "PTDOBYY": "1940", "PTDOBMM": "6", "PTEDUCAT": "16"}
    return {"RID": str(rid), "VISCODE2": "sc", "VISDATE": when} | usual | cells


def scan(
    rid: int = 2, when: str = BASE, size: str = "1000", qc: str = "Pass", stamp: str = "2019-01-01"
) -> dict[str, str]:
    key = {"RID": str(rid), "EXAMDATE": when, "OVERALLQC": qc, "update_stamp": stamp}
    return key | dict.fromkeys(REGIONS, size)


def load(folder: Path, **options: Any) -> tuple[dict[str, Sample], Funnel]:
    funnel = Funnel()
    found = read(folder, AdniOptions.parse(options, where="test"), funnel, Work(folder / ".steps"))
    return {sample.id: sample for sample in found}, funnel


def one(folder: Path, **options: Any) -> Sample:
    samples, _ = load(folder, **options)
    (sample,) = samples.values()
    return sample


def cells(sample: Sample, modality: str, folder: Path, **options: Any) -> dict[str, float]:
    """Channel -> value of what is observed."""
    modalities, _ = describe(folder, AdniOptions.parse(options, where="test"))
    channels = next(m.channels for m in modalities if m.name == modality)
    part = sample.modalities[modality]
    assert part.observed is not None
    return {c: float(v) for c, v, o in zip(channels, part.values[0], part.observed[0], strict=True) if o}


def sizes(sample: Sample) -> float | None:
    part = sample.modalities.get("freesurfer")
    return None if part is None else float(part.values[0, 0])


def test_a_whole_release_becomes_a_store_with_six_modalities(tmp_path: Path) -> None:
    store = prepare("adni", cohort(tmp_path), tmp_path / "store", options=SMALL)
    assert list(store.modalities) == ["mri", "freesurfer", "pet", "genomic", "biospecimen", "clinical"]
    assert store.modalities["mri"].features == 64
    assert len(store) == 60
    labels = store.target("diag", store.indices("diag"))[:, 0]
    assert [int((labels == c).sum()) for c in range(3)] == [20, 20, 20]
    assert all(0 < store.present(name).mean() < 1 for name in store.modalities)
    assert set(store.lengths("mri", store.indices(modalities=["mri"]))) == {8}
    assert "DXSUM_12Mar2024.csv" in store.manifest["inputs"]
    assert any(name.endswith("_MRI.nii.gz") for name in store.manifest["inputs"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"DIAGNOSIS": "1"}, 0.0),
        ({"DIAGNOSIS": "2.0"}, 1.0),
        ({"DIAGNOSIS": "3"}, 2.0),
        *(({"DIAGNOSIS": "", "DXCHANGE": c}, v) for c, v in zip("123456789", (0, 1, 2, 1, 2, 2, 0, 1, 0), strict=True)),
        *(({"DIAGNOSIS": "-4", "DXCHANGE": "", "DXCURREN": c}, v) for c, v in zip("123", (0, 1, 2), strict=True)),
        ({"DIAGNOSIS": "2", "DXCHANGE": "1"}, 1.0),
        ({"DIAGNOSIS": ""}, None),
        ({"DIAGNOSIS": "-4"}, None),
    ],
)
def test_every_phase_says_its_diagnosis_in_codes_of_its_own(
    tmp_path: Path, row: dict[str, str], expected: float | None
) -> None:
    write(tmp_path, "DXSUM", [dx() | row])
    write(tmp_path, "PTDEMOG", [demog()])
    targets = one(tmp_path).targets
    assert (float(targets["diag"][0]) if targets else None) == expected


def test_the_first_or_the_last_diagnosis_is_predicted(tmp_path: Path) -> None:
    undiagnosed = dx(when="2010-01-01", diagnosis="", VISCODE2="sc")
    write(tmp_path, "DXSUM", [dx(when="2012-06-15", diagnosis="3", VISCODE2="m24"), dx(), undiagnosed])
    write(tmp_path, "PTDEMOG", [demog()])
    first, last = one(tmp_path), one(tmp_path, visit="last")
    assert (first.targets["diag"][0], last.targets["diag"][0]) == (0, 2)
    ages = [cells(s, "clinical", tmp_path)["age"] for s in (first, last)]
    assert ages == pytest.approx([70.0, 72.0], abs=0.01)


def test_of_two_diagnoses_on_one_day_the_one_changed_last_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        "DXSUM",
        [dx(diagnosis="2", update_stamp="2021-01-01"), dx(diagnosis="1", update_stamp="2019-01-01")],
    )
    write(tmp_path, "PTDEMOG", [demog()])
    samples, funnel = load(tmp_path)
    assert samples["011_S_0002"].targets["diag"][0] == 1
    assert funnel.counts["two diagnoses on one day, the one changed last is taken"] == 1


@pytest.mark.parametrize(
    ("scans", "expected"),
    [
        ([(0, "1")], 1.0),
        ([(180, "1")], 1.0),
        ([(-180, "1")], 1.0),
        ([(181, "1")], None),
        ([(-181, "1")], None),
        ([(30, "1"), (-20, "2"), (100, "3")], 2.0),
        ([(30, "1"), (-30, "2")], 2.0),
        ([(-30, "2"), (30, "1")], 2.0),
    ],
)
def test_a_scan_is_the_nearest_within_the_window_and_of_two_as_near_the_earlier(
    tmp_path: Path, scans: list[tuple[int, str]], expected: float | None
) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "PTDEMOG", [demog()])
    write(tmp_path, "UCSFFSX7", [scan(when=day(BASE, away), size=size) for away, size in scans])
    assert sizes(one(tmp_path)) == expected
    narrow = sizes(one(tmp_path, window=0))
    assert narrow == (expected if scans[0][0] == 0 else None)


def test_of_two_rows_of_one_scan_the_one_changed_last_counts(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    rows = [scan(size="1", stamp="2019-05-01 00:00:00.0"), scan(size="2", stamp="2020-05-01 00:00:00.0")]
    for order in (rows, rows[::-1]):
        write(tmp_path, "UCSFFSX7", order)
        assert sizes(one(tmp_path)) == 2.0


@pytest.mark.parametrize(
    ("qc", "kept"),
    [("Pass", ("pass", "partial")), ("Partial", ("partial",)), ("Fail", ()), ("Hippocampus Only", ()), ("", ())],
)
def test_a_scan_that_failed_quality_control_is_left_out_and_counted(
    tmp_path: Path, qc: str, kept: tuple[str, ...]
) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "PTDEMOG", [demog()])
    write(tmp_path, "UCSFFSX7", [scan(qc=qc), scan(when=day(BASE, 90), size="7")])
    for quality in ("pass", "partial"):
        samples, funnel = load(tmp_path, quality=quality)
        assert sizes(samples["011_S_0002"]) == (1000.0 if quality in kept else 7.0)
        said = f"UCSFFSX7: quality control says {qc.lower() or 'none'}, scan left out"
        assert funnel.counts.get(said, 0) == (quality not in kept)


def test_only_volumes_and_thicknesses_are_taken_from_freesurfer(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "UCSFFSX7", [scan() | {"ST24TS": "5", "ST24SA": "6", "ST29SV": "-4"}])
    (modality,), _ = describe(tmp_path, AdniOptions())
    assert modality.channels == REGIONS
    assert dict(zip(modality.channels, modality.units, strict=True))["ST24TA"] == "mm"
    assert "ST29SV" not in cells(one(tmp_path), "freesurfer", tmp_path)


@pytest.mark.parametrize(
    ("vital", "channel", "expected", "said"),
    [
        ({"VSWEIGHT": "160", "VSWTUNIT": "1"}, "weight", 72.5747792, "VSWEIGHT: converted to kg"),
        ({"VSWEIGHT": "72.5", "VSWTUNIT": "2"}, "weight", 72.5, None),
        ({"VSWEIGHT": "72.5"}, "weight", None, "VSWEIGHT: value without a unit, set to missing"),
        ({"VSHEIGHT": "65", "VSHTUNIT": "1"}, "height", 165.1, "VSHEIGHT: converted to cm"),
        ({"VSHEIGHT": "165", "VSHTUNIT": "2"}, "height", 165.0, None),
        ({"VSHEIGHT": "-4", "VSHTUNIT": "-4"}, "height", None, None),
        (
            {"VSHEIGHT": "165", "VSHTUNIT": "1"},
            "height",
            None,
            "VSHEIGHT: outside of 110 to 230 cm, set to missing",
        ),
        ({"VSTEMP": "98.6", "VSTMPUNT": "1"}, "temperature", 37.0, "VSTEMP: converted to C"),
        ({"VSTEMP": "36.5", "VSTMPUNT": "2"}, "temperature", 36.5, None),
        ({"VSPULSE": "-1"}, "pulse", None, None),
        ({"VSPULSE": "6O"}, "pulse", None, "VSPULSE: cell that is no number, set to missing"),
        ({"VSBPSYS": "128"}, "systolic_pressure", 128.0, None),
    ],
)
def test_vital_signs_are_brought_to_one_unit_and_what_cannot_be_is_counted(
    tmp_path: Path, vital: dict[str, str], channel: str, expected: float | None, said: str | None
) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "PTDEMOG", [demog()])
    write(tmp_path, "VITALS", [{"RID": "2", "VISDATE": BASE} | vital])
    samples, funnel = load(tmp_path)
    found = cells(samples["011_S_0002"], "clinical", tmp_path).get(channel)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-5))
    assert [text for text in funnel.counts if text.startswith("VS")] == ([said] if said else [])


def test_each_vital_sign_is_of_the_nearest_visit_that_has_it(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    screening = {"VSHEIGHT": "170", "VSHTUNIT": "2", "VSPULSE": "60"}
    write(
        tmp_path,
        "VITALS",
        [
            {"RID": "2", "VISDATE": day(BASE, -20)} | screening,
            {"RID": "2", "VISDATE": BASE, "VSHEIGHT": "-4", "VSHTUNIT": "-4", "VSPULSE": "70"},
        ],
    )
    found = cells(one(tmp_path), "clinical", tmp_path)
    assert (found["height"], found["pulse"]) == (170.0, 70.0)


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        ("831.2", 831.2, None),
        (">1700", 1700.0, "ABETA42: reported as >1700, taken at the limit"),
        ("<200", 200.0, "ABETA42: reported as <200, taken at the limit"),
        ("> 1700", 1700.0, "ABETA42: reported as >1700, taken at the limit"),
        ("failed", None, "ABETA42: cell that is no number, set to missing"),
        ("-4", None, None),
    ],
)
def test_an_assay_beyond_its_range_is_taken_at_the_limit(
    tmp_path: Path, text: str, expected: float | None, said: str | None
) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, BIOMARKERS, [{"RID": "2", "EXAMDATE": BASE, "ABETA42": text, "TAU": "210"}])
    samples, funnel = load(tmp_path)
    found = cells(samples["011_S_0002"], "biospecimen", tmp_path)
    assert found.get("abeta42") == (None if expected is None else pytest.approx(expected))
    assert found["tau"] == 210.0
    assert [text for text in funnel.counts if text.startswith("ABETA")] == ([said] if said else [])


def test_all_proteins_are_of_one_sample_of_fluid(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    rows = [{"RID": "2", "EXAMDATE": BASE, "TAU": "210"}, {"RID": "2", "EXAMDATE": day(BASE, 30), "PTAU": "20"}]
    write(tmp_path, BIOMARKERS, rows)
    assert cells(one(tmp_path), "biospecimen", tmp_path) == {"tau": 210.0}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"GENOTYPE": "3/4"}], [0, 1, 1]),
        ([{"APGEN1": "4", "APGEN2": "4"}], [0, 0, 2]),
        ([{"APGEN1": "2.0", "APGEN2": "3.0"}, {"GENOTYPE": "2/3"}], [1, 1, 0]),
        ([{"GENOTYPE": "3/4"}, {"GENOTYPE": "3/3"}], None),
        ([{"GENOTYPE": "-4"}], None),
    ],
)
def test_a_genotype_becomes_numbers_of_alleles_whenever_it_was_typed(
    tmp_path: Path, rows: list[dict[str, str]], expected: list[int] | None
) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "PTDEMOG", [demog()])
    write(tmp_path, "APOERES", [{"RID": "2", "VISCODE2": "m60"} | row for row in rows])
    sample = one(tmp_path)
    found = sample.modalities.get("biospecimen")
    assert (None if found is None else found.values[0, :3].tolist()) == expected


@pytest.mark.parametrize(
    ("race", "expected"), [("5", "white"), ("4", "black"), ("4|5", "more_than_one"), ("7", None), ("9", None)]
)
def test_codes_become_one_column_each_and_unknown_is_missing(tmp_path: Path, race: str, expected: str | None) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "PTDEMOG", [demog(PTRACCAT=race)])
    samples, funnel = load(tmp_path)
    found = {k: v for k, v in cells(samples["011_S_0002"], "clinical", tmp_path).items() if k.startswith("race_")}
    assert found == ({} if expected is None else {k: float(k == f"race_{expected}") for k in found})
    assert len(found) == (0 if expected is None else 6)
    assert funnel.counts.get("PTRACCAT: code '9' is not in the dictionary, set to missing", 0) == (race == "9")


def test_standing_facts_may_be_old_but_not_from_after_the_window(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    early, late = day(BASE, -2000), day(BASE, 181)
    write(tmp_path, "PTDEMOG", [demog(when=early)])
    row = {"RID": "2", "MH4CARD": "1"}
    write(tmp_path, "MEDHIST", [row | {"VISDATE": early}])
    assert cells(one(tmp_path), "clinical", tmp_path)["history_cardiovascular"] == 1.0
    write(tmp_path, "MEDHIST", [row | {"VISDATE": late}])
    assert "history_cardiovascular" not in cells(one(tmp_path), "clinical", tmp_path)


def test_medicines_are_counted_by_class_without_those_against_dementia(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    names = ("Lipitor", "lisinopril 10 mg", "Aricept", "Namenda", "LIPITOR", "-4")
    rows = [{"RID": "2", "VISDATE": BASE, "CMMED": name} for name in names]
    rows.append({"RID": "2", "VISDATE": day(BASE, 400), "CMMED": "Zoloft"})
    write(tmp_path, "RECCMEDS", rows)
    samples, funnel = load(tmp_path)
    found = cells(samples["011_S_0002"], "clinical", tmp_path)
    assert found["medicines"] == 2.0
    assert (found["takes_statin"], found["takes_blood_pressure"], found["takes_antidepressant"]) == (1.0, 1.0, 0.0)
    assert funnel.counts["RECCMEDS: drug against dementia, left out"] == 2


def test_a_row_without_a_date_is_placed_by_its_visit_code(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx(), dx(when="2011-06-20", VISCODE2="m12")])
    vital = {"RID": "2", "VSPULSE": "61"}
    for code, expected in (("bl", 61.0), ("m06", None), ("m12", None), ("uns1", None)):
        write(tmp_path, "PTDEMOG", [demog()])
        write(tmp_path, "VITALS", [vital | {"VISCODE2": code}])
        assert cells(one(tmp_path, window=90), "clinical", tmp_path).get("pulse") == expected, code
    _, funnel = load(tmp_path)
    assert funnel.counts["VITALS: row without a date, left out"] == 1
    write(tmp_path, "VITALS", [vital | {"VISCODE2": "m06"}])
    assert cells(one(tmp_path, window=200), "clinical", tmp_path)["pulse"] == 61.0


def test_a_diagnosis_without_a_date_takes_it_from_the_registry(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx(when=""), dx(rid=3, when="", VISCODE2="bl")])
    write(tmp_path, "PTDEMOG", [demog(), demog(rid=3, when="", VISCODE2="")])
    write(tmp_path, "REGISTRY", [{"RID": "2", "VISCODE2": "bl", "EXAMDATE": BASE}])
    samples, funnel = load(tmp_path)
    assert list(samples) == ["011_S_0002"]
    assert [step.after for step in funnel.steps] == [2, 1, 1]


def test_volumes_are_found_by_an_index_and_cut_into_blocks(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    write(tmp_path, "DXSUM", [dx(), dx(rid=3)])
    write(tmp_path, "PTDEMOG", [demog(), demog(rid=3)])
    nifti(tmp_path / "a.nii.gz", 1)
    lines = ["subject,date,modality,path", f"011_S_0002,{BASE},MRI,a.nii.gz", f"011_S_0003,{BASE},MRI,gone.nii.gz"]
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    samples, funnel = load(tmp_path, **SMALL)
    assert samples["011_S_0002"].modalities["mri"].values.shape == (8, 64)
    assert "mri" not in samples["011_S_0003"].modalities
    assert funnel.counts["mri: volume listed but its file is not there, left out"] == 1
    tables, _ = describe(tmp_path, AdniOptions(imaging="tables"))
    assert [m.name for m in tables] == ["clinical"]


def test_an_index_without_a_single_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    (tmp_path / "images.csv").write_text(f"subject,date,modality,path\n011_S_0002,{BASE},PET,gone.nii\n")
    with pytest.raises(DataError, match="none of the 1 pet volumes listed is there"):
        load(tmp_path)


def test_volumes_are_found_in_the_folders_of_the_site(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    write(tmp_path, "DXSUM", [dx()])
    folder = tmp_path / "ADNI" / "011_S_0002" / "MPR__GradWarp"
    near, far = folder / f"{BASE}_08_13_47.0" / "I1", folder / "2010-10-01_08_13_47.0" / "I2"
    nifti(near / "ADNI_011_S_0002_MR_MPR_Br_1_S1_I1.nii", 1)
    nifti(far / "ADNI_011_S_0002_MR_MPR_Br_1_S2_I2.nii", 2)
    nifti(far.with_name("I3") / "ADNI_011_S_0002_PT_Coreg_S3_I3.nii", 3)
    modalities, _ = describe(tmp_path, AdniOptions())
    assert [m.name for m in modalities] == ["mri", "pet"]
    sample = one(tmp_path, **SMALL)
    (near / "ADNI_011_S_0002_MR_MPR_Br_1_S1_I1.nii").unlink()
    other = one(tmp_path, **SMALL)
    assert not np.array_equal(sample.modalities["mri"].values, other.modalities["mri"].values)
    assert np.array_equal(sample.modalities["pet"].values, other.modalities["pet"].values)


def test_genes_are_read_without_the_columns_of_plink_that_say_the_diagnosis(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    (tmp_path / "genomic_adni.csv").write_text("FID,IID,SEX,PHENOTYPE,rs1_A,rs2_G\n1,011_S_0002,1,2,0,\n")
    (modality,), _ = describe(tmp_path, AdniOptions())
    assert modality.channels == ("rs1_A", "rs2_G")
    assert cells(one(tmp_path), "genomic", tmp_path) == {"rs1_A": 0.0}


def test_people_whose_diagnosis_changes_or_who_lack_something_are_left_out_on_request(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx(), dx(when="2011-06-15", diagnosis="2", VISCODE2="m12"), dx(rid=3), dx(rid=4)])
    write(tmp_path, "PTDEMOG", [demog(), demog(rid=3), demog(rid=4)])
    write(tmp_path, "UCSFFSX7", [scan(), scan(rid=3)])
    assert list(load(tmp_path)[0]) == ["011_S_0002", "011_S_0003", "011_S_0004"]
    assert list(load(tmp_path, stable=True)[0]) == ["011_S_0003", "011_S_0004"]
    samples, funnel = load(tmp_path, stable=True, complete=True)
    assert list(samples) == ["011_S_0003"]
    assert [step.after for step in funnel.steps] == [3, 3, 2, 2, 1]


def test_what_comes_after_the_window_and_what_says_the_diagnosis_changes_no_input(tmp_path: Path) -> None:
    def build(folder: Path, *, later: bool) -> Sample:
        folder.mkdir()
        code, after = ("3", day(BASE, 181)) if later else ("1", day(BASE, 181))
        write(folder, "DXSUM", [dx(diagnosis=code, DXMDUE=code, DXDDUE=code)])
        write(folder, "PTDEMOG", [demog(PTCOGBEG="2004" if later else "-4", PTADDX="2008" if later else "-4")])
        rows = [scan()] + ([scan(when=after, size="1")] if later else [])
        write(folder, "UCSFFSX7", rows)
        vitals = [{"RID": "2", "VISDATE": BASE, "VSPULSE": "60"}]
        vitals += [{"RID": "2", "VISDATE": after, "VSPULSE": "99", "VSBPSYS": "180"}] if later else []
        write(folder, "VITALS", vitals)
        medicines = [{"RID": "2", "VISDATE": BASE, "CMMED": name} for name in ("Lipitor", *(("Aricept",) * later))]
        write(folder, "RECCMEDS", medicines)
        write(folder, "MMSE", [{"RID": "2", "VISDATE": BASE, "MMSCORE": "18" if later else "30"}])
        return one(folder)

    one_way, other_way = build(tmp_path / "a", later=False), build(tmp_path / "b", later=True)
    assert one_way.targets["diag"][0] != other_way.targets["diag"][0]
    assert one_way.modalities.keys() == other_way.modalities.keys() == {"freesurfer", "clinical"}
    for name, part in one_way.modalities.items():
        assert np.array_equal(part.values, other_way.modalities[name].values)


def test_tests_that_define_the_diagnosis_are_inputs_only_on_request(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "MMSE", [{"RID": "2", "VISDATE": BASE, "MMSCORE": "27"}])
    write(tmp_path, "CDR", [{"RID": "2", "VISDATE": BASE, "CDGLOBAL": "0.5"}])
    write(tmp_path, "PTDEMOG", [demog()])
    assert not {"mmse", "cdr_global"} & set(describe(tmp_path, AdniOptions())[0][0].channels)
    found = cells(one(tmp_path, cognition=True), "clinical", tmp_path, cognition=True)
    assert (found["mmse"], found["cdr_global"]) == (27.0, 0.5)
    assert "do not report" in describe(tmp_path, AdniOptions(cognition=True))[1][0].caveat


def test_an_absent_table_is_told_with_what_is_lost(tmp_path: Path) -> None:
    write(tmp_path, "DXSUM", [dx()])
    write(tmp_path, "PTDEMOG", [demog()])
    modalities, tasks = describe(tmp_path, AdniOptions())
    assert [m.name for m in modalities] == list(tasks[0].modalities) == ["clinical"]
    _, funnel = load(tmp_path)
    assert funnel.counts["modality biospecimen left out: no files"] == 1
    assert funnel.counts["table VITALS absent: its part of clinical is missing"] == 1


def test_tables_are_known_by_the_names_of_the_site(tmp_path: Path) -> None:
    names = {
        "DXSUM_PDXCONV_ADNIALL.csv": "DXSUM",
        "All_Subjects_VITALS_15Oct2024.csv": "VITALS",
        "UCSFFSX7_08_17_22.csv.gz": "UCSFFSX7",
        "UPENNBIOMK9_04_19_17.csv": "UPENNBIOMK",
        "genomic_merged.parquet": "genomic",
        "CDR_notes.csv": None,
        "ADNIMERGE.csv": None,
    }
    for name in names:
        (tmp_path / name).write_text("RID\n")
    assert {path.name: table for table, path in find(tmp_path).items()} == {n: t for n, t in names.items() if t}
    (tmp_path / "DXSUM_12Mar2024.csv").write_text("RID\n")
    with pytest.raises(DataError, match="the table DXSUM is there twice"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (dx(when="15.06.2010"), "'15.06.2010' is no date .*line 3"),
        (dx() | {"RID": "x7", "PTID": "y"}, "'x7' is no RID .*line 3"),
    ],
)
def test_a_wrong_cell_is_named_with_its_line(tmp_path: Path, row: dict[str, str], said: str) -> None:
    path = write(tmp_path, "DXSUM", [dx(rid=1)])
    rows = [dx(rid=1), row] if row["RID"] != "x7" else [dx(rid=1), row | {"RID": "7"}]
    write(tmp_path, "DXSUM", rows)
    if row["RID"] == "x7":
        path.write_text(path.read_text().replace('"y","7"', '"y","x7"'))
    write(tmp_path, "PTDEMOG", [demog()])
    with pytest.raises(DataError, match=said):
        load(tmp_path)


def test_what_is_missing_altogether_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the table DXSUM is missing"):
        describe(tmp_path, AdniOptions())
    write(tmp_path, "DXSUM", [dx()])
    with pytest.raises(DataError, match="there is no table but the diagnosis"):
        describe(tmp_path, AdniOptions())
    (tmp_path / "UCSFFSX7_1.csv").write_text("RID,ST24SA\n2,5\n")
    with pytest.raises(DataError, match="there is no column ST"):
        describe(tmp_path, AdniOptions())
    with pytest.raises(RecipeError, match="not a multiple of block"):
        AdniOptions.parse({"volume": [64, 64, 65]}, where="test")
