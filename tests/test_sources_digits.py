from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from flame_moe.data.prepare import prepare
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.sources.digits import slant_of
from flame_moe.data.store import Store
from flame_moe.errors import RecipeError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("digits", None, tmp_path_factory.mktemp("stores") / "digits")


def test_all_digits_are_there_and_labels_agree_with_them(store: Store) -> None:
    digits = load_digits().target
    assert len(store) == 1797
    everyone = np.arange(1797)
    assert store.target("digit", everyone)[:, 0].tolist() == digits.tolist()
    assert store.target("odd", everyone)[:, 0].tolist() == (digits % 2).tolist()
    assert store.target("large", everyone)[:, 0].tolist() == (digits >= 5).tolist()
    assert store.target("loops", everyone)[:, 0].tolist() == np.isin(digits, (0, 6, 8, 9)).tolist()


def test_modalities_show_the_pixels_they_say(store: Store) -> None:
    images = load_digits().images
    for i in range(40):
        image, parts = images[i], store.sample(i).modalities
        if "patches" in parts:
            np.testing.assert_array_equal(parts["patches"].values[1].reshape(4, 4), image[:4, 4:])
        if "rows" in parts:
            np.testing.assert_array_equal(parts["rows"].values, image[[1, 3, 5, 7]])
        if "columns" in parts:
            np.testing.assert_array_equal(parts["columns"].values, image[:, [0, 2, 4, 6]].T)
        if "strokes" in parts:
            x, y, ink = parts["strokes"].values.T
            seen = parts["strokes"].observed[:, 2]
            np.testing.assert_array_equal(ink[seen], image[y.astype(int), x.astype(int)][seen])


def test_missingness_is_what_was_asked_for(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    for fractions in store.manifest["missing"].values():
        assert fractions["train"] == pytest.approx(0.15 * 0.8, abs=0.04)
    folder = tmp_path_factory.mktemp("stores")
    whole = prepare("digits", None, folder / "whole", options={"missing": 0.0})
    assert all(whole.present(name).all() for name in whole.modalities)
    other = prepare("digits", None, folder / "other", options={"seed": 1})
    assert not np.array_equal(other.splits, store.splits)
    with pytest.raises(RecipeError, match="Did you mean 'missing'"):
        prepare("digits", None, folder / "bad", options={"mising": 0.1})


def test_holes_and_slant_mean_what_they_say(store: Store) -> None:
    part = store.gather("shape", np.arange(len(store)))
    holes = part.values[:, list(store.modalities["shape"].channels).index("holes")]
    digits = store.target("digit", part.rows)[:, 0]
    assert holes[digits == 0].mean() > 0.8
    assert holes[digits == 1].mean() < 0.1
    upright, right = np.zeros((8, 8), np.float32), np.fliplr(np.eye(8, dtype=np.float32))
    upright[:, 3] = 1
    assert slant_of(upright) == pytest.approx(0.0, abs=1e-6)
    assert slant_of(right) == pytest.approx(1.0, abs=1e-6)


def test_the_rows_tell_the_digit(store: Store) -> None:
    preprocessor = Preprocessor.from_store(store)

    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        indices = store.indices("digit", split, modalities=["rows"])
        part = store.gather("rows", indices)
        return preprocessor.apply("rows", part.values, None).reshape(len(indices), -1), store.target("digit", indices)[
            :, 0
        ]

    probe = LogisticRegression(max_iter=1000).fit(*features("train"))
    assert probe.score(*features("test")) > 0.8
