"""The cerebrospinal-fluid set: four groups, one label, and the experiment that takes groups away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources._alzheimer_csf_proteins import PROTEINS
from flame_moe.data.sources.alzheimer_csf import AlzheimerCsfOptions, describe, read, taken_away
from flame_moe.data.work import Work
from flame_moe.errors import DataError

GROUPS = ("proteins", "markers", "genetics", "clinical")


def write(folder: Path, rows: list[dict[str, str]], *, labels: bool = True) -> Path:
    """A table of the real columns; what a row does not say is 1."""
    columns = [*(["Class"] if labels else []), *PROTEINS, "age", "tau", "p_tau", "Ab_42", "male", "Genotype"]
    usual = {"Class": "Control", "Genotype": "E3E4"}
    lines = [",".join(columns), *(",".join(row.get(c, usual.get(c, "1")) for c in columns) for row in rows)]
    (folder / "alzheimer_csf.csv").write_text("\n".join(lines) + "\n")
    return folder


def load(folder: Path, **options: object) -> tuple[list[Sample], Funnel]:
    funnel = Funnel()
    chosen = AlzheimerCsfOptions.parse(options, where="test")
    return list(read(folder, chosen, funnel, Work(folder / "steps"))), funnel


def test_the_real_set_has_its_published_counts(shared_data: Path, tmp_path: Path) -> None:
    store = prepare("alzheimer_csf", shared_data / "alzheimer-csf", tmp_path / "store")
    everyone = store.indices("impaired")
    assert len(store) == len(everyone) == 333
    assert store.target("impaired", everyone).sum() == 91
    assert [store.modalities[name].features for name in GROUPS] == [124, 3, 3, 2]
    assert all(store.present(name).all() for name in GROUPS)
    alleles = store.gather("genetics", everyone).values
    assert alleles.sum(axis=1).tolist() == [2.0] * 333
    assert alleles.sum(axis=0).tolist() == [2 * 2 + 37 + 8, 2 * 167 + 106 + 37, 2 * 13 + 106 + 8]
    assert list(store.manifest["inputs"]) == ["alzheimer_csf.csv.gz"]


def test_a_genotype_becomes_numbers_of_alleles_or_one_column_each(tmp_path: Path) -> None:
    write(tmp_path, [{"Genotype": "E3E4"}, {"Genotype": "E2E2"}, {"Genotype": ""}])
    alleles, _ = load(tmp_path)
    assert [s.modalities["genetics"].values.tolist() for s in alleles[:2]] == [[[0, 1, 1]], [[2, 0, 0]]]
    assert "genetics" not in alleles[2].modalities
    single, _ = load(tmp_path, apoe="genotypes")
    assert single[0].modalities["genetics"].values.tolist() == [[0, 0, 0, 0, 1, 0]]


def test_an_empty_cell_is_not_observed_and_an_empty_group_is_absent(tmp_path: Path) -> None:
    samples, _ = load(write(tmp_path, [{"tau": "", "age": "", "male": ""}]))
    markers = samples[0].modalities["markers"]
    assert markers.observed is not None
    assert markers.observed.tolist() == [[False, True, True]]
    assert "clinical" not in samples[0].modalities


def test_the_label_is_no_input_and_is_not_needed(tmp_path: Path) -> None:
    kept, _ = load(write(tmp_path, [{"Class": "Impaired"}, {"Class": "Control"}]))
    assert [float(s.targets["impaired"][0]) for s in kept] == [1.0, 0.0]
    bare, funnel = load(write(tmp_path, [{}, {}], labels=False))
    assert [s.targets for s in bare] == [{}, {}]
    assert funnel.counts["no Class, no label"] == 2
    for one, other in zip(kept, bare, strict=True):
        assert all(np.array_equal(one.modalities[g].values, other.modalities[g].values) for g in GROUPS)
    modalities, _ = describe(None, AlzheimerCsfOptions())
    assert not {"Class"} & {channel for m in modalities for channel in m.channels}


def test_the_experiment_takes_away_about_its_share_and_never_everything() -> None:
    options = AlzheimerCsfOptions(missing=0.4)
    gone = [taken_away(f"row{i:03d}", GROUPS, options) for i in range(2000)]
    assert all(len(names) < 4 for names in gone)
    share = sum(len(names) for names in gone) / 8000
    assert share == pytest.approx(0.4 - 0.4**4 / 4, abs=0.02)
    assert gone == [taken_away(f"row{i:03d}", GROUPS, options) for i in range(2000)]
    assert gone != [taken_away(f"row{i:03d}", GROUPS, AlzheimerCsfOptions(missing=0.4, seed=1)) for i in range(2000)]
    assert all(taken_away(f"row{i:03d}", GROUPS, AlzheimerCsfOptions()) == () for i in range(50))


def test_what_the_experiment_takes_away_is_counted(tmp_path: Path) -> None:
    samples, funnel = load(write(tmp_path, [{}] * 40), missing=0.5)
    lacking = {group: sum(group not in s.modalities for s in samples) for group in GROUPS}
    assert {f"experiment: {g} taken away at random": n for g, n in lacking.items() if n} == funnel.counts
    assert sum(lacking.values()) > 40


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"Genotype": "E5E3"}, "'E5E3' in column 'Genotype' is no APOE genotype"),
        ({"Class": "AD"}, "'AD' in column 'Class' is neither Control nor Impaired"),
        ({"tau": "high"}, "'high' in column 'tau' is no number"),
    ],
)
def test_a_wrong_cell_is_named(tmp_path: Path, row: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path, [row]))


def test_a_missing_table_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the table 'alzheimer_csf' is missing"):
        load(tmp_path)
    (tmp_path / "alzheimer_csf.csv").write_text("Class,age\nControl,1\n")
    with pytest.raises(DataError, match="the column 'ACE_CD143_Angiotensin_Converti' is missing"):
        load(tmp_path)
