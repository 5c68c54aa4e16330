"""Scaled values that were kept are those that scaling anew gives, and memory has a limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.data import scaled as module
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.scaled import scaled
from tests.example_stores import random_samples, write


def test_what_was_kept_is_what_scaling_anew_gives_whatever_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path / "store", random_samples(40))
    preprocessor = Preprocessor.from_store(store)
    calls = []
    apply = Preprocessor.apply
    monkeypatch.setattr(Preprocessor, "apply", lambda *args: calls.append(len(args[2])) or apply(*args))
    generator = np.random.default_rng(0)
    for _ in range(6):
        part = store.gather("static", generator.integers(0, len(store), 9))
        expected = apply(preprocessor, "static", part.values, part.observed)
        assert np.array_equal(scaled(store, preprocessor, "static", part), expected)
    part = store.gather("static", np.arange(len(store)))
    scaled(store, preprocessor, "static", part)
    assert sum(calls) <= store.steps("static") + 9, "each step is scaled once, save those twice in one batch"
    before = len(calls)
    scaled(store, preprocessor, "static", part)
    assert len(calls) == before


def test_other_statistics_are_never_mixed_up_with_those_kept(tmp_path: Path) -> None:
    store = write(tmp_path / "store", random_samples(40))
    one = Preprocessor.from_store(store)
    two = Preprocessor.fit(store, "val")
    part = store.gather("static", np.arange(len(store)))
    for preprocessor in (one, two, one):
        expected = preprocessor.apply("static", part.values, part.observed)
        assert np.array_equal(scaled(store, preprocessor, "static", part), expected)


def test_a_modality_beyond_the_limit_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 8)
    store = write(tmp_path / "store", random_samples(40))
    preprocessor = Preprocessor.from_store(store)
    part = store.gather("static", np.arange(len(store)))
    expected = preprocessor.apply("static", part.values, part.observed)
    assert np.array_equal(scaled(store, preprocessor, "static", part), expected)
    assert not module._MEMORY[store]
