"""Clinical documents as vectors: what is read, what stays together, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.data.prepare import prepare
from flame_moe.data.sources.mtsamples import FULL, REST, SHORT, SPECIALTIES
from flame_moe.data.store import Store
from flame_moe.data.text import TextOptions, embed_texts
from flame_moe.errors import DataError
from tests.pretrained import tiny_bert

TEXTS = [
    ("Surgery", "Hernia repair.", "The patient was taken to the operating room."),
    ("Other", "Consult.", "A 40-year-old woman, no acute distress."),
    ("Other", "Hernia  REPAIR.", "Closed with staples."),
    ("Internal Medicine", "Fever.", "The patient was taken to the  operating room."),
    (None, "Cough.", None),
]
NOTES = [("Urology", "Cystoscopy."), (" Allergy ", "Fever."), ("Surgery", None)]


def raw(folder: Path, texts: list[Any] | None = None, notes: list[Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if texts is not None:
        columns = ["class_name", "description", "text"]
        pl.DataFrame(texts, schema=dict.fromkeys(columns, pl.String), orient="row").write_csv(folder / f"{FULL}.csv")
    if notes is not None:
        columns = ["medical_specialty", "description", "keywords"]
        rows = [(*note, "urology, leak") for note in notes]
        pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row").write_csv(folder / f"{SHORT}.csv")
    return folder


def store_of(tmp_path: Path, folder: Path, **options: Any) -> Store:
    return prepare("mtsamples", folder, tmp_path / "store", options={"width": 32, **options}, require_labels=False)


def test_documents_become_vectors_and_labels(tmp_path: Path) -> None:
    store = store_of(tmp_path, raw(tmp_path / "raw", TEXTS, NOTES))
    assert store.ids(np.arange(len(store))) == (*(f"text{i:04d}" for i in range(1, 6)), "short0001", "short0002")
    expected = embed_texts(["Hernia repair.", "The patient was taken to the operating room."], TextOptions(width=32))
    first = store.sample(0)
    np.testing.assert_array_equal(first.modalities["description"].values, expected[:1])
    np.testing.assert_array_equal(first.modalities["text"].values, expected[1:])
    assert first.modalities["text"].times is not None
    assert first.modalities["text"].times.tolist() == [0.0]
    assert store.target("document", np.arange(7))[:, 0].tolist()[:4] == [0, 3, 3, 2]
    assert np.isnan(store.target("document", np.arange(7))[4:, 0]).all()
    specialty = store.target("specialty", np.arange(7))[:, 0].tolist()
    assert specialty[5:] == [SPECIALTIES.index("Urology"), (*SPECIALTIES, REST).index(REST)]
    assert not store.present("text")[4:].any()


def test_the_same_text_or_description_is_in_one_split(tmp_path: Path) -> None:
    """Rows 1 and 3 share a description, 1 and 4 a text, 4 and the second short one a description."""
    store = store_of(tmp_path, raw(tmp_path / "raw", TEXTS, NOTES))
    assert list(store.subjects([0, 2, 3, 6])) == ["text0001"] * 4
    assert list(store.subjects([1, 4, 5])) == ["text0002", "text0005", "short0001"]


def test_one_of_the_tables_is_enough_and_the_loss_is_told(tmp_path: Path) -> None:
    store = store_of(tmp_path, raw(tmp_path / "raw", notes=NOTES))
    assert set(store.modalities) == {"description"}
    assert set(store.tasks) == {"specialty"}
    assert any("table with the texts is not there" in what for what in store.manifest["funnel"]["counts"])


def test_documents_without_labels_can_be_read(tmp_path: Path) -> None:
    folder = raw(tmp_path / "raw", TEXTS)
    table = pl.read_csv(folder / f"{FULL}.csv").drop("class_name")
    table.write_csv(folder / f"{FULL}.csv")
    store = store_of(tmp_path, folder)
    assert len(store) == 5
    assert len(store.indices("document")) == 0


def test_a_model_from_a_local_folder_reads_them(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    options = {"encoder": str(folder), "chunk": 32, "overlap": 8}
    store = store_of(tmp_path, raw(tmp_path / "raw", TEXTS), **options)
    expected = embed_texts(["Fever."], TextOptions(**options))
    assert store.sample(3).modalities["description"].values == pytest.approx(expected, abs=1e-5)


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"neither '{FULL}' nor '{SHORT}' is there"):
        store_of(tmp_path, raw(tmp_path / "a"))
    with pytest.raises(DataError, match=r"unknown class 'Surgeon' \[.*row 1\]\. Known: Surgery"):
        store_of(tmp_path, raw(tmp_path / "b", [("Surgeon", "a", "b")]))


def test_the_open_data_have_the_known_counts(shared_data: Path, tmp_path: Path) -> None:
    store = prepare("mtsamples", shared_data / "mtsamples", tmp_path / "store")
    assert len(store) == 2318
    assert int(store.present("text").sum()) == 500
    document = store.target("document", store.indices("document"))[:, 0]
    assert np.bincount(document.astype(int)).tolist() == [198, 102, 109, 91]
    specialty = store.target("specialty", store.indices("specialty"))[:, 0]
    assert np.bincount(specialty.astype(int)).tolist() == [902, 221, 140, 116, 439]
    counts = store.manifest["funnel"]["counts"]
    assert list(counts.values()) == [9]
