"""Folds keep the test split out, a subject on one side, and statistics fitted on what trains."""

from __future__ import annotations

import numpy as np
import pytest

from flame_moe.data.folds import TEST, TRAIN, VAL, fold, judging_fold
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from flame_moe.experiments.crossval import crossval, main
from tests.tiny import recipe


def test_folds_part_the_subjects_and_leave_the_test_split_alone(tiny_store: Store) -> None:
    everyone = np.arange(len(tiny_store))
    before = tiny_store.splits.copy()
    views = [fold(tiny_store, number, 3) for number in range(3)]
    for view in views:
        assert np.array_equal(view.splits == TEST, before == TEST)
        subjects = np.array(view.subjects(everyone))
        assert not set(subjects[view.splits == TRAIN]) & set(subjects[view.splits == VAL])
    held = np.stack([view.splits == VAL for view in views])
    assert np.array_equal(held.sum(0), before != TEST)
    assert np.array_equal(tiny_store.splits, before)


def test_judging_tests_every_sample_once_and_keeps_subjects_together(tiny_store: Store) -> None:
    views = [judging_fold(tiny_store, number, 5) for number in range(5)]
    subjects = np.array(tiny_store.subjects(np.arange(len(tiny_store))))
    assert np.array_equal(np.stack([view.splits == TEST for view in views]).sum(0), np.ones(len(tiny_store)))
    for view in views:
        parts = [set(subjects[view.splits == part]) for part in (TRAIN, VAL, TEST)]
        assert all(parts)
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
        values = view.gather("vitals", view.indices(split="train"))
        scaled = Preprocessor.from_store(view).apply("vitals", values.values, values.observed)
        assert values.observed is not None
        assert float(scaled[:, 0][values.observed[:, 0]].mean()) == pytest.approx(0, abs=1e-4)


def test_a_share_of_the_training_subjects_is_part_of_every_larger_share(tiny_store: Store) -> None:
    whole, half, quarter = (judging_fold(tiny_store, 0, 5, share=share) for share in (1.0, 0.5, 0.25))
    subjects = np.array(tiny_store.subjects(np.arange(len(tiny_store))))
    learned = [set(subjects[view.splits == TRAIN]) for view in (whole, half, quarter)]
    assert learned[0] > learned[1] > learned[2]
    assert len(learned[1]) == round(0.5 * len(learned[0]))
    for view in (half, quarter):
        for part in (VAL, TEST):
            assert np.array_equal(view.splits == part, whole.splits == part)
        assert set(view.indices("death", "train")) <= set(whole.indices("death", "train"))
    assert Preprocessor.from_store(half).plain() != Preprocessor.from_store(whole).plain()


def test_statistics_of_a_fold_are_those_of_its_training_samples(tiny_store: Store) -> None:
    view = fold(tiny_store, 0, 3)
    values = view.gather("vitals", view.indices(split="train"))
    assert values.observed is not None
    scaled = Preprocessor.from_store(view).apply("vitals", values.values, values.observed)
    seen = scaled[:, 0][values.observed[:, 0]]
    assert float(seen.mean()) == pytest.approx(0, abs=1e-4)
    assert Preprocessor.from_store(view).plain() != Preprocessor.from_store(tiny_store).plain()


def test_a_fold_that_does_not_exist_is_refused(tiny_store: Store) -> None:
    for number, of in ((3, 3), (-1, 3), (0, 1)):
        with pytest.raises(DataError, match=f"no fold {number} of {of}"):
            fold(tiny_store, number, of)


def test_every_fold_that_is_asked_for_is_scored(
    tiny_store: Store, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    found = crossval(recipe((("death",),), train={"epochs": 1}), tiny_store, folds=3, use=2)
    assert [len(values) for values in found.values()] == [2]
    file = tmp_path_factory.mktemp("crossval") / "tiny.toml"
    file.write_text('name = "tiny"\n[data]\nsource = "mine"\n[[stages]]\ntasks = ["death"]\n[train]\nepochs = 1\n')
    main([str(file), str(tiny_store.path), "--folds", "3", "--use", "1", "--set", "model.width=8"])
    assert capsys.readouterr().out.startswith("death: ")
