"""The controls that could prove us wrong, side by side on one store: seeds, intervals, one table.

Every variant learns on the training split and chooses on the validation split; the test split is scored once per
variant and seed. A finished (variant, seed) is kept on disk and not redone.

    python -m flame_moe.experiments.controls RECIPE STORE OUT [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flame_moe.continual import Learner
from flame_moe.data.folds import judging_fold
from flame_moe.data.store import Store
from flame_moe.environment import environment
from flame_moe.experiments.baselines import Kind, fit_baseline, summary_matrix
from flame_moe.files import write_text
from flame_moe.recipes import load_recipe
from flame_moe.recorder import metric_target
from flame_moe.schema import Recipe, Stage, Task
from flame_moe.training import weighted
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint
from flame_moe.training.metrics import PRIMARY, aggregate, evaluate_predictions

_LOG = logging.getLogger(__name__)
_KIND, _VERSION = "flame-moe-test-predictions", 1
_RESAMPLES = 2000
TABLES = ("summary", "static")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: of its files.
        label: what the table calls it.
        seeds: how many, counted from 0.
        changes: to the recipe, as `flame_moe.recipes.load_recipe` takes them.
        arrange: the recipe's stages as they are, only the first, all tasks in one stage, or each task by itself.
        baseline: a scikit-learn control on the tables instead of a network.
        share: of the training subjects that it learns from (in folds only).
    """

    name: str
    label: str
    seeds: int = 3
    changes: tuple[str, ...] = ()
    arrange: Literal["stages", "first", "joint", "alone"] = "stages"
    baseline: Kind | None = None
    share: float = 1.0


VARIANTS = (
    Variant("stream", "FLAME, stage by stage (default)", seeds=5),
    Variant("joint", "FLAME, all tasks jointly", arrange="joint"),
    Variant("alone", "FLAME, each task alone", arrange="alone"),
    Variant("no_moe", "control: no experts", changes=("model.preset=no_moe",)),
    Variant("dense", "control: dense, equal active parameters", changes=("model.preset=dense",)),
    Variant("shared_router", "control: one router for all modalities", changes=("model.preset=shared_router",)),
    Variant("logistic", "logistic / ridge regression", seeds=1, baseline="logistic"),
    Variant("boosting", "boosted trees", baseline="boosting"),
)


@dataclass(frozen=True)
class Job:
    """One variant with one seed, on the store's own split or on one of `folds` in which every sample is tested once."""

    variant: Variant
    seed: int
    recipe: str
    store: str
    out: str
    fold: int | None = None
    folds: int = 5

    @property
    def folder(self) -> Path:
        part = "" if self.fold is None else f"-fold{self.fold}of{self.folds}"
        return Path(self.out) / "predictions" / f"{self.variant.name}-{self.seed}{part}"

    def split(self) -> Store:
        """The store as this job learns and tests on it."""
        store = Store.open(self.store)
        if self.fold is None:
            return store
        return judging_fold(store, self.fold, self.folds, share=self.variant.share)


def work(job: Job) -> None:
    """Train one variant with one seed and keep its test predictions."""
    torch.set_num_threads(1)
    recipe = load_recipe(job.recipe, [f"seed={job.seed}", *job.variant.changes])
    store = job.split()
    predictions = dict(_baseline(job, recipe, store) if job.variant.baseline else _network(job, recipe, store))
    tensors = {name: torch.from_numpy(values) for name, values in predictions.items()}
    save_checkpoint(job.folder, tensors, {"label": job.variant.label}, kind=_KIND, version=_VERSION)


def _network(job: Job, recipe: Recipe, store: Store) -> Iterator[tuple[str, Array]]:
    for stages in _arranged(job.variant, recipe):
        learner = Learner(recipe)
        for stage in stages:
            learner.learn(store, stage)
        for name in learner.tasks:
            yield name, learner.predict(store, name, store.indices(name, "test")).values


def _arranged(variant: Variant, recipe: Recipe) -> list[list[Stage]]:
    """The streams that a variant learns, each from a fresh network; a task alone keeps its stage's settings."""
    if variant.arrange == "alone":
        return [[s.model_copy(update={"tasks": (name,)})] for s in recipe.stages for name in s.tasks]
    if variant.arrange == "joint":
        return [[recipe.stages[0].model_copy(update={"tasks": _tasks(recipe)})]]
    return [list(recipe.stages[:1] if variant.arrange == "first" else recipe.stages)]


def _tasks(recipe: Recipe, variant: Variant | None = None) -> tuple[str, ...]:
    first = variant is not None and variant.arrange == "first"
    return tuple(name for stage in recipe.stages[: 1 if first else None] for name in stage.tasks)


def _baseline(job: Job, recipe: Recipe, store: Store) -> Iterator[tuple[str, Array]]:
    assert job.variant.baseline is not None
    # Series enter by statistics of their own where the source has not summed them up in a table already.
    tables = TABLES if set(TABLES) <= store.modalities.keys() else None
    for name in _tasks(recipe, job.variant):
        fitted = fit_baseline(job.variant.baseline, store, name, seed=job.seed, modalities=tables)
        _LOG.info("%s on %s: %s, validation %.4f", job.variant.name, name, dict(fitted.setting), fitted.val_score)
        yield name, fitted.predict(summary_matrix(store, store.indices(name, "test"), fitted.modalities)[0])


def run(recipe: str, store: str, out: str, *, workers: int = 1, variants: Sequence[Variant] = VARIANTS) -> str:
    """Do what is not done yet, then write OUT/controls.json and OUT/controls.md; returns the table."""
    jobs = [Job(v, seed, recipe, store, out) for seed in range(max(v.seeds for v in variants)) for v in variants]
    jobs = [job for job in jobs if job.seed < job.variant.seeds]
    work_off(jobs, workers)
    opened = Store.open(store)
    tasks = [opened.tasks[name] for name in _tasks(load_recipe(recipe))]
    rows = [_row(opened, tasks, v, jobs) for v in variants]
    document = {
        "recipe": load_recipe(recipe).plain() | {"data": None},
        "environment": environment().plain(),
        "test_samples": {task.name: len(opened.indices(task.name, "test")) for task in tasks},
        "rows": rows,
    }
    write_text(Path(out) / "controls.json", json.dumps(document, indent=1) + "\n")
    table = markdown(rows, tasks)
    write_text(Path(out) / "controls.md", table)
    return table


def work_off(jobs: Sequence[Job], workers: int) -> None:
    """Do the jobs that are not done yet, several at a time; the first that fails stops the rest."""
    todo = [job for job in jobs if not job.folder.exists()]
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        for number, (job, _) in enumerate(zip(todo, pool.map(work, todo), strict=True), start=1):
            _LOG.info("%d of %d done: %s", number, len(todo), job.folder.name)


def kept(job: Job) -> dict[str, Array]:
    """Task -> the test predictions that a finished job has left."""
    tensors = load_checkpoint(job.folder, kind=_KIND, version=_VERSION)[0]
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _row(store: Store, tasks: Sequence[Task], variant: Variant, jobs: Sequence[Job]) -> dict[str, object]:
    """Per task: each seed's metrics, their aggregate, the metrics of the averaged prediction, and distance to FLAME."""
    mine = [kept(j) for j in jobs if j.variant == variant]
    first = [kept(j) for j in jobs if j.variant == jobs[0].variant]
    found = {}
    for task in tasks:
        indices = store.indices(task.name, "test")
        target = metric_target(task, store.target(task.name, indices))
        each = [_metrics(task, target, p[task.name]) for p in mine]
        metric = PRIMARY[task.kind]
        averaged = np.mean([p[task.name] for p in mine], axis=0)
        reference = np.mean([p[task.name] for p in first], axis=0)
        scores = evaluate_predictions(
            task.kind, target, averaged, classes=task.classes, subjects=store.subjects(indices), bootstrap=_RESAMPLES
        )
        seeds = aggregate([row[metric] for row in each])
        found[task.name] = {
            "metric": metric,
            "seeds": each,
            "mean": seeds.mean,
            "sd": None if np.isnan(seeds.sd) else seeds.sd,
            "averaged": {"metrics": scores.metrics, "ci": scores.ci},
            "difference": _difference(task, target, averaged, reference) if variant != jobs[0].variant else None,
        }
    return {"name": variant.name, "label": variant.label, "seeds": variant.seeds, "tasks": found}


def _metrics(task: Task, target: NDArray[np.float32], prediction: Array) -> dict[str, float]:
    return dict(evaluate_predictions(task.kind, target, prediction, classes=task.classes, bootstrap=0).metrics)


def _difference(task: Task, target: NDArray[np.float32], here: Array, there: Array) -> list[float] | None:
    """Paired bootstrap of AUROC(first variant) - AUROC(this one): estimate and 95 % interval; binary tasks only."""
    if task.kind != "binary":
        return None
    counts = weighted.resample(len(target), _RESAMPLES, np.random.default_rng(0))
    weights = np.concatenate([np.ones((1, len(target))), counts])
    y = target.astype(np.float64)
    gap = weighted.ranking(y, there, weights)[0] - weighted.ranking(y, here, weights)[0]
    low, high = np.nanpercentile(gap[1:], [2.5, 97.5])
    return [float(gap[0]), float(low), float(high)]


def markdown(rows: Sequence[dict[str, object]], tasks: Sequence[Task]) -> str:
    """Two tables: single models (mean and sd over seeds), and the average over seeds with its interval."""
    heads = [f"{task.name} {PRIMARY[task.kind].upper()}" for task in tasks]
    single = _table(["model", "seeds", *heads], rows, lambda found: [_spread(found)])
    paired = tasks[0]
    averaged = _table(
        ["average over its seeds", "seeds", *heads],
        rows,
        lambda found: [f"{_value(found)} ({_bound(found, 0)} to {_bound(found, 1)})"],
    )
    gaps = [f"- {row['label']}: {text}" for row in rows if (text := _gap(row, paired.name))]
    note = f"{paired.name}: AUROC of the first row minus the other, both averaged over seeds, paired bootstrap:"
    return "\n\n".join([single, averaged, note + "\n\n" + "\n".join(gaps)]) + "\n"


def _table(
    heads: Sequence[str], rows: Sequence[dict[str, object]], cells: Callable[[dict[str, object]], list[str]]
) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        tasks = row["tasks"]
        assert isinstance(tasks, dict)
        values = [text for found in tasks.values() for text in cells(found)]
        lines.append("| " + " | ".join([str(row["label"]), str(row["seeds"]), *values]) + " |")
    return "\n".join(lines)


def _spread(found: dict[str, object]) -> str:
    return f"{found['mean']:.3f}" if found["sd"] is None else f"{found['mean']:.3f} +- {found['sd']:.3f}"


def _value(found: dict[str, object]) -> str:
    averaged = found["averaged"]
    assert isinstance(averaged, dict)
    return f"{averaged['metrics'][found['metric']]:.3f}"


def _bound(found: dict[str, object], side: int) -> str:
    averaged = found["averaged"]
    assert isinstance(averaged, dict)
    return f"{averaged['ci'][found['metric']][side]:.3f}"


def _gap(row: dict[str, object], task: str) -> str:
    tasks = row["tasks"]
    assert isinstance(tasks, dict)
    gap = tasks[task]["difference"]
    return "" if gap is None else f"{gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f})"


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m flame_moe.experiments.controls", description=__doc__)
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("store", help="the sample store")
    parser.add_argument("out", help="folder for predictions and tables")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger(__name__).info("\n%s", run(chosen.recipe, chosen.store, chosen.out, workers=chosen.workers))


if __name__ == "__main__":
    main()
