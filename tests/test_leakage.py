"""No source lets a validation or test subject, or anything from after the prediction, into what is fitted or read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.data.prepare import prepare
from flame_moe.data.store import Store
from tests.raw_folders import SOURCES, Edit

LATER = {"embed": "later", "oasis": "_MR2"}
"""Of sources whose subjects have several samples: part of the id of those that are made of what is edited as late."""


class Maker:
    """Stores of one source from its plain raw folder and from edited ones."""

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place, self.made = name, place, 0
        self.plain = self.store(Edit())

    def store(self, edit: Edit, **options: object) -> Store:
        self.made += 1
        raw, chosen = SOURCES[self.name](self.place / f"raw{self.made}", edit)
        tasks = chosen.pop("tasks", None)
        return prepare(self.name, raw, self.place / f"store{self.made}", options={**chosen, **options}, tasks=tasks)


@pytest.fixture(scope="module", params=SOURCES)
def maker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(request.param, tmp_path_factory.mktemp(request.param))


def subjects_of(store: Store) -> dict[str, set[int]]:
    """Subject -> the splits it is in."""
    found: dict[str, set[int]] = {}
    for subject, split in zip(store.subjects(np.arange(len(store))), store.splits.tolist(), strict=True):
        found.setdefault(subject, set()).add(split)
    return found


def inputs(store: Store, without: str | None = None) -> dict[str, dict[str, tuple[object, ...]]]:
    """Sample -> modality -> everything that a model reads of it."""
    found = {}
    for i, id in enumerate(store.ids(np.arange(len(store)))):
        if without is None or without not in id:
            parts = store.sample(i).modalities.items()
            found[id] = {
                name: tuple(None if a is None else (a.dtype.str, a.shape, a.tobytes()) for a in part)
                for name, part in parts
            }
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the raw files."""
    files = (path for path in folder.rglob("*") if path.is_file() and "store" not in str(path.relative_to(folder)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_statistics_of_a_source_do_not_see_validation_and_test(maker: Maker) -> None:
    plain, splits = maker.plain, subjects_of(maker.plain)
    unseen = frozenset(subject for subject, found in splits.items() if 0 not in found)
    assert 0 < len(unseen) < len(splits)
    other = maker.store(Edit(unseen))
    assert plain.manifest["statistics"] == other.manifest["statistics"]
    # The edit is real, and one of a training subject is seen: the comparison above can fail.
    assert inputs(plain) != inputs(other)
    seen = maker.store(Edit(frozenset(splits) - unseen))
    assert plain.manifest["statistics"] != seen.manifest["statistics"]


def test_a_subject_of_a_source_is_in_one_split_only(maker: Maker) -> None:
    options = {} if maker.name == "join" else {"seed": 1}
    for store in (maker.plain, maker.store(Edit(), **options)):
        found = subjects_of(store)
        assert all(len(splits) == 1 for splits in found.values())
        assert set.union(*found.values()) == {0, 1, 2}


def test_nothing_from_after_the_prediction_is_an_input(maker: Maker) -> None:
    if maker.name in ("physionet2012", "folder"):
        pytest.skip("the files of this source hold nothing from after the prediction: there is nothing to edit")
    later = LATER.get(maker.name)
    plain, other = maker.plain, maker.store(Edit(late=True))
    assert contents(maker.place / "raw1") != contents(maker.place / f"raw{maker.made}"), "nothing was edited"
    assert inputs(plain, later)
    assert inputs(plain, later) == inputs(other, later)
