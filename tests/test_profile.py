"""What a store's profile says is what the store holds; only training data give ranges, and traps are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.batch import Observation, Sample
from flame_moe.data.profile import all_patterns, profile
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from tests.example_stores import random_samples, write


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("profiled") / "store", random_samples(120, seed=3))


def samples(store: Store) -> list[Sample]:
    return [store.sample(i) for i in range(len(store))]


def test_patterns_and_pairs_count_the_samples_of_the_store(store: Store) -> None:
    found, every = profile(store), samples(store)
    for pattern in found.patterns:
        assert pattern.samples == sum(set(s.modalities) == set(pattern.modalities) for s in every)
    assert sum(p.samples for p in all_patterns(store)) == len(store)
    counts = [p.samples for p in found.patterns]
    assert counts == sorted(counts, reverse=True)
    names = list(store.modalities)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            assert found.together[i][j] == sum(one in s.modalities and other in s.modalities for s in every)


def test_presence_per_split_and_lengths_and_times_are_those_of_the_samples(store: Store) -> None:
    found = {m.name: m for m in profile(store).modalities}
    every = samples(store)
    for split in ("train", "val", "test"):
        part = store.indices(split=split)
        share = np.mean(["notes" in every[i].modalities for i in part])
        assert found["notes"].present[split] == pytest.approx(share)
    vitals = [s.modalities["vitals"] for s in every if "vitals" in s.modalities]
    lengths, times = found["vitals"].lengths, found["vitals"].times
    assert lengths is not None
    assert times is not None
    steps = [len(v.values) for v in vitals]
    assert dict(zip(lengths.edges, lengths.counts, strict=False)) == {
        float(n): steps.count(n) for n in range(min(steps), max(steps) + 1)
    }
    assert sum(times.counts) == sum(steps)
    assert found["static"].lengths is None
    assert found["image"].times is None


def test_ranges_are_of_observed_cells_of_the_training_split_alone(store: Store) -> None:
    found = {m.name: m for m in profile(store).modalities}["vitals"]
    train = set(store.indices(split="train").tolist())
    parts = [s.modalities["vitals"] for i, s in enumerate(samples(store)) if i in train and "vitals" in s.modalities]
    for c, channel in enumerate(found.channels):
        values = np.concatenate([p.values[p.observed[:, c], c] for p in parts if p.observed is not None])
        cells = sum(len(p.values) for p in parts)
        assert channel.observed == pytest.approx(len(values) / cells)
        assert channel.quantiles[0] == values.min()
        assert channel.quantiles[3] == pytest.approx(np.median(values))
        assert channel.quantiles[6] == values.max()
    assert [c.name for c in found.channels] == ["hr", "sbp", "temp"]
    assert found.read == found.of == len(parts)


def test_labels_with_and_without_a_modality_are_of_labelled_training_samples(store: Store) -> None:
    (row,) = [r for r in next(t for t in profile(store).tasks if t.name == "death").presence if r.modality == "image"]
    train = set(store.indices(split="train").tolist())
    known = [s for i, s in enumerate(samples(store)) if i in train and "death" in s.targets]
    there = [s.targets["death"][0] for s in known if "image" in s.modalities]
    gone = [s.targets["death"][0] for s in known if "image" not in s.modalities]
    assert (row.with_n, row.without_n) == (len(there), len(gone))
    assert row.with_share == pytest.approx(np.mean(there))
    assert row.without_share == pytest.approx(np.mean(gone))
    assert row.label == "yes"


def made(path: Path, *, telling: bool, constant: bool) -> Store:
    """Samples whose image is there mostly for one class, or is not; whose static channel moves, or does not."""
    generator = np.random.default_rng(1)
    found = []
    for i in range(300):
        label = float(i % 2)
        there = generator.random() < ((0.9 if label else 0.1) if telling else 0.5)
        static = np.array([[1.0 if constant else generator.random(), generator.random()]], dtype=np.float32)
        parts = {"static": Observation(static, None, np.array([[True, True]]))}
        if there:
            parts["image"] = Observation(generator.random((2, 2)).astype(np.float32))
        targets = {"death": [label], "stage": [float(i % 3)], "codes": [label, float(i % 3 == 0)], "days": [i % 7]}
        targets |= {"block": [label], "dose": [i % 5, i % 7]}
        arrays = {name: np.array(value, dtype=np.float32) for name, value in targets.items()}
        found.append(Sample(f"s{i}", f"p{i}", parts, arrays))
    return write(path, found)


def test_a_modality_whose_presence_tells_the_label_is_named(tmp_path: Path) -> None:
    said = profile(made(tmp_path / "a", telling=True, constant=False)).looks
    assert any(text.startswith("death: whether image is there says something about 'yes'") for text in said)
    quiet = profile(made(tmp_path / "b", telling=False, constant=False)).looks
    assert not any("whether" in text for text in quiet)


def test_a_channel_that_never_changes_and_a_modality_that_is_hardly_there_are_named(tmp_path: Path) -> None:
    said = profile(made(tmp_path / "a", telling=False, constant=True)).looks
    assert "static: feature 0 is the same value wherever observed." in said
    assert "vitals: 0.0 % of training samples have it." in said
    moving = profile(made(tmp_path / "b", telling=False, constant=False)).looks
    assert not any("same value" in text for text in moving)


def test_few_cases_in_a_split_are_named(tmp_path: Path, store: Store) -> None:
    said = [text for text in profile(store).looks if text.startswith("death: the val split has")]
    labels = store.target("death", store.indices("death", "val"))
    assert said == [f"death: the val split has {int(labels.sum())} of 'yes'."]
    many = profile(made(tmp_path / "many", telling=False, constant=False)).looks
    assert not any(text.startswith("death: the") for text in many)


def test_times_are_read_without_the_values(store: Store) -> None:
    everyone = np.flatnonzero(store.present("vitals"))
    assert np.array_equal(store.times("vitals", everyone), store.gather("vitals", everyone).times)
    with pytest.raises(DataError, match="modality 'static' has no times"):
        store.times("static", everyone)
