"""Controls: a linear model and boosted trees on one row of numbers per sample.

What a network has to beat to have earned its complexity. Both kinds are fitted on the training split only, choose
among equally many settings on the validation split, and never see the test split; scoring is the caller's, once:

    logistic   logistic regression, or ridge regression for a regression task; standardised, missing values replaced
               by the median of the training split, with an indicator column for each column that has missing values
    boosting   scikit-learn's histogram gradient boosting, which splits on missing values by itself

A task with several labels or values gets one model per label or value, all with the same setting. Settings with
balanced class weights rank about as well but give probabilities that are too high for the rarer class: read the
Brier score and the calibration with `Baseline.setting` in view.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from flame_moe.data.store import Store
from flame_moe.errors import DataError, nearest
from flame_moe.experiments.summaries import summarised
from flame_moe.results import PRIMARY
from flame_moe.schema import Task
from flame_moe.training.metrics import evaluate_predictions

Kind = Literal["logistic", "boosting"]
Setting = Mapping[str, Any]
Array = NDArray[np.float64]

KINDS: tuple[Kind, ...] = ("logistic", "boosting")
_LOG = logging.getLogger(__name__)


def _grid(**choices: Sequence[Any]) -> tuple[Setting, ...]:
    return tuple(dict(zip(choices, values, strict=True)) for values in product(*choices.values()))


_WEIGHTS = (None, "balanced")
GRIDS: dict[tuple[Kind, bool], tuple[Setting, ...]] = {
    ("logistic", True): _grid(C=(0.001, 0.003, 0.01, 0.1), class_weight=_WEIGHTS),
    ("boosting", True): _grid(max_leaf_nodes=(6, 12), max_features=(0.1, 0.3), class_weight=_WEIGHTS),
    ("logistic", False): _grid(alpha=(1.0, 10.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5)),
    ("boosting", False): _grid(max_leaf_nodes=(6, 12), max_features=(0.1, 0.3), min_samples_leaf=(10, 40)),
}
"""(kind, whether the task has classes) -> the settings tried; equally many for both kinds."""
_BOOSTING = {"learning_rate": 0.05, "max_iter": 200, "l2_regularization": 5.0, "early_stopping": False}


@dataclass(frozen=True)
class Baseline:
    """A fitted control.

    Attributes:
        kind: logistic or boosting.
        task: what it predicts.
        modalities: what it reads, in the order of its columns.
        names: of its columns.
        setting: chosen on the validation split.
        metric: by which: AUROC, or R2 for a regression task.
        val_score: of the chosen setting.
        tried: every setting with its score on the validation split.
        estimators: one fitted scikit-learn model, or one per label or value.
    """

    kind: Kind
    task: Task
    modalities: tuple[str, ...]
    names: tuple[str, ...]
    setting: Setting
    metric: str
    val_score: float
    tried: tuple[tuple[Setting, float], ...]
    estimators: tuple[Any, ...]

    def predict(self, X: Array) -> Array:
        """Predictions for rows of `summary_matrix`.

        Args:
            X: (n, columns), NaN where not observed.

        Returns:
            Probabilities (n,), (n, classes) or (n, labels), or values (n, values) in natural units.

        Raises:
            DataError: if `X` has another number of columns than the model was fitted on.
        """
        if X.ndim != 2 or X.shape[1] != len(self.names):
            mend = "Make it with summary_matrix(store, indices, baseline.modalities)."
            raise DataError(f"{X.shape} is not (rows, {len(self.names)} columns)", where=self.task.name, mend=mend)
        return _predict(self.task, self.estimators, X)


def summary_matrix(store: Store, indices: ArrayLike, modalities: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """One row of numbers per sample: tables as they are, anything longer by statistics of fixed width.

    Args:
        store: where the samples are.
        indices: k samples.
        modalities: which modalities, in this order.

    Returns:
        (k, columns) with NaN where nothing was observed, and the names of the columns: `static.age`,
        `vitals.HR.mean`. What a kind of modality is summarised by is in `flame_moe.experiments.summaries`.

    Raises:
        DataError: if a modality is unknown, or there is none.
    """
    if not modalities:
        raise DataError("a summary needs at least one modality", mend=nearest("", store.modalities))
    for name in modalities:
        if name not in store.modalities:
            raise DataError(f"unknown modality '{name}'", mend=nearest(name, store.modalities))
    rows = np.asarray(indices, dtype=np.int64)
    blocks = [(name, *summarised(store, name, rows)) for name in modalities]
    names = tuple(f"{name}.{column}" for name, _, columns in blocks for column in columns)
    return np.concatenate([block for _, block, _ in blocks], axis=1), names


def fit_baseline(
    kind: Kind, store: Store, task: str, seed: int = 0, modalities: Sequence[str] | None = None, threads: int = 1
) -> Baseline:
    """Fit every setting on the training split and keep the one that is best on the validation split.

    Args:
        kind: logistic or boosting.
        store: where the samples are.
        task: which task.
        seed: of the columns that boosting draws for each split; the linear models have no randomness.
        modalities: what to read; those of the task if None.
        threads: of the fit; on sets of some thousand samples more than one costs more than it gains.

    Raises:
        DataError: if the kind, task or a modality is unknown, or a split has too few labels to fit or to choose on.

    Example:
        baseline = fit_baseline("boosting", store, "mortality", modalities=("summary", "static"))
        test = store.indices("mortality", "test")
        X, _ = summary_matrix(store, test, baseline.modalities)
        probability = baseline.predict(X)
    """
    if kind not in KINDS:
        raise DataError(f"unknown kind of baseline '{kind}'", mend=nearest(kind, KINDS))
    train, val = store.indices(task, "train"), store.indices(task, "val")
    description = store.tasks[task]
    read = tuple(modalities if modalities is not None else description.modalities)
    for name, part in (("train", train), ("val", val)):
        if len(part) == 0:
            raise DataError(f"the {name} split has no labelled sample", where=f"task '{task}'")
    X, names = summary_matrix(store, train, read)
    X_val, _ = summary_matrix(store, val, read)
    y, y_val = store.target(task, train), store.target(task, val)
    _refuse_constant(description, y)
    metric = PRIMARY[description.kind]
    tried: list[tuple[Setting, float]] = []
    best: tuple[float, Setting, tuple[Any, ...]] | None = None
    for setting in GRIDS[kind, description.kind != "regression"]:
        with threadpool_limits(threads):
            estimators = _fit(kind, description, setting, seed, X, y)
            prediction = _predict(description, estimators, X_val)
        scores = evaluate_predictions(description.kind, y_val, prediction, classes=description.classes, bootstrap=0)
        score = scores.metrics[metric]
        _LOG.info("%s on %s: %s of %s is %.4f on val", kind, task, metric, dict(setting), score)
        tried.append((setting, score))
        if best is None or score > best[0]:
            best = (score, setting, estimators)
    if best is None or np.isnan(best[0]):
        mend = "Use a larger validation split."
        raise DataError(f"{metric} does not exist on the validation split", where=f"task '{task}'", mend=mend)
    return Baseline(kind, description, read, names, best[1], metric, best[0], tuple(tried), best[2])


def _refuse_constant(task: Task, y: NDArray[np.float32]) -> None:
    for column, name in zip(y.T, task.classes[-task.target_width :], strict=True):
        if (column == column[0]).all():
            mend = "A model needs more than one; use a larger training split."
            raise DataError(
                f"'{name}' has a single value in the training split", where=f"task '{task.name}'", mend=mend
            )


def _fit(kind: Kind, task: Task, setting: Setting, seed: int, X: Array, y: NDArray[np.float32]) -> tuple[Any, ...]:
    """One fitted model per column of the target."""
    return tuple(_model(kind, task, setting, seed).fit(X, column) for column in y.T)


def _model(kind: Kind, task: Task, setting: Setting, seed: int) -> BaseEstimator:
    if kind == "boosting":
        boosting = HistGradientBoostingRegressor if task.kind == "regression" else HistGradientBoostingClassifier
        return boosting(**_BOOSTING, **setting, random_state=seed)
    linear = Ridge(**setting) if task.kind == "regression" else LogisticRegression(**setting, max_iter=5000)
    # A column without any value in the training split stays, as zeros, so that the columns keep their places.
    imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    return make_pipeline(imputer, StandardScaler(), linear)


def _predict(task: Task, estimators: tuple[Any, ...], X: Array) -> Array:
    if task.kind == "regression":
        return np.stack([estimator.predict(X) for estimator in estimators], axis=1)
    if task.kind == "multiclass":
        # A class that is not in the training split has no column in the model and gets probability 0.
        probabilities = np.zeros((len(X), len(task.classes)))
        probabilities[:, estimators[0].classes_.astype(int)] = estimators[0].predict_proba(X)
        return probabilities
    positive = np.stack([estimator.predict_proba(X)[:, 1] for estimator in estimators], axis=1)
    return positive[:, 0] if task.kind == "binary" else positive
