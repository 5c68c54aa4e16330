"""Metrics agree with scikit-learn, also under weights and ties, and refuse what cannot be scored."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from flame_moe.errors import DataError
from flame_moe.training import weighted
from flame_moe.training.metrics import (
    PRIMARY,
    aggregate,
    calibration_curve,
    calibration_pairs,
    evaluate_predictions,
)

few_distinct = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])


@st.composite
def scored(draw: st.DrawFn, probability: st.SearchStrategy[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target with both classes, scores, and bootstrap-like weights that keep both classes."""
    n = draw(st.integers(2, 40))
    y = draw(hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 1.0])))
    y[:2] = 0.0, 1.0
    p = draw(hnp.arrays(np.float64, n, elements=probability))
    w = draw(hnp.arrays(np.float64, n, elements=st.integers(0, 4).map(float)))
    w[:2] = np.maximum(w[:2], 1.0)
    return y, p, w


def binary(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    return evaluate_predictions("binary", y, p, classes=("no", "yes"), bootstrap=0).metrics


@settings(max_examples=150, deadline=None)
@given(scored(few_distinct) | scored(st.floats(0, 1)))
def test_binary_metrics_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, p, _ = case
    ours = binary(y, p)
    hard = p >= 0.5
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert ours["auprc"] == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)
    assert ours["f1"] == pytest.approx(sk.f1_score(y, hard), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(y, hard), abs=1e-12)
    assert ours["brier"] == pytest.approx(sk.brier_score_loss(y, p), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(scored(few_distinct) | scored(st.floats(0, 1)))
def test_a_resample_is_what_scikit_learn_calls_sample_weight(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, p, w = case
    auroc, auprc = weighted.ranking(y, p, w[None])
    hard = (p >= 0.5).astype(float)
    assert auroc[0] == pytest.approx(sk.roc_auc_score(y, p, sample_weight=w), abs=1e-12)
    assert auprc[0] == pytest.approx(sk.average_precision_score(y, p, sample_weight=w), abs=1e-12)
    assert weighted.f1(y, hard, w[None])[0] == pytest.approx(sk.f1_score(y, hard, sample_weight=w), abs=1e-12)
    assert weighted.mean((y - p) ** 2, w[None])[0] == pytest.approx(sk.brier_score_loss(y, p, sample_weight=w))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_weighting_a_sample_k_times_is_repeating_it_k_times(data: st.DataObject) -> None:
    y, p, w = data.draw(scored(few_distinct))
    again = np.repeat(np.arange(len(y)), w.astype(int))
    ones = np.ones((1, len(again)))
    assert weighted.calibration_error(y, p, w[None]) == pytest.approx(
        weighted.calibration_error(y[again], p[again], ones), abs=1e-12
    )
    for mine, repeated in zip(weighted.ranking(y, p, w[None]), weighted.ranking(y[again], p[again], ones), strict=True):
        assert mine == pytest.approx(repeated, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_multiclass_metrics_equal_scikit_learn(seed: int, classes: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    y = np.append(np.arange(classes), rng.integers(0, classes, n - classes))
    p = rng.dirichlet(np.ones(classes), n)
    if ties:
        p = np.round(p, 1) + 0.01
        p /= p.sum(axis=1, keepdims=True)
    ours = evaluate_predictions("multiclass", y, p, classes=[f"c{i}" for i in range(classes)], bootstrap=0).metrics
    hot = np.eye(classes)[y]
    top = p.argmax(axis=1)
    assert ours["auroc"] == pytest.approx(sk.roc_auc_score(hot, p, average="macro"), abs=1e-12)
    assert ours["auprc"] == pytest.approx(sk.average_precision_score(hot, p, average="macro"), abs=1e-12)
    assert ours["f1"] == pytest.approx(sk.f1_score(y, top, average="macro"), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(y, top), abs=1e-12)
    assert ours["brier"] == pytest.approx(((p - hot) ** 2).sum(axis=1).mean(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25))
def test_multilabel_metrics_equal_scikit_learn(seed: int, labels: int) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.random((50, labels)) < 0.3).astype(float)
    y[0], y[1] = 0.0, 1.0
    p = np.round(rng.random((50, labels)), 1)
    ours = evaluate_predictions("multilabel", y, p, classes=[f"l{i}" for i in range(labels)], bootstrap=0).metrics
    hard = (p >= 0.5).astype(int)
    each = range(labels)
    assert ours["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(y[:, i], p[:, i]) for i in each]), abs=1e-12)
    ap = np.mean([sk.average_precision_score(y[:, i], p[:, i]) for i in each])
    assert ours["auprc"] == pytest.approx(ap, abs=1e-12)
    f1 = np.mean([sk.f1_score(y[:, i], hard[:, i], zero_division=np.nan) for i in each])
    assert ours["f1"] == pytest.approx(f1, abs=1e-12)
    assert ours["accuracy"] == pytest.approx((hard == y).mean(), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.0, 1e6, -3e4]))
def test_regression_metrics_equal_scikit_learn(seed: int, width: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    y, p = rng.normal(offset, 3, (30, width)), rng.normal(offset, 3, (30, width))
    names = [f"v{i}" for i in range(width)]
    ours = evaluate_predictions("regression", y, p, classes=names, bootstrap=0).metrics
    assert ours["rmse"] == pytest.approx(sk.root_mean_squared_error(y, p), rel=1e-9)
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(y, p), rel=1e-9)
    assert ours["r2"] == pytest.approx(sk.r2_score(y, p), rel=1e-9)
    w = rng.integers(0, 4, 30).astype(float)
    expected = sk.r2_score(y[:, 0], p[:, 0], sample_weight=w)
    assert weighted.explained(y[:, 0], p[:, 0], w[None])[0] == pytest.approx(expected, rel=1e-8)


def test_the_calibration_error_is_the_weighted_gap_of_its_bins() -> None:
    y = np.array([0.0, 1.0, 1.0, 0.0])
    p = np.array([0.01, 0.02, 0.98, 1.0])
    assert binary(y, p)["ece"] == pytest.approx(0.5 * abs(0.015 - 0.5) + 0.5 * abs(0.99 - 0.5))


def test_a_perfectly_calibrated_prediction_has_no_calibration_error() -> None:
    y = np.array([0.0, 0.0, 0.0, 1.0])
    assert binary(y, np.full(4, 0.25))["ece"] == 0.0


def test_the_interval_is_the_percentile_interval_of_honest_resampling() -> None:
    rng = np.random.default_rng(3)
    y = (rng.random(300) < 0.3).astype(float)
    p = np.clip(0.3 * y + rng.random(300) * 0.7, 0, 1)
    scores = evaluate_predictions("binary", y, p, classes=("no", "yes"), bootstrap=2000)
    slow = []
    for _ in range(2000):
        i = rng.integers(0, 300, 300)
        slow.append(sk.roc_auc_score(y[i], p[i]))
    low, high = np.percentile(slow, [2.5, 97.5])
    assert scores.ci["auroc"][0] == pytest.approx(low, abs=0.006)
    assert scores.ci["auroc"][1] == pytest.approx(high, abs=0.006)
    assert all(lo <= scores.metrics[name] <= hi for name, (lo, hi) in scores.ci.items() if name != "ece")


def test_samples_of_one_subject_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat((rng.random(40) < 0.5).astype(float), 25)
    p = np.clip(np.repeat(0.3 * y[::25] + rng.random(40) * 0.7, 25), 0, 1)
    subjects = np.repeat([f"s{i}" for i in range(40)], 25)
    alone = evaluate_predictions("binary", y, p, classes=("no", "yes")).ci["auroc"]
    together = evaluate_predictions("binary", y, p, classes=("no", "yes"), subjects=list(subjects)).ci["auroc"]
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_a_large_test_set_gives_the_same_interval_when_weights_are_made_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    y, p = (rng.random(200) < 0.4).astype(float), rng.random(200)
    whole = evaluate_predictions("binary", y, p, classes=("no", "yes"))
    monkeypatch.setattr("flame_moe.training.metrics.CELLS_AT_ONCE", 1000)
    parts = evaluate_predictions("binary", y, p, classes=("no", "yes"))
    assert whole.ci.keys() == parts.ci.keys()
    for name in whole.ci:
        assert whole.ci[name] == pytest.approx(parts.ci[name])


def test_every_unit_is_drawn_equally_often() -> None:
    counts = weighted.resample(10, 4000, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 10).all()
    assert np.abs(counts.mean(axis=0) - 1.0).max() < 0.06


def test_500_resamples_of_1500_predictions_take_a_moment() -> None:
    rng = np.random.default_rng(0)
    y, p = (rng.random(1500) < 0.2).astype(float), rng.random(1500)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        evaluate_predictions("binary", y, p, classes=("no", "yes"), bootstrap=500)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.6


def test_one_class_gives_nan_and_a_note() -> None:
    scores = evaluate_predictions("binary", [0, 0, 0], [0.1, 0.2, 0.3], classes=("alive", "died"))
    assert np.isnan(scores.metrics["auroc"])
    assert np.isnan(scores.metrics["auprc"])
    assert np.isnan(scores.ci["auroc"][0])
    assert scores.metrics["accuracy"] == 1.0
    assert "every sample is 'alive'" in scores.note
    assert scores.prevalence == {"alive": 1.0, "died": 0.0}


def test_a_label_without_positives_is_left_out_of_the_mean_and_named() -> None:
    y = np.array([[0, 0], [1, 0], [1, 0], [0, 0]])
    p = np.array([[0.1, 0.3], [0.9, 0.2], [0.8, 0.1], [0.2, 0.2]])
    scores = evaluate_predictions("multilabel", y, p, classes=("common", "absent"), bootstrap=50)
    assert scores.metrics["auroc"] == 1.0
    assert scores.metrics["f1"] == 1.0
    assert "absent" in scores.note
    assert "common" not in scores.note


def test_a_constant_regression_target_has_no_r2() -> None:
    scores = evaluate_predictions("regression", [3.3, 3.3, 3.3], [3.0, 3.1, 3.2], classes=("los",), bootstrap=20)
    assert np.isnan(scores.metrics["r2"])
    assert "los" in scores.note
    assert scores.metrics["mae"] == pytest.approx(0.2)


def test_resamples_without_the_metric_are_told() -> None:
    scores = evaluate_predictions("binary", [0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.2, 0.9], classes=("no", "yes"))
    assert "of 500 resamples" in scores.note
    assert not np.isnan(scores.ci["auroc"][0])


def test_one_subject_has_no_interval() -> None:
    scores = evaluate_predictions("binary", [0, 1], [0.1, 0.9], classes=("no", "yes"), subjects=["a", "a"])
    assert np.isnan(scores.ci["auroc"]).all()
    assert "one subject" in scores.note


def test_inputs_are_not_changed() -> None:
    y, p = np.array([0.0, 1.0]), np.array([0.0, 1.0 + 5e-7])
    kept = y.copy(), p.copy()
    evaluate_predictions("binary", y, p, classes=("no", "yes"))
    assert (y == kept[0]).all()
    assert (p == kept[1]).all()


@pytest.mark.parametrize(
    ("kind", "target", "prediction", "classes", "told"),
    [
        ("binary", [0, 1, 1], [0.1, np.nan, 0.2], "ny", ["nan", "prediction, sample 1"]),
        ("binary", [0, np.nan], [0.1, 0.2], "ny", ["nan", "target, sample 1"]),
        ("binary", [0, 1], [0.1, np.inf], "ny", ["inf", "prediction, sample 1"]),
        ("binary", [0, 1], [-2.0, 3.0], "ny", ["not a probability", "logits"]),
        ("binary", [0, 2], [0.1, 0.2], "ny", ["not a label", "sample 1", "0 to 1"]),
        ("multiclass", [0, 3], [[0.5, 0.3, 0.2]] * 2, "abc", ["not a label", "0 to 2"]),
        ("multiclass", [0, 1], [[0.5, 0.5]] * 2, "abc", ["shape (2, 2)", "(2, 3)"]),
        ("multilabel", [[0, 1], [1, 0.5]], [[0.5, 0.5]] * 2, "ab", ["sample 1, column 1"]),
        ("regression", [1.0, 2.0], [1.0, 2.0, 3.0], "a", ["shape (3, 1)"]),
        ("binary", [], [], "ny", ["no samples"]),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_place(kind, target, prediction, classes, told) -> None:
    with pytest.raises(DataError) as error:
        evaluate_predictions(kind, target, prediction, classes=list(classes))
    assert all(word in str(error.value) for word in told)


def test_subjects_must_be_one_per_sample() -> None:
    with pytest.raises(DataError, match="2 samples but 1 subjects"):
        evaluate_predictions("binary", [0, 1], [0.1, 0.2], classes=("no", "yes"), subjects=["a"])


def test_calibration_bins_hold_every_prediction_once() -> None:
    rng = np.random.default_rng(0)
    p = np.append(rng.random(500), [0.0, 1.0])
    y = (rng.random(502) < p).astype(float)
    bins = calibration_curve(y, p, bins=10)
    assert sum(b.n for b in bins) == 502
    assert all(b.low <= b.confidence <= b.high for b in bins)
    assert sum(b.n * b.frequency for b in bins) == pytest.approx(y.sum())


def test_a_multiclass_calibration_curve_reads_the_top_class() -> None:
    y, p = calibration_pairs("multiclass", [0, 1], [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], 3)
    assert y.tolist() == [1.0, 0.0]
    assert p.tolist() == [0.7, 0.6]


def test_regression_has_no_calibration() -> None:
    with pytest.raises(DataError, match="no probabilities"):
        calibration_pairs("regression", [1.0], [1.0], 1)


def test_the_interval_over_seeds_is_the_t_interval() -> None:
    result = aggregate([1.0, 2.0, 3.0])
    assert result.mean == 2.0
    assert result.sd == 1.0
    assert result.high - result.mean == pytest.approx(4.302652729911275 / np.sqrt(3))
    assert result.mean - result.low == pytest.approx(result.high - result.mean)


def test_one_seed_has_no_spread() -> None:
    result = aggregate([0.8])
    assert result.mean == 0.8
    assert np.isnan([result.sd, result.low, result.high]).all()


def test_no_seeds_are_refused() -> None:
    with pytest.raises(DataError, match="no values"):
        aggregate([])


def test_every_kind_has_a_primary_metric_that_is_computed() -> None:
    cases = {
        "binary": ([0, 1], [0.2, 0.8], ["n", "y"]),
        "multiclass": ([0, 1], [[0.8, 0.2], [0.1, 0.9]], ["a", "b"]),
        "multilabel": ([[0, 1], [1, 0]], [[0.2, 0.8], [0.7, 0.1]], ["a", "b"]),
        "regression": ([1.0, 2.0], [1.1, 1.9], ["v"]),
    }
    for kind, (y, p, classes) in cases.items():
        assert PRIMARY[kind] in evaluate_predictions(kind, y, p, classes=classes, bootstrap=0).metrics
