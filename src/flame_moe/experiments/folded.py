"""The controls with every sample tested once: five folds of all subjects instead of one split.

One split of 1,500 stays cannot tell models apart that differ by less than 0.01 AUROC. Here each variant learns the
recipe's first stage once per fold and predicts the fold it has not seen; a difference between two variants is the mean
over folds of the difference of their AUROC, with a bootstrap interval that resamples samples within each fold.
Baselines choose their settings on the validation part of each fold. What is done is kept and not redone.

    python -m flame_moe.experiments.folded RECIPE STORE OUT [--folds 5] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import logit

from flame_moe.data.store import Store
from flame_moe.environment import environment
from flame_moe.experiments.controls import VARIANTS, Array, Job, Variant, kept, work_off
from flame_moe.files import write_text
from flame_moe.recipes import load_recipe
from flame_moe.schema import Task
from flame_moe.training import weighted

_RESAMPLES, _TINY = 2000, 1e-9
PUBLISHED = Variant(
    "published",
    "FLAME, the paper's balance and interaction coefficients",
    changes=("model.balance=0.01", "model.interaction=0.1"),
)
ENCODERS = Variant("encoders", "control: encoders and heads, no block at all", changes=("model.blocks=0",))
_WHOLE = tuple(
    replace(v, seeds=1, arrange="first", label=v.label.replace("FLAME, stage by stage", "FLAME"))
    for v in (VARIANTS[0], PUBLISHED, *VARIANTS[1:], ENCODERS)
    if v.arrange == "stages"
)
SHARES = {0.25: "a quarter", 0.5: "half"}
"""Learning curve: share of the training subjects -> what the table calls it."""
FOLDED = (
    *_WHOLE,
    *(
        replace(v, name=f"{v.name}-{share}", label=f"{text} of the training data: {v.label}", share=share)
        for share, text in SHARES.items()
        for v in _WHOLE
        if v.name in ("stream", "no_moe", "encoders", "boosting")
    ),
)
BLENDS = {"mean log-odds of FLAME and boosted trees": ("stream", "boosting")}
"""Label -> the variants whose log-odds are averaged: what each knows that the other does not."""


def run(
    recipe: str, store: str, out: str, *, folds: int = 5, workers: int = 1, variants: Sequence[Variant] = FOLDED
) -> str:
    """Do what is not done yet, then write OUT/folded.json and OUT/folded.md; returns the table.

    Args:
        recipe: name or path; its first stage is learned. The seed of fold k is k.
        store: the sample store; its own split does not matter.
        out: folder for predictions and tables.
        folds: how many.
        workers: processes, one thread each.
        variants: the rows; differences are taken from the first that learns from the same share of the data.
    """
    jobs = [Job(v, k, recipe, store, out, fold=k, folds=folds) for k in range(folds) for v in variants]
    work_off(jobs, workers)
    opened = Store.open(store)
    tasks = [opened.tasks[name] for name in load_recipe(recipe).stages[0].tasks]
    tasks = [task for task in tasks if task.kind == "binary"]
    known = {v.name for v in variants}
    parts = {v.label: (v.name,) for v in variants} | {k: names for k, names in BLENDS.items() if known >= set(names)}
    areas = {
        label: {t.name: areas_of([[j for j in jobs if j.variant.name == n] for n in names], t) for t in tasks}
        for label, names in parts.items()
    }
    firsts = {v.share: areas[v.label] for v in reversed(variants)}
    shares = {v.label: v.share for v in variants}
    rows = [_row(label, areas[label], firsts[shares.get(label, variants[0].share)]) for label in parts]
    document = {
        "recipe": load_recipe(recipe).plain() | {"data": None},
        "environment": environment().plain(),
        "folds": folds,
        "rows": rows,
    }
    write_text(Path(out) / "folded.json", json.dumps(document, indent=1) + "\n")
    table = markdown(rows, tasks)
    write_text(Path(out) / "folded.md", table)
    return table


def areas_of(jobs: Sequence[Sequence[Job]], task: Task) -> Array:
    """(folds, 1 + resamples) AUROC of each fold: of the fold as it is, then of its resamples.

    The resamples depend on the fold alone, so that two variants are compared on the same ones.

    Args:
        jobs: one list per variant, each with a job per fold; log-odds are averaged over variants.
        task: binary.
    """
    rows = []
    for same_fold in zip(*jobs, strict=True):
        store = same_fold[0].split()
        target = store.target(task.name, store.indices(task.name, "test"))[:, 0].astype(np.float64)
        score = np.mean([logit(np.clip(kept(job)[task.name], _TINY, 1 - _TINY)) for job in same_fold], axis=0)
        counts = weighted.resample(len(target), _RESAMPLES, np.random.default_rng(same_fold[0].fold))
        weights = np.concatenate([np.ones((1, len(target))), counts])
        rows.append(weighted.ranking(target, score, weights)[0])
    return np.stack(rows)


def _row(label: str, areas: dict[str, Array], first: dict[str, Array]) -> dict[str, object]:
    found = {}
    for task, here in areas.items():
        gap = (first[task] - here).mean(axis=0)
        interval = np.nanpercentile(gap[1:], [2.5, 97.5]).tolist()
        found[task] = {
            "folds": here[:, 0].tolist(),
            "mean": float(here[:, 0].mean()),
            "sd": float(here[:, 0].std(ddof=1)),
            "ci": np.nanpercentile(here[:, 1:].mean(axis=0), [2.5, 97.5]).tolist(),
            "difference": None if areas is first else [float(gap[0]), *interval],
        }
    return {"label": label, "tasks": found}


def markdown(rows: Sequence[dict[str, object]], tasks: Sequence[Task]) -> str:
    """Per task: mean AUROC over folds with its interval, and FLAME minus each other, on equal data, with interval."""
    heads = [text for t in tasks for text in (f"{t.name} AUROC", "FLAME minus this one")]
    lines = ["| model | " + " | ".join(heads) + " |", "|" + "---|" * (1 + len(heads))]
    for row in rows:
        found = row["tasks"]
        assert isinstance(found, dict)
        cells = []
        for task in tasks:
            cell, gap = found[task.name], found[task.name]["difference"]
            cells.append(f"{cell['mean']:.4f} ({cell['ci'][0]:.3f} to {cell['ci'][1]:.3f})")
            cells.append("" if gap is None else f"{gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f})")
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m flame_moe.experiments.folded", description=__doc__)
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("store", help="the sample store")
    parser.add_argument("out", help="folder for predictions and tables")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    table = run(chosen.recipe, chosen.store, chosen.out, folds=chosen.folds, workers=chosen.workers)
    logging.getLogger(__name__).info("\n%s", table)


if __name__ == "__main__":
    main()
