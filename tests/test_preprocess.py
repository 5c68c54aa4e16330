from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.scaling import KEPT, Identity, Quantile, Standard, parse_scaler
from flame_moe.data.store import Store
from flame_moe.errors import DataError, StoreError
from tests.example_stores import MODALITIES, random_samples, write

F = np.float32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("stores") / "s", random_samples(200))


def test_standard_scaling_has_mean_0_and_deviation_1_on_observed_training_cells(store: Store) -> None:
    part = store.gather("vitals", store.indices(split="train"))
    scaled = Preprocessor.from_store(store).apply("vitals", part.values, part.observed)
    assert part.observed is not None
    for c in range(3):
        seen = scaled[part.observed[:, c], c]
        assert abs(seen.mean()) < 1e-5
        assert seen.std() == pytest.approx(1.0, abs=1e-4)
    assert (scaled[~part.observed] == 0).all()


def moved(values: np.ndarray) -> np.ndarray:
    """Other values of the same kind: other codes, other pixels, other numbers."""
    if values.dtype == np.uint8:
        return values // 2
    return values * [1, 3] + [0, 50] if values.dtype.kind == "i" else values * 100 + 7


def test_statistics_do_not_see_validation_and_test(tmp_path: Path, store: Store) -> None:
    samples = random_samples(200)
    shifted = []
    for sample, split in zip(samples, store.splits.tolist(), strict=True):
        if split != 0:
            parts = {n: o._replace(values=moved(o.values)) for n, o in sample.modalities.items()}
            targets = {n: t * 50 if n in ("days", "dose") else t for n, t in sample.targets.items()}
            sample = sample._replace(modalities=parts, targets=targets)
        shifted.append(sample)
    assert write(tmp_path / "s", shifted).manifest["statistics"] == store.manifest["statistics"]


@given(hnp.arrays(F, (40, 2), elements=st.floats(-100, 100, width=32)), hnp.arrays(bool, (40, 2)), st.integers(1, 39))
@settings(max_examples=60)
def test_streamed_statistics_equal_whole_ones(values: np.ndarray, observed: np.ndarray, cut: int) -> None:
    scaler = Standard.fit([(values[:cut], observed[:cut]), (values[cut:], observed[cut:])], 2)
    for c in range(2):
        seen = values[observed[:, c], c].astype(np.float64)
        assert scaler.mean[c] == pytest.approx(seen.mean() if len(seen) else 0.0, abs=1e-9)
        if len(seen) and seen.std() > 1e-3:
            assert scaler.scale[c] == pytest.approx(seen.std(), rel=1e-6)


@given(
    hnp.arrays(F, st.tuples(st.integers(0, 80), st.just(2)), elements=st.floats(-1e6, 1e6, width=32)),
    hnp.arrays(F, (30, 2), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
)
@settings(max_examples=80)
def test_quantile_map_is_monotone_bounded_and_finite(train: np.ndarray, new: np.ndarray) -> None:
    scaler = Quantile.fit([(train, None)], 2)
    scaled = scaler.apply(np.sort(new, axis=0), None)
    assert np.isfinite(scaled).all()
    assert (np.abs(scaled) <= 4).all()
    assert (np.diff(scaled, axis=0) >= -1e-6).all()  # to rounding: knots may lie a denormal number apart


def test_quantile_map_makes_skewed_values_normal() -> None:
    generator = np.random.default_rng(0)
    values = np.exp(generator.normal(0, 2, (20000, 1))).astype(F)
    scaled = Quantile.fit([(values, None)], 1).apply(values, None)[:, 0]
    assert abs(np.mean(scaled)) < 0.05
    assert abs(np.std(scaled) - 1) < 0.1
    assert abs(np.median(scaled)) < 0.02


def test_thinning_stays_even_over_a_long_stream() -> None:
    values = np.arange(5 * KEPT, dtype=F)[:, None]
    generator = np.random.default_rng(0)
    cuts = np.sort(generator.integers(0, len(values), 200))
    scaler = Quantile.fit([(part, None) for part in np.split(values, cuts)], 1)
    exact = np.quantile(values, (np.arange(64) + 0.5) / 64)
    np.testing.assert_allclose(scaler.knots[0], exact, atol=20)


def test_constant_and_unseen_channels_give_no_nan() -> None:
    values = np.full((10, 2), 7.0, F)
    observed = np.tile([True, False], (10, 1))
    for kind in (Standard, Quantile):
        scaled = kind.fit([(values, observed)], 2).apply(values, observed)
        assert (scaled == 0).all()
        other = kind.fit([(values, observed)], 2).apply(values + 1, np.ones((10, 2), bool))
        assert np.isfinite(other).all()


@pytest.mark.parametrize("name", [m.name for m in MODALITIES])
def test_statistics_go_through_json(store: Store, name: str) -> None:
    before = Preprocessor.from_store(store)
    after = Preprocessor.parse(json.loads(json.dumps(before.plain())))
    part = store.gather(name, np.arange(50))
    np.testing.assert_array_equal(
        before.apply(name, part.values, part.observed), after.apply(name, part.values, part.observed)
    )
    assert after.labels == before.labels


def test_label_statistics_are_those_of_the_training_split(store: Store) -> None:
    preprocessor = Preprocessor.from_store(store)
    train = store.indices(split="train")
    days = store.target("days", train)
    mean, std = preprocessor.target_scale("days")
    assert mean == pytest.approx(np.nanmean(days), rel=1e-5)
    assert std == pytest.approx(np.nanstd(days), rel=1e-5)
    death = store.target("death", train)[:, 0]
    assert preprocessor.class_counts("death").tolist() == [np.sum(death == 0), np.sum(death == 1)]
    stage = store.target("stage", train)[:, 0]
    assert preprocessor.class_counts("stage").tolist() == [np.sum(stage == c) for c in range(3)]
    codes = store.target("codes", train)
    assert preprocessor.class_counts("codes").tolist() == [
        np.sum(codes == 0, axis=0).tolist(),
        np.sum(codes == 1, axis=0).tolist(),
    ]


def test_wrong_questions_are_told(store: Store, tmp_path: Path) -> None:
    preprocessor = Preprocessor.from_store(store)
    with pytest.raises(DataError, match="no target scale"):
        preprocessor.target_scale("death")
    with pytest.raises(DataError, match="no class counts"):
        preprocessor.class_counts("days")
    with pytest.raises(DataError, match="Did you mean 'vitals'"):
        preprocessor.apply("vital", np.zeros((1, 3), F), None)
    with pytest.raises(StoreError, match="cannot be read"):
        Preprocessor.parse({"modalities": {"a": {"scaling": "magic"}}, "tasks": {}})
    bare = write(tmp_path / "s", random_samples(5), "test", require_labels=False)
    with pytest.raises(StoreError, match="no training split"):
        Preprocessor.from_store(bare)
    with pytest.raises(DataError, match="no sample to fit"):
        Preprocessor.fit(bare)


def test_no_scaling_leaves_values_alone() -> None:
    values = np.arange(6, dtype=F).reshape(3, 2)
    scaler = parse_scaler(Identity().plain())
    np.testing.assert_array_equal(scaler.apply(values, None), values)
    assert scaler.apply(values, values > 2).tolist() == [[0, 0], [0, 3], [4, 5]]


def test_statistics_do_not_depend_on_the_size_of_pieces(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Preprocessor.from_store(store).plain()
    monkeypatch.setattr("flame_moe.data.preprocess.CELLS", 10)
    pieces = Preprocessor.fit(store).plain()
    assert pieces["modalities"]["static"] == whole["modalities"]["static"]
    for name in ("vitals", "notes"):
        for key in ("mean", "scale"):
            np.testing.assert_allclose(pieces["modalities"][name][key], whole["modalities"][name][key], rtol=1e-9)


@pytest.mark.parametrize("scaling", ["standard", "quantile", "none"])
def test_what_is_not_observed_never_matters(scaling: str) -> None:
    generator = np.random.default_rng(0)
    values, observed = generator.normal(size=(50, 3)).astype(F), generator.random((50, 3)) < 0.5
    blank = np.where(observed, values, np.nan).astype(F)
    kinds = {"standard": Standard, "quantile": Quantile}
    scaler = kinds[scaling].fit([(values, observed)], 3) if scaling in kinds else Identity()
    np.testing.assert_array_equal(scaler.apply(blank, observed), scaler.apply(values, observed))
    assert (scaler.apply(blank, observed)[~observed] == 0).all()
    if scaling in kinds:
        assert kinds[scaling].fit([(blank, observed)], 3).plain() == scaler.plain()
