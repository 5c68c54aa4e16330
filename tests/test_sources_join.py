"""Several stores as one: nothing is mixed up, and every part keeps its samples, labels and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.data.prepare import prepare
from flame_moe.data.store import Store
from flame_moe.errors import FlameError
from flame_moe.runs import run
from tests.tiny import recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    prepare("digits", None, folder / "ink", options={"seed": 3})
    return folder


def both(folder: Path, **ink: Any) -> dict[str, Any]:
    clinic = {"store": str(folder / "clinic"), "source": "clinic", "options": {"samples": 400}, "tasks": ["ihm", "mor"]}
    return {"parts": {"ink": {"store": str(folder / "ink"), "tasks": ["odd", "slant"], **ink}, "icu": clinic}}


@pytest.fixture(scope="module")
def joined(parts: Path) -> Store:
    return prepare("join", None, parts / "both", options=both(parts))


def test_every_part_keeps_its_samples_labels_and_split(parts: Path, joined: Store) -> None:
    ink = Store.open(parts / "ink")
    named = dict(zip(joined.ids(np.arange(len(joined))), range(len(joined)), strict=True))
    for i in (0, 7, 1700):
        old, new = ink.sample(i), joined.sample(named[f"ink/{ink.ids([i])[0]}"])
        assert new.subject == f"ink/{old.subject}"
        assert joined.splits[named[new.id]] == ink.splits[i]
        assert {f"ink_{k}" for k in ("odd", "slant") if k in old.targets} == set(new.targets)
        for name, part in new.modalities.items():
            assert np.array_equal(part.values, old.modalities[name.removeprefix("ink_")].values)
    assert set(joined.tasks) == {"ink_odd", "ink_slant", "icu_ihm", "icu_mor"}
    assert joined.tasks["ink_odd"].modalities == tuple(f"ink_{m}" for m in ink.tasks["odd"].modalities)


def test_a_part_that_is_not_there_is_prepared_and_its_funnel_is_carried(parts: Path, joined: Store) -> None:
    assert Store.open(parts / "clinic").manifest["options"]["samples"] == 400
    steps = joined.manifest["funnel"]["steps"]
    assert steps[-1]["after"] == len(Store.open(parts / "ink")) + len(Store.open(parts / "clinic"))
    assert all(text.startswith(("ink: ", "icu: ")) for text in joined.manifest["funnel"]["counts"])


def test_a_model_learns_parts_jointly_and_stage_by_stage(parts: Path, joined: Store, tmp_path: Path) -> None:
    plan = recipe((("ink_odd", "icu_ihm"), ("icu_mor",)), train={"epochs": 1}, data={"source": "join"})
    done = run(plan, tmp_path / "run", store=joined)
    assert {row.task for row in done.results.drift} >= {"ink_odd", "icu_ihm"}
    assert all(row.bitwise_equal for row in done.results.drift)


def test_a_common_modality_has_one_name_and_must_be_the_same(parts: Path, tmp_path: Path) -> None:
    twice = {"store": str(parts / "ink"), "tasks": ["odd"], "common": {"rows": "rows"}}
    store = prepare("join", None, tmp_path / "s", options={"parts": {"a": twice, "b": twice}})
    assert "rows" in store.modalities
    assert not {"a_rows", "b_rows"} & set(store.modalities)
    assert int(store.present("rows").sum()) == 2 * int(Store.open(parts / "ink").present("rows").sum())
    other = {"store": str(parts / "ink"), "tasks": ["loops"], "common": {"patches": "rows"}}
    with pytest.raises(FlameError, match=r"'rows' is not the same in all parts: features is 8 before and 16 here"):
        prepare("join", None, tmp_path / "t", options={"parts": {"a": twice, "b": other}})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["ood"]}, r"unknown task 'ood' \[parts.ink\]. Did you mean 'odd'"),
        ({"common": {"row": "x"}}, r"unknown modality 'row' \[parts.ink\]. Did you mean 'rows'"),
        ({"store": "nowhere"}, r"there is no sample store \[nowhere\]"),
        ({"stroe": "x"}, "unknown key 'stroe'"),
    ],
)
def test_a_wrong_part_is_named(parts: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FlameError, match=message):
        prepare("join", None, tmp_path / "s", options=both(parts, **change))
    with pytest.raises(FlameError, match="a join needs parts"):
        prepare("join", None, tmp_path / "s")
