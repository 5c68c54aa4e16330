"""The MIMIC-IV source on the open demo: known counts, and the same labels and events as plain queries give."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.data.prepare import prepare
from flame_moe.data.sources import mimic_iv
from flame_moe.data.sources._mimic_phenotypes import PHENOTYPES
from flame_moe.data.sources._mimic_variables import LABS, VITALS
from flame_moe.data.store import Store
from tests.example_mimic import CREATININE, HR


@pytest.fixture(scope="module")
def demo(shared_data: Path) -> Path:
    return shared_data / "mimic-iv-demo"


@pytest.fixture(scope="module")
def store(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("mimic_iv", demo, tmp_path_factory.mktemp("mimic") / "store")


def table(demo: Path, name: str, columns: list[str] | None = None, **types: Any) -> pl.DataFrame:
    (path,) = demo.glob(f"*/{name}.csv.gz")
    found = pl.read_csv(path, columns=columns, infer_schema_length=5000, schema_overrides=types)
    times = [name for name in found.columns if name.endswith("time")]
    return found.with_columns(pl.col(times).cast(pl.String).str.to_datetime("%Y-%m-%d %H:%M:%S"))


def demo_stays(demo: Path) -> pl.DataFrame:
    """First stay per admission with its outcomes, by queries of their own."""
    stays = table(demo, "icu/icustays").sort("intime").group_by("hadm_id", maintain_order=True).first()
    admissions = table(demo, "hosp/admissions")
    return stays.join(admissions, on="hadm_id").with_columns(
        h=(pl.col("outtime") - pl.col("intime")).dt.total_seconds() / 3600,
        d=(pl.col("deathtime") - pl.col("intime")).dt.total_seconds() / 3600,
    )


def test_the_demo_has_its_known_cohort(store: Store) -> None:
    steps = [(s["before"], s["after"]) for s in store.manifest["funnel"]["steps"]]
    assert steps == [(140, 140), (140, 140), (140, 140), (140, 128), (128, 128), (128, 128)]
    assert len(set(store.subjects(np.arange(len(store))))) == 100
    assert {name: round(float(store.present(name).mean() * 128)) for name in store.modalities} == {
        "vitals": 128,
        "labs": 127,
        "static": 128,
        "triage": 60,
        "complaint": 71,
        "diagnoses": 54,
    }


def test_earlier_codes_and_triage_of_the_demo_are_those_of_plain_queries(demo: Path, store: Store) -> None:
    stays = demo_stays(demo)
    admissions = table(demo, "hosp/admissions").select("subject_id", past="hadm_id", end="dischtime")
    coded = table(demo, "hosp/diagnoses_icd", icd_code=pl.String).select(past="hadm_id")
    past = stays.join(admissions, on="subject_id").filter(pl.col("end") <= pl.col("admittime"))
    codes = past.join(coded, on="past")
    everyone = np.arange(len(store))
    assert codes["hadm_id"].n_unique() == 54
    assert len(store.gather("diagnoses", everyone).values) == codes.height
    visits = table(demo, "ed/edstays", hadm_id=pl.Int64).select("hadm_id", arrived="intime", visit="stay_id")
    visits = visits.join(stays, on="hadm_id").filter(pl.col("arrived") <= pl.col("intime"))
    triage = table(demo, "ed/triage").rename({"stay_id": "visit"})
    last = visits.sort("arrived").group_by("hadm_id").last().select("visit").join(triage, on="visit")
    found = store.gather("triage", everyone)
    assert found.observed is not None
    assert int(found.observed[:, -1].sum()) == last["acuity"].count()
    assert sorted(found.values[found.observed[:, 1], 1].tolist()) == sorted(last["heartrate"].drop_nulls().to_list())


def test_the_labels_of_the_demo_are_those_of_plain_queries(demo: Path, store: Store) -> None:
    stays = demo_stays(demo)
    long = stays.filter((pl.col("h") >= 48) & (pl.col("d").is_null() | (pl.col("d") >= 48)))
    everyone = np.arange(len(store))

    def counted(task: str) -> tuple[int, int]:
        target = store.target(task, everyone)[:, 0]
        return int((~np.isnan(target)).sum()), int(np.nansum(target))

    assert counted("ihm") == (long.height, long["hospital_expire_flag"].sum()) == (66, 11)
    assert counted("los") == (long.height, (long["h"] > 48 + 168).sum()) == (66, 13)
    survived = stays.filter(pl.col("hospital_expire_flag") == 0)
    admissions = table(demo, "hosp/admissions")
    again = 0
    for subject, own, end in survived.select("subject_id", "hadm_id", "dischtime").iter_rows():
        later = admissions.filter(pl.col("subject_id") == subject, pl.col("hadm_id") != own)["admittime"]
        again += any(end <= start <= end + timedelta(days=30) for start in later)
    assert counted("readmission") == (survived.height, again) == (113, 22)


def test_the_phenotypes_of_the_demo_agree_with_the_codes_of_clear_cases(demo: Path, store: Store) -> None:
    codes = table(demo, "hosp/diagnoses_icd", icd_code=pl.String)
    codes = codes.with_columns(pl.col("icd_code").str.strip_chars())
    target = store.target("pheno", np.arange(len(store)))
    assert not np.isnan(target).any()
    hadm = dict(table(demo, "icu/icustays").select("stay_id", "hadm_id").iter_rows())
    own = [hadm[int(id)] for id in store.ids(np.arange(len(store)))]
    clear = {
        "acute and unspecified renal failure": ("584", "N17"),
        "septicemia (except in labor)": ("038", "A41"),
        "essential hypertension": ("4019", "I10"),
    }
    for name, (nine, ten) in clear.items():
        hits = codes.filter(
            pl.col("icd_code").str.starts_with(nine) & (pl.col("icd_version") == 9)
            | pl.col("icd_code").str.starts_with(ten) & (pl.col("icd_version") == 10)
        )
        with_code = np.isin(own, hits["hadm_id"].to_numpy())
        column = target[:, [n for _, n in PHENOTYPES].index(name)]
        assert with_code.sum() >= 10
        assert (column[with_code] == 1).all()
    assert target.sum(axis=0).astype(int).tolist() == DEMO_PHENOTYPES


DEMO_PHENOTYPES = [39, 6, 11, 44, 31, 20, 33, 13, 30, 39, 20, 30, 65, 53, 48, 14, 32, 23, 14, 10, 17, 17, 36, 22, 22]


def test_the_events_of_the_demo_are_those_of_plain_queries(demo: Path, store: Store) -> None:
    stays = demo_stays(demo).select("stay_id", "intime", "outtime", subject="subject_id")
    end = pl.min_horizontal(pl.col("intime") + pl.duration(hours=48), pl.col("outtime"))
    charted = table(demo, "icu/chartevents", ["stay_id", "charttime", "itemid", "valuenum"], valuenum=pl.Float64)
    charted = charted.filter(pl.col("itemid") == HR, pl.col("valuenum").is_between(10, 300)).join(stays, on="stay_id")
    rates = charted.filter(pl.col("charttime").is_between(pl.col("intime"), end))
    vitals = store.gather("vitals", np.arange(len(store)))
    assert vitals.observed is not None
    mean = rates.group_by("stay_id", "charttime").agg(pl.col("valuenum").mean())
    assert int(vitals.observed[:, 0].sum()) == mean.height == 5567
    assert float(vitals.values[vitals.observed[:, 0], 0].sum()) == pytest.approx(mean["valuenum"].sum())
    known = pl.col("storetime") <= end
    measured = table(demo, "hosp/labevents", ["subject_id", "charttime", "storetime", "itemid"])
    measured = measured.join(stays, left_on="subject_id", right_on="subject")
    inside = pl.col("charttime").is_between(pl.col("intime"), end) & known
    creatinine = measured.filter(pl.col("itemid").is_in([CREATININE, 52024, 52546]), inside)
    labs = store.gather("labs", np.arange(len(store)))
    assert labs.observed is not None
    column = [c.name for c in LABS].index("creatinine")
    assert int(labs.observed[:, column].sum()) == creatinine.unique(["stay_id", "charttime"]).height == 411


def test_the_rows_outside_their_stay_are_counted(store: Store) -> None:
    counts = store.manifest["funnel"]["counts"]
    assert counts["vitals: measured before admission to the unit"] == 225
    assert counts["vitals: measured after the prediction time"] == 37_408
    assert counts["labs: measured in time, but recorded after the prediction time"] == 101
    assert counts["vitals: resp_rate outside its plausible range"] == 20


def test_the_items_are_what_the_release_calls_them(demo: Path) -> None:
    names = dict(table(demo, "icu/d_items").select("itemid", "label").iter_rows())
    first = {c.name: [names[i] for i in (*c.items, *c.arterial) if i in names] for c in VITALS}
    assert all(label.startswith("GCS") for name in first if name.startswith("gcs") for label in first[name])
    assert all("systolic" in label.lower() for label in first["sbp"])
    assert all("diastolic" in label.lower() for label in first["dbp"])
    assert all("mean" in label.lower() for label in first["mbp"])
    assert first["heart_rate"] == ["Heart Rate"]
    labs = {
        i: (label, fluid)
        for i, label, fluid in table(demo, "hosp/d_labitems").select("itemid", "label", "fluid").iter_rows()
    }
    words = {
        "white_cells": ("White Blood Cells", "WBC Count"),
        "platelets": ("Platelet Count",),
        "red_cells": ("Red Blood Cells",),
    }
    for c in LABS:
        for item in c.items:
            label, fluid = labs[item]
            expected = words.get(c.name, (c.name.replace("_", " "),))
            assert any(word.lower() in label.lower() for word in expected), (c.name, label)
            assert fluid == "Blood"


def test_reading_in_parts_changes_nothing(
    demo: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mimic_iv, "PART", 37)
    parts = prepare("mimic_iv", demo, tmp_path / "store")
    assert parts.manifest["files"] == store.manifest["files"]
    assert parts.manifest["funnel"] == store.manifest["funnel"]
