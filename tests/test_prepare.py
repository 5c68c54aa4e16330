from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flame_moe.data.prepare import describe_store, prepare
from flame_moe.data.sources import get_source, source_names
from flame_moe.data.sources.base import Source
from flame_moe.data.store import Store
from flame_moe.errors import DataError, FlameError, RecipeError, StoreError

SMALL = {"samples": 150, "cohorts": ["embed"]}


def hashes(store: Store) -> dict[str, str]:
    return {name: record["sha256"] for name, record in store.manifest["files"].items()}


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = prepare("clinic", None, tmp_path / "deep" / "a", options=SMALL)
    second = prepare("clinic", None, tmp_path / "b", options=SMALL)
    assert hashes(first) == hashes(second)
    assert first.manifest == second.manifest
    first.verify()


def test_a_description_is_plain_and_names_no_place(tmp_path: Path) -> None:
    store = prepare("clinic", None, tmp_path / "s", options=SMALL)
    told = describe_store(store)
    assert str(tmp_path) not in json.dumps(told)
    assert told["funnel"]["steps"][0] == {"text": "samples generated", "before": 150, "after": 150, "dropped": 0}
    assert told["counts"]["train"]["samples"] + told["counts"]["val"]["samples"] < 150
    assert set(told["missing"]) == {"cc", "mlo", "ffdm_cc", "ffdm_mlo"}
    assert set(told["labels"]["density"]["test"]["prevalence"]) == {"a", "b", "c", "d"}


def test_nothing_is_lost_or_left_when_something_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "s"
    kept = hashes(prepare("clinic", None, out, options=SMALL))
    cases = [
        (StoreError, "already something", ("clinic", None, out), {"options": SMALL}),
        (RecipeError, "Did you mean 'samples'", ("clinic", None, out), {"options": {"sample": 3}, "overwrite": True}),
        (DataError, "Did you mean 'clinic'", ("clinik", None, out), {}),
        (DataError, "reads no raw data", ("clinic", tmp_path, tmp_path / "t"), {}),
        (DataError, "no sample of the|in all", ("clinic", None, out), {"options": {"samples": 2}, "overwrite": True}),
    ]
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            prepare(*arguments, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["s"]
        assert hashes(Store.open(out)) == kept
    prepare("clinic", None, out, options={**SMALL, "seed": 1}, overwrite=True)
    assert hashes(Store.open(out)) != kept


def test_only_the_tasks_that_are_named_are_kept_and_nothing_else_changes(tmp_path: Path) -> None:
    whole = prepare("digits", None, tmp_path / "whole")
    part = prepare("digits", None, tmp_path / "part", tasks=["slant", "digit"])
    assert list(part.tasks) == [name for name in whole.tasks if name in ("slant", "digit")]
    left_out = {name for name in hashes(whole) if name.startswith("tasks/")} - hashes(part).keys()
    assert len(left_out) == len(whole.tasks) - 2
    assert hashes(part) == {name: digest for name, digest in hashes(whole).items() if name not in left_out}
    with pytest.raises(DataError, match=r"unknown task 'digits'. Did you mean 'digit'"):
        prepare("digits", None, tmp_path / "none", tasks=["digits"])
    assert not (tmp_path / "none").exists()


def test_a_label_that_is_constant_names_the_way_out_and_the_way_out_works(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = "".join(f"{i},{i % 5},{i % 2},0\n" for i in range(60))
    (tmp_path / "raw" / "samples.csv").write_text(f"id,x,sick,died\n{rows}")
    (tmp_path / "raw" / "flame.toml").write_text(
        '[samples]\nfile = "samples.csv"\nid = "id"\n[modalities.basics]\nkind = "table"\nfile = "samples.csv"\n'
        'columns = ["x"]\n[tasks.sick]\nkind = "binary"\ncolumn = "sick"\n[tasks.died]\nkind = "binary"\n'
        'column = "died"\n'
    )
    with pytest.raises(DataError, match=r"the label is .* in all \d+ training samples \[task 'died'\].*--task"):
        prepare("folder", tmp_path / "raw", tmp_path / "s")
    assert list(prepare("folder", tmp_path / "raw", tmp_path / "s", tasks=["sick"]).tasks) == ["sick"]


def test_new_records_all_go_to_the_test_split(tmp_path: Path) -> None:
    store = prepare("clinic", None, tmp_path / "s", options={**SMALL, "samples": 5}, require_labels=False)
    assert len(store.indices(split="test")) == len(store) == 5


def test_raw_data_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs raw data"):
        prepare("physionet2012", None, tmp_path / "s")
    with pytest.raises(DataError, match="there are no raw data"):
        prepare("physionet2012", tmp_path / "nowhere", tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", source_names())
def test_every_source_keeps_the_interface(name: str) -> None:
    source = get_source(name)
    assert isinstance(source, Source)
    assert source.name == name
    options = source.options()
    # A source may look at its raw folder, or at options without a default, before it can say what it offers.
    refusal: FlameError | None = None
    modalities, tasks = (), ()
    try:
        modalities, tasks = source.describe(None, options)
    except FlameError as error:
        refusal = error
    assert refusal is None or refusal.mend
    assert tasks or refusal is not None
    known = {m.name for m in modalities}
    assert all(set(t.modalities) <= known for t in tasks)
    assert sum(source.split(options).fractions) == pytest.approx(1.0)
    assert source.options.parse(options.plain(), where="options") == options


def test_a_store_can_be_moved(tmp_path: Path) -> None:
    prepare("clinic", None, tmp_path / "a", options=SMALL)
    shutil.move(tmp_path / "a", tmp_path / "b")
    Store.open(tmp_path / "b").verify()
