from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_moe.batch import Observation, Sample
from flame_moe.data.columns import ColumnFile
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.split import deal
from flame_moe.data.store import Store, spread
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import DataError, RecipeError, StoreError
from tests.example_stores import MODALITIES, TASKS, random_samples, write

F = np.float32
GOOD = random_samples(200)
VITALS = Observation(np.ones((2, 3), F), np.array([0.1, 0.2], F), np.ones((2, 3), bool))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("stores") / "s", GOOD)


def same_observation(a: Observation, b: Observation) -> None:
    observed = np.ones(a.values.shape, bool) if a.observed is None else a.observed
    np.testing.assert_array_equal(np.where(observed, a.values, 0), b.values)
    assert (a.times is None) == (b.times is None)
    if a.times is not None:
        np.testing.assert_array_equal(a.times, b.times)
    if a.observed is not None:
        np.testing.assert_array_equal(a.observed, b.observed)


def test_samples_come_back_as_they_went_in(store: Store) -> None:
    assert len(store) == len(GOOD)
    for i, sample in enumerate(GOOD):
        back = store.sample(i)
        assert (back.id, back.subject) == (sample.id, sample.subject)
        assert back.modalities.keys() == sample.modalities.keys()
        assert back.targets.keys() == sample.targets.keys()
        for name, part in sample.modalities.items():
            same_observation(part, back.modalities[name])
        for name, target in sample.targets.items():
            np.testing.assert_array_equal(target, back.targets[name])


def test_opening_again_gives_the_same_store_and_its_hashes_hold(store: Store) -> None:
    again = Store.open(store.path)
    again.verify()
    assert again.manifest == store.manifest
    assert again.modalities == store.modalities
    assert list(again.tasks) == [t.name for t in TASKS]


@given(st.lists(st.integers(0, len(GOOD) - 1), max_size=20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gather_equals_a_loop_over_samples(store: Store, indices: list[int]) -> None:
    for name in store.modalities:
        part = store.gather(name, np.array(indices, dtype=np.int64))
        having = [i for i, index in enumerate(indices) if name in GOOD[index].modalities]
        assert part.rows.tolist() == having
        ends = np.cumsum(part.lengths)
        for row, start, end in zip(having, ends - part.lengths, ends, strict=True):
            times = None if part.times is None else part.times[start:end]
            observed = None if part.observed is None else part.observed[start:end]
            same_observation(GOOD[indices[row]].modalities[name], Observation(part.values[start:end], times, observed))


def test_indices_have_a_label_and_one_of_the_modalities(store: Store) -> None:
    for name, task in store.tasks.items():
        for split in ("train", "val", "test"):
            chosen = set(store.indices(name, split).tolist())
            loose = set(store.indices(name, split, labelled=False).tolist())
            for i in np.flatnonzero(store.splits == ("train", "val", "test").index(split)):
                readable = any(m in GOOD[i].modalities for m in task.modalities)
                assert (i in loose) == readable
                assert (i in chosen) == (readable and name in GOOD[i].targets)
    only = store.indices("death", modalities=["static"])
    assert all("static" in GOOD[i].modalities for i in only)
    assert store.indices().tolist() == list(range(len(GOOD)))


def test_manifest_tells_counts_labels_and_missingness(store: Store) -> None:
    train = store.indices(split="train")
    m = store.manifest
    assert sum(m["counts"][s]["samples"] for s in ("train", "val", "test")) == len(GOOD)
    lacking = np.mean(["notes" not in GOOD[i].modalities for i in train])
    assert m["missing"]["notes"]["train"] == pytest.approx(lacking)
    labels = [GOOD[i].targets["codes"][1] for i in train if "codes" in GOOD[i].targets]
    assert m["labels"]["codes"]["train"]["labelled"] == len(labels)
    assert m["labels"]["codes"]["train"]["prevalence"]["y"] == pytest.approx(np.mean(labels))
    assert m["funnel"]["steps"][0]["after"] == len(GOOD)


@given(st.permutations([f"p{i}" for i in range(30)]), st.integers(0, 5))
@settings(max_examples=25)
def test_split_depends_on_seed_and_names_only(subjects: list[str], seed: int) -> None:
    spec = SplitSpec(seed=seed)
    dealt = deal(subjects + subjects[:7], spec)
    assert dealt == deal(sorted(subjects), spec)
    assert [sum(v == s for v in dealt.values()) for s in ("train", "val", "test")] == [21, 3, 6]


def test_other_seeds_give_other_splits() -> None:
    names = [f"p{i}" for i in range(50)]
    assert deal(names, SplitSpec(seed=1)) != deal(names, SplitSpec(seed=2))


def test_a_subject_is_in_one_split_only(store: Store) -> None:
    splits: dict[str, set[int]] = {}
    for subject, split in zip(store.subjects(range(len(store))), store.splits.tolist(), strict=True):
        splits.setdefault(subject, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) < len(store)


def test_a_mapping_decides_the_split(tmp_path: Path) -> None:
    mapping = {s.subject: ("train", "val", "test")[int(s.subject[1:]) % 3] for s in GOOD}
    store = write(tmp_path / "s", GOOD, mapping)
    assert all(("train", "val", "test")[store.splits[i]] == mapping[s.subject] for i, s in enumerate(GOOD))
    with pytest.raises(DataError, match=r"a subject has no split.*p99"):
        write(tmp_path / "t", GOOD, {k: v for k, v in mapping.items() if k != "p99"})
    with pytest.raises(DataError, match=r"unknown split 'tets'.*Did you mean 'test'"):
        write(tmp_path / "t", GOOD, dict.fromkeys(mapping, "tets"))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_fractions_must_add_up() -> None:
    with pytest.raises(RecipeError, match=r"add up to 0\.9"):
        SplitSpec.parse({"fractions": [0.7, 0.1, 0.1]}, where="split")


def vitals(**change: object) -> Sample:
    return Sample("a", "p", {"vitals": VITALS._replace(**change)}, {})


BAD = {
    "unknown modality 'vital'.*Did you mean 'vitals'": Sample("a", "p", {"vital": VITALS}, {}),
    "unknown task 'deth'.*Did you mean 'death'": Sample("a", "p", {"vitals": VITALS}, {"deth": np.zeros(1, F)}),
    "has no modality": Sample("a", "p", {}, {}),
    r"shape \(2, 4\), not \(steps, 3\)": vitals(values=np.ones((2, 4), F)),
    "are not numbers": vitals(values=np.array([["a"] * 3] * 2)),
    "value nan at step 1, feature 2 .'temp'.*Mark the cell": vitals(values=np.array([[1, 1, 1], [1, 1, np.nan]], F)),
    "value inf": vitals(values=np.full((2, 3), 1e300)),
    "without a step": vitals(values=np.ones((0, 3), F)),
    "times have shape": vitals(times=np.zeros(3, F)),
    "time nan": vitals(times=np.array([0, np.nan], F)),
    "time -0.5 is negative": vitals(times=np.array([-0.5, 0], F)),
    "times go back at step 1": vitals(times=np.array([0.5, 0.1], F)),
    "needs times": vitals(times=None),
    "not bool": vitals(observed=np.ones((2, 3))),
    "observed flags have shape": vitals(observed=np.ones((2, 2), bool)),
    "no cell of the modality is observed.*Leave the modality out": vitals(observed=np.zeros((2, 3), bool)),
    "'timed' has no observed flags": Sample(
        "a", "p", {"notes": Observation(np.ones((1, 4), F), np.zeros(1, F), np.ones((1, 4), bool))}, {}
    ),
    "'patches' has no times": Sample("a", "p", {"image": Observation(np.ones((1, 2), F), np.zeros(1, F))}, {}),
    "a table has one row, not 2": Sample("a", "p", {"static": Observation(np.ones((2, 2), F))}, {}),
    "a label is nan.*Leave the task out": Sample("a", "p", {"vitals": VITALS}, {"days": np.array([np.nan], F)}),
    "a label has shape": Sample("a", "p", {"vitals": VITALS}, {"codes": np.zeros(3, F)}),
    "a label is 2, neither 0 nor 1": Sample("a", "p", {"vitals": VITALS}, {"death": np.array([2], F)}),
    "a label is 3, not one of 3 classes": Sample("a", "p", {"vitals": VITALS}, {"stage": np.array([3], F)}),
    "a label is 0.5, not one of": Sample("a", "p", {"vitals": VITALS}, {"stage": np.array([0.5], F)}),
    "the subject of a sample must be text": Sample("a", "", {"vitals": VITALS}, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_sample_is_refused_and_leaves_nothing(message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        write(tmp_path / "s", [*GOOD[:3], BAD[message]])
    assert "sample 'a'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_values_not_observed_may_hold_anything(tmp_path: Path) -> None:
    values = np.array([[1, np.nan, np.inf], [1, 2, 3]])
    observed = np.array([[True, False, False], [True, True, True]])
    odd = Sample("odd", "p0", {"vitals": VITALS._replace(values=values, observed=observed)}, {})
    store = write(tmp_path / "s", [*GOOD, odd])
    assert store.sample(len(GOOD)).modalities["vitals"].values.tolist() == [[1, 0, 0], [1, 2, 3]]


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"two samples have the same id.*s1"):
        write(tmp_path / "s", [GOOD[0], GOOD[1], GOOD[1]])


def relabel(change: dict[str, list[float] | None], subjects: set[str]) -> list[Sample]:
    changed = []
    for s in GOOD:
        targets = dict(s.targets)
        for task, target in change.items():
            if s.subject in subjects and task in targets:
                if target is None:
                    del targets[task]
                else:
                    targets[task] = np.array(target, F)
        changed.append(s._replace(targets=targets))
    return changed


def subjects_of(store: Store, split: str) -> set[str]:
    return set(store.subjects(store.indices(split=split)))


def test_tasks_that_cannot_be_learned_are_refused(store: Store, tmp_path: Path) -> None:
    train, val = subjects_of(store, "train"), subjects_of(store, "val")
    cases = {
        "the label is 'no' in all .* training samples.*'death'": relabel({"death": [0.0]}, train),
        "label 'y' is 1 in all .* training samples.*'codes'": [
            s._replace(targets={n: np.array([t[0], 1.0], F) if n == "codes" else t for n, t in s.targets.items()})
            for s in GOOD
        ],
        "no sample of the val split has a label.*'days'": relabel({"days": None}, val),
        "no sample of the train split has a label.*'stage'": relabel({"stage": None}, train),
    }
    for message, samples in cases.items():
        with pytest.raises(DataError, match=message):
            write(tmp_path / "s", samples)
        assert list(tmp_path.iterdir()) == []


def test_new_records_need_no_labels(tmp_path: Path) -> None:
    bare = [s._replace(targets={}) for s in GOOD[:5]]
    store = write(tmp_path / "s", bare, "test", require_labels=False)
    assert store.manifest["statistics"] is None
    assert store.indices("death", "test").tolist() == []
    readable = [i for i, s in enumerate(bare) if {"vitals", "static"} & s.modalities.keys()]
    assert store.indices("death", "test", labelled=False).tolist() == readable


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gave no sample"):
        write(tmp_path / "s", [])


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "s", GOOD)
    with pytest.raises(StoreError, match="already something"):
        write(tmp_path / "s", GOOD)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    options = {"source": "x", "options": {}, "modalities": MODALITIES, "tasks": TASKS}
    with pytest.raises(StoreError, match="not a sample store"):
        StoreWriter(tmp_path / "mine", overwrite=True, **options)
    with StoreWriter(tmp_path / "s", overwrite=True, **options) as writer:
        for sample in GOOD[:100]:
            writer.add(sample)
        assert len(Store.open(tmp_path / "s")) == 200
        writer.finish(SplitSpec(), Funnel())
    assert len(Store.open(tmp_path / "s")) == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "s"]


def test_descriptions_must_fit_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task 'death' reads unknown modality 'vitals'"):
        StoreWriter(tmp_path / "s", source="x", options={}, modalities=MODALITIES[1:], tasks=TASKS)
    with pytest.raises(DataError, match="two task descriptions"):
        StoreWriter(tmp_path / "s", source="x", options={}, modalities=MODALITIES, tasks=TASKS + TASKS[:1])


def test_a_damaged_store_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write(path, GOOD)
    manifest, values = path / "manifest.json", path / "modalities" / "vitals" / "values.bin"
    text, data = manifest.read_text(), values.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(StoreError, match=message):
            Store.open(path)

    values.write_bytes(data[:-4])
    refused("bytes, not")
    values.unlink()
    refused("missing.*values.bin")
    values.write_bytes(data)
    for message, change in {
        "has version 2, this program reads version 1": {"version": 2},
        "not a sample store": {"format": "other"},
        "damaged": {"modalities": [{"name": "x"}]},
        "does not list": {"files": {}},
        "does not fit the descriptions": {"samples": 199},
    }.items():
        manifest.write_text(json.dumps({**json.loads(text), **change}))
        refused(message)
    manifest.write_text(text[: len(text) // 2])
    refused("not valid JSON")
    manifest.unlink()
    refused("no sample store")


def test_verify_finds_a_changed_file(tmp_path: Path) -> None:
    store = write(tmp_path / "s", GOOD)
    values = store.path / "modalities" / "notes" / "values.bin"
    data = bytearray(values.read_bytes())
    data[0] ^= 1
    values.write_bytes(data)
    with pytest.raises(StoreError, match=r"changed.*notes/values\.bin"):
        Store.open(store.path).verify()


def test_unknown_names_are_told_with_the_nearest(store: Store) -> None:
    with pytest.raises(DataError, match="Did you mean 'death'"):
        store.indices("deth")
    with pytest.raises(DataError, match="Did you mean 'train'"):
        store.indices("death", "trian")
    with pytest.raises(DataError, match="Did you mean 'vitals'"):
        store.gather("vital", [0])
    with pytest.raises(DataError, match="there is no sample 200"):
        store.sample(200)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=10))
def test_spread_equals_ranges(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([a for a, _ in pairs], dtype=np.int64)
    lengths = np.array([b for _, b in pairs], dtype=np.int64)
    expected = [x for a, b in pairs for x in range(a, a + b)]
    assert spread(starts, lengths).tolist() == expected


def test_funnel_goes_through_json_and_keeps_order() -> None:
    funnel = Funnel()
    with pytest.raises(DataError, match="before the start"):
        funnel.rule("adults", 3)
    funnel.start(10)
    funnel.rule("adults", 8)
    funnel.rule("has data", 8)
    funnel.count("bad value set to missing", 2)
    funnel.count("bad value set to missing", 3)
    assert Funnel.parse(json.loads(json.dumps(funnel.plain()))) == funnel
    assert funnel.plain()["steps"][1] == {"text": "adults", "before": 10, "after": 8, "dropped": 2}
    assert funnel.counts == {"bad value set to missing": 5}
    with pytest.raises(DataError, match="cannot keep 9 of 8"):
        funnel.rule("more", 9)
    with pytest.raises(StoreError, match="cannot be read"):
        Funnel.parse({"steps": 3})


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        options = {"source": "x", "options": {}, "modalities": MODALITIES, "tasks": TASKS}
        with StoreWriter(tmp_path / "s", **options) as writer:
            writer._files["tasks/death/target.bin"].abandon()
            writer._files["tasks/death/target.bin"] = ColumnFile(Path("/dev/full"), "<f4", (1,))
            for sample in GOOD:
                writer.add(sample)
            writer.finish(SplitSpec(), Funnel())

    with pytest.raises(StoreError, match="cannot be written: No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write(tmp_path / "file" / "s", GOOD)
