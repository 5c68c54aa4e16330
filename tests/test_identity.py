"""Inference without task identity: right where groups differ, and said so where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import multivariate_normal

from flame_moe.batch import Observation, Sample
from flame_moe.continual import Learner
from flame_moe.continual.identity import PRIOR_SAMPLES, RANK, LowRankGaussian
from flame_moe.continual.identity_cost import IdentityCost, identity_cost
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import CheckpointError, DataError
from flame_moe.runs import run
from flame_moe.schema import Task
from flame_moe.scoring import predict
from tests.test_cli import flame, refused
from tests.test_errors import rewrite
from tests.tiny import BY_NAME, recipe

STAGES = (("death",), ("days",))


TASKS = (
    Task(name="death", kind="binary", modalities=("vitals",), classes=("no", "yes")),
    Task(name="days", kind="regression", modalities=("vitals",), classes=("days",)),
)


def written(path: Path, samples: Sequence[Sample]) -> Store:
    funnel = Funnel()
    funnel.start(len(samples), "made up")
    with StoreWriter(path, source="example", options={}, modalities=[BY_NAME["vitals"]], tasks=TASKS) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.finish(SplitSpec(), funnel)


def population(shift: float, labels: Sequence[str], start: int, n: int = 60) -> list[Sample]:
    """Samples with a level of their own, and labels that follow the first channel."""
    random = np.random.default_rng(start)
    found = []
    for i in range(start, start + n):
        values = random.normal(5.0 + shift, 1.0, (6, 3)).astype(np.float32)
        times = np.sort(random.random(6)).astype(np.float32)
        risk = float(values[:, 0].mean() - 5.0 - shift)
        targets = {"death": [float(risk > 0)], "days": [6.0 + risk]}
        known = {name: np.array(targets[name], np.float32) for name in labels}
        found.append(
            Sample(f"s{i}", f"p{i}", {"vitals": Observation(values, times, np.ones((6, 3), dtype=bool))}, known)
        )
    return found


def learned(store: Store, **more: object) -> Learner:
    learner = Learner(recipe(STAGES, train={"epochs": 1}, identity=True, **more))
    for stage in learner.recipe.stages:
        learner.learn(store, stage)
    return learner


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two stages on the same modality; their patients have other levels."""
    samples = population(0.0, ["death"], 0) + population(4.0, ["days"], 100)
    return written(tmp_path_factory.mktemp("levels") / "store", samples)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two stages on the same patients."""
    return written(tmp_path_factory.mktemp("alike") / "store", population(0.0, ["death", "days"], 0, n=120))


@pytest.fixture(scope="module")
def by_level(levels: Store) -> Learner:
    return learned(levels)


def test_the_density_is_that_of_the_covariance_written_out() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=(300, 12)) @ random.normal(size=(12, 12)) + 3.0
    fitted = LowRankGaussian.fit(z)
    d = z.shape[1]
    whole = np.cov(z.T, bias=True)
    whole = (300 * whole + PRIOR_SAMPLES * np.trace(whole) / d * np.eye(d)) / (300 + PRIOR_SAMPLES)
    values, vectors = np.linalg.eigh(whole)
    values[: d - RANK] = values[: d - RANK].mean()
    expected = multivariate_normal(z.mean(0), vectors @ np.diag(values) @ vectors.T).logpdf(z[:20])
    assert np.allclose(fitted.log_density(z[:20]), expected, atol=1e-4)


def test_groups_on_the_same_modality_are_told_apart_by_what_it_looks_like(by_level: Learner, levels: Store) -> None:
    found = identity_cost(by_level, levels)
    assert found.groups == ("stage 0, default", "stage 1, default")
    assert found.accuracy > 0.95
    assert found.told_apart
    assert "chosen with a mean accuracy" in found.sentence
    assert np.allclose(found.confusion.sum(axis=1), 1.0)
    death = next(t for t in found.tasks if t.task == "death")
    assert death.chosen == pytest.approx(death.known, abs=0.1)


def test_groups_of_the_same_patients_cannot_be_told_apart_and_that_is_said(alike: Store) -> None:
    learner = learned(alike)
    found = identity_cost(learner, alike)
    assert not found.told_apart
    assert found.accuracy == pytest.approx(0.5, abs=0.1)
    assert "cannot be told apart" in found.sentence
    rows = alike.indices("death", "test")
    certainty = learner.choose(alike, rows).certainty
    assert np.allclose(certainty.sum(axis=1), 1.0)
    assert np.median(certainty.max(axis=1)) < 0.75


def test_better_than_guessing_by_nothing_is_not_told_apart() -> None:
    """The digits of one set in four groups, as it was measured: 0.255 where guessing gives 0.25, and surely so."""
    found = IdentityCost("test", ("a", "b", "c", "d"), 0.255, (0.253, 0.257), np.eye(4), ())
    assert found.interval[0] > found.chance
    assert not found.told_apart
    assert "cannot be told apart" in found.sentence
    assert replace(found, accuracy=0.5, interval=(0.4, 0.6)).told_apart


def test_a_sample_goes_to_a_group_that_can_read_it(tiny_store: Store) -> None:
    learner = Learner(recipe((("death",), ("stage",)), train={"epochs": 1}, identity=True))
    for stage in learner.recipe.stages:
        learner.learn(tiny_store, stage)
    every = tiny_store.indices(modalities=("vitals", "static", "image", "notes"))
    choice = learner.choose(tiny_store, every)
    for g, task in enumerate(("death", "stage")):
        some = np.logical_or.reduce([tiny_store.present(m)[every] for m in learner.tasks[task].modalities])
        assert (choice.certainty[~some, g] == 0.0).all()
        assert some[choice.group == g].all()
        assert (~some).any()


def test_a_wrong_choice_costs_what_answering_the_base_rate_costs(by_level: Learner, levels: Store) -> None:
    """All samples sent to the other stage, which has no task of the same kind: the AUROC is that of a constant."""
    learner = Learner(by_level.recipe)
    learner.model, learner.preprocessor = by_level.model, by_level.preprocessor
    learner.stages = by_level.stages
    one, other = by_level.groups
    lying = [
        type(one)(g.stage, g.family, g.tasks, g.samples, looks.present, looks.gaussians)
        for g, looks in ((one, other), (other, one))
    ]
    learner.groups = lying
    found = {t.task: t for t in identity_cost(learner, levels).tasks}
    assert found["death"].accuracy < 0.05
    assert found["death"].chosen == pytest.approx(0.5, abs=0.1)
    assert found["days"].chosen < 0.1


def test_nothing_is_fitted_on_validation_or_test_samples(by_level: Learner, levels: Store, tmp_path: Path) -> None:
    for group, task in zip(by_level.groups, ("death", "days"), strict=True):
        assert group.samples == len(levels.indices(task, "train"))
    z = by_level._encoders().represent(levels, "vitals", levels.indices("death", "train"))[1]
    assert np.allclose(by_level.groups[0].gaussians["vitals"].mean, z.mean(axis=0))
    assert by_level.groups[0].present == {"vitals": 1.0}


def test_groups_are_saved_with_the_model_and_stay_as_they_are(by_level: Learner, levels: Store, tmp_path: Path) -> None:
    loaded = Learner.load(by_level.save(tmp_path / "model"))
    indices = levels.indices("days", "test")
    before, after = by_level.choose(levels, indices), loaded.choose(levels, indices)
    assert np.array_equal(before.certainty, after.certainty)
    assert [g.name for g in loaded.groups] == [g.name for g in by_level.groups]
    rewrite(tmp_path / "model", groups=[{"stage": 0}])
    with pytest.raises(CheckpointError, match="what samples look like is damaged"):
        Learner.load(tmp_path / "model")


def test_without_identity_nothing_is_kept_and_auto_says_why(alike: Store, tmp_path: Path) -> None:
    path = run(recipe((("death",),), train={"epochs": 1, "bootstrap": 0}), tmp_path / "run", store=alike).path
    refused(flame("predict", path, alike.path, "--task", "auto"), "keeps nothing to choose", "identity = true")
    refused(flame("evaluate", path, "--task", "auto"), "keeps nothing to choose")
    with pytest.raises(DataError):
        Learner.load(path / "model").choose(alike, [0])


def test_predict_auto_answers_each_sample_once_by_the_tasks_of_its_group(levels: Store, tmp_path: Path) -> None:
    plan = recipe(STAGES, train={"epochs": 1, "bootstrap": 0}, identity=True)
    done = run(plan, tmp_path / "run", store=levels)
    said: list[str] = []
    table = predict(done.path, levels.path, tasks=["auto"], split="test", say=said.append)
    assert {"stage", "family", "certainty"} <= set(table.columns)
    assert table["id"].n_unique() == len(table) == len(levels.indices(split="test"))
    told = predict(done.path, levels.path, tasks=["death"], split="test")
    ours = table.filter(pl.col("task") == "death")
    both = ours.join(told, on="id", suffix="_told")
    assert len(both) == len(ours) > 0
    assert np.allclose(both["probability"].to_numpy(), both["probability_told"].to_numpy(), atol=1e-5)
    shown = flame("evaluate", done.path, "--task", "auto")
    assert shown.exit_code == 0, shown.output
    assert "Without task identity: test split" in shown.stdout
    assert "mean accuracy" in shown.stdout
