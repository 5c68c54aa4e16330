"""Realistic results of invented runs, for tests of the format and of the report."""

from __future__ import annotations

import math

import numpy as np

from flame_moe.results import (
    Calibration,
    CalibrationBin,
    Commit,
    Comparison,
    DataSummary,
    Drift,
    Environment,
    Epoch,
    Evaluation,
    Footprint,
    Funnel,
    FunnelStep,
    Missingness,
    Pattern,
    Prevalence,
    Results,
    Routing,
    StageRecord,
    Truncation,
)
from flame_moe.schema import Task

LABELS = tuple(f"phenotype {i:02d}" for i in range(25))
MORTALITY = Task(
    name="mortality",
    kind="binary",
    modalities=("vitals", "labs", "static"),
    classes=("survived", "died"),
    family="outcome",
    description="Death in hospital, predicted at hour 48.",
)
STAY = Task(
    name="length_of_stay",
    kind="regression",
    modalities=("vitals", "static"),
    classes=("days",),
    description="Remaining days in hospital.",
    caveat="Deaths end the stay early.",
)
SHOCK = Task(
    name="shock",
    kind="multiclass",
    modalities=("vitals", "labs"),
    classes=("none", "septic", "cardiogenic"),
    description="Shock in the following 24 hours.",
)
PHENOTYPES = Task(
    name="phenotyping",
    kind="multilabel",
    modalities=("vitals", "labs", "notes"),
    classes=LABELS,
    description="25 acute and chronic conditions.",
)
STREAM = ((MORTALITY, STAY), (SHOCK,), (PHENOTYPES,))


def binary_task(name: str) -> Task:
    return Task(name=name, kind="binary", modalities=("vitals",), classes=("no", "yes"), description="An event.")


def nine_tasks() -> tuple[tuple[Task, ...], ...]:
    """9 tasks over 4 stages, some with names as long as a name may be."""
    names = ["mortality_in_hospital_within_thirty_days_of_the_index_admission", "aki", "sepsis", "delirium"]
    names += ["ventilation_longer_than_ninety_six_hours", "readmission", "transfusion", "dialysis", "arrest"]
    tasks = [binary_task(name) for name in names]
    return tuple(tasks[:3]), tuple(tasks[3:5]), tuple(tasks[5:7]), tuple(tasks[7:])


def example(
    stream: tuple[tuple[Task, ...], ...] = STREAM, *, comparison: bool = True, data: bool = True, seed: int = 0
) -> Results:
    """A run over a stream of stages, with plain fine-tuning beside it."""
    rng = np.random.default_rng(seed)
    tasks = [task for stage in stream for task in stage]
    learned = {task.name: t for t, stage in enumerate(stream) for task in stage}
    level = {task.name: float(rng.uniform(0.72, 0.88)) for task in tasks}
    rivals = [_comparison(tasks, learned, level, len(stream), rng)] if comparison else []
    return Results(
        name="intensive_care_demo",
        recipe={
            "name": "intensive_care_demo",
            "seed": seed,
            "data": {"source": "physionet2012"},
            "train": {"epochs": 12, "bootstrap": 500, "lr": 0.001},
            "method": {"name": "flame", "rank": 16},
        },
        seed=seed,
        environment=Environment(
            python="3.11.9",
            torch="2.13.0+cpu",
            numpy="2.4.6",
            platform="Linux-6.8-x86_64",
            cpu="AMD EPYC 9654",
            threads=2,
            package="0.1.0",
            git_commit="9" * 40,
        ),
        created="2026-03-02T09:14:00+00:00",
        tasks=tuple(tasks),
        stages=tuple(_stage(t, stage, level, rng) for t, stage in enumerate(stream)),
        evaluations=tuple(_evaluations(tasks, learned, level, len(stream), 0.0, rng)),
        drift=tuple(_drift(tasks, learned, len(stream), 0.0, rng)),
        footprint=tuple(_footprint(len(stream), grows=True)),
        routing=tuple(_routing(tasks, len(stream) - 1, rng)),
        calibration=tuple(_calibration(tasks, len(stream) - 1, rng)),
        commits=tuple(
            Commit(
                stage=t,
                matrix=f"blocks.0.experts.{e}.up",
                rank=16,
                relative_error=float(rng.uniform(0.05, 0.3)),
                functional_error=0.04,
                parameters=16 * (64 + 128),
            )
            for t in range(1, len(stream))
            for e in range(8)
        ),
        truncations=tuple(
            Truncation(
                stage=t,
                task=task.name,
                split="val",
                before={"loss": 0.4, "auroc": 0.813, "f1": 0.421, "ece": 0.021},
                after={"loss": 0.4, "auroc": 0.812, "f1": 0.406, "ece": 0.034},
            )
            for t, stage in enumerate(stream)
            for task in stage
            if t
        ),
        timings={"training": 412.7, "evaluation": 18.3},
        data=_data(tasks, rng) if data else None,
        comparison=tuple(rivals),
    )


def with_gaps() -> Results:
    """A metric that does not exist, an interval that does not, a split nobody evaluated."""
    results = example()
    first, *rest = results.evaluations
    hollow = first.model_copy(
        update={
            "metrics": {**first.metrics, "auroc": math.nan},
            "ci": {},
            "note": "no auroc and auprc: every sample is 'survived'",
        }
    )
    return results.model_copy(update={"evaluations": (hollow, *rest)})


def _stage(index: int, tasks: tuple[Task, ...], level: dict[str, float], rng: np.random.Generator) -> StageRecord:
    history = [
        Epoch(
            epoch=e,
            train_loss={t.name: 0.25 + 0.45 * math.exp(-e / 3) for t in tasks},
            val_loss={t.name: 0.32 + 0.38 * math.exp(-e / 2.5) + 0.004 * e + rng.normal(0, 0.006) for t in tasks},
            val_metric={t.name: level[t.name] - 0.2 * math.exp(-e / 3) for t in tasks},
        )
        for e in range(12)
    ]
    return StageRecord(
        index=index,
        tasks=tuple(t.name for t in tasks),
        new_modalities=("vitals", "labs", "static") if index == 0 else (("notes",) if index == 2 else ()),
        epochs_run=12,
        best_epoch=8,
        seconds=137.4 + index,
        peak_bytes=734_003_200 + index,
        history=tuple(history),
    )


def _evaluations(
    tasks: list[Task],
    learned: dict[str, int],
    level: dict[str, float],
    stages: int,
    loss: float,
    rng: np.random.Generator,
) -> list[Evaluation]:
    rows = []
    for task in tasks:
        for stage in range(learned[task.name], stages):
            if loss:
                now = level[task.name] - loss * (stage - learned[task.name]) * float(rng.uniform(0.6, 1.4))
            else:
                now = level[task.name]
            metrics = _metrics(task, now)
            ci = {name: (value - min(0.031, value / 2), value + 0.029) for name, value in metrics.items()}
            for split in ("val", "test"):
                rows.append(
                    Evaluation(
                        after_stage=stage,
                        task=task.name,
                        split=split,
                        n=1417,
                        metrics=metrics,
                        ci=ci,
                        prevalence={c: 1 / len(task.classes) for c in task.classes},
                        selection="joint validation loss, epoch 8",
                    )
                )
        rows.append(rows[-1].model_copy(update={"phase": "full_rank", "after_stage": learned[task.name]}))
    return rows


def _metrics(task: Task, level: float) -> dict[str, float]:
    if task.kind == "regression":
        return {"rmse": 6.183 - level, "mae": 4.021 - level, "r2": level - 0.5}
    return {
        "auroc": level,
        "auprc": level - 0.27,
        "f1": level - 0.31,
        "accuracy": level + 0.04,
        "brier": 0.31 - 0.2 * level,
        "ece": 0.021,
    }


def _comparison(
    tasks: list[Task], learned: dict[str, int], level: dict[str, float], stages: int, rng: np.random.Generator
) -> Comparison:
    return Comparison(
        name="Fine-tuning",
        evaluations=tuple(_evaluations(tasks, learned, level, stages, 0.09, rng)),
        drift=tuple(_drift(tasks, learned, stages, 3.1, rng)),
        footprint=tuple(_footprint(stages, grows=False)),
    )


def _drift(
    tasks: list[Task], learned: dict[str, int], stages: int, size: float, rng: np.random.Generator
) -> list[Drift]:
    return [
        Drift(
            after_stage=stage,
            task=task.name,
            max_abs_logit_change=size * float(rng.uniform(0.3, 2.0)),
            bitwise_equal=size == 0,
            n=1417,
        )
        for task in tasks
        for stage in range(learned[task.name] + 1, stages)
    ]


def _footprint(stages: int, *, grows: bool) -> list[Footprint]:
    sizes = {"encoders": 41_000, "experts": 198_144, "attention": 33_280, "routers": 1_536, "heads": 2_210}
    rows = []
    for stage in range(stages):
        for part, size in sizes.items():
            stored = size + (stage * size // 9 if grows else 0)
            rows.append(
                Footprint(
                    after_stage=stage,
                    part=part,
                    live_parameters=size,
                    live_bytes=size * 4,
                    stored_parameters=stored,
                    stored_bytes=stored * 4,
                    inference_parameters=stored - 1,
                    inference_bytes=(stored - 1) * 4,
                    method_parameters=0 if part in ("heads", "routers") else stored - 2,
                    method_bytes=0 if part in ("heads", "routers") else (stored - 2) * 4,
                    trainable_parameters=size if stage == 0 or not grows else size // 9,
                )
            )
    return rows


def _routing(tasks: list[Task], stage: int, rng: np.random.Generator) -> list[Routing]:
    rows = []
    for task in tasks:
        for modality in task.modalities:
            for block in range(2):
                gate = rng.dirichlet(np.full(8, 0.5))
                rows.append(
                    Routing(
                        after_stage=stage,
                        task=task.name,
                        modality=modality,
                        block=block,
                        activation=tuple(float(x) for x in np.minimum(1.0, 2 * gate)),
                        gate=tuple(float(x) for x in gate),
                    )
                )
    return rows


def _calibration(tasks: list[Task], stage: int, rng: np.random.Generator) -> list[Calibration]:
    rows = []
    for task in tasks:
        if task.kind == "regression":
            continue
        bins = [
            CalibrationBin(
                low=b / 10,
                high=(b + 1) / 10,
                confidence=b / 10 + 0.05,
                frequency=min(1.0, max(0.0, b / 10 + 0.05 + rng.normal(0, 0.04))),
                n=int(700 * math.exp(-b / 3)) + 5,
            )
            for b in range(10)
        ]
        rows.append(Calibration(after_stage=stage, task=task.name, split="test", bins=tuple(bins)))
    return rows


def _data(tasks: list[Task], rng: np.random.Generator) -> DataSummary:
    steps = [
        FunnelStep(text="records found", before=12000, after=12000, dropped=0),
        FunnelStep(text="adult", before=12000, after=11988, dropped=12),
        FunnelStep(text="has at least one measurement", before=11988, after=11969, dropped=19),
        FunnelStep(text="stayed 48 hours", before=11969, after=9442, dropped=2527),
    ]
    return DataSummary(
        source="physionet2012",
        samples=9442,
        subjects=9442,
        funnel=Funnel(steps=tuple(steps), counts={"impossible temperature set to missing": 41}),
        prevalence=tuple(
            Prevalence(task=t.name, split=s, n=n, share={c: float(rng.uniform(0.1, 0.4)) for c in t.classes})
            for t in tasks
            if t.kind != "regression"
            for s, n in (("train", 6608), ("val", 1417), ("test", 1417))
        ),
        missingness=(
            Missingness(modality="vitals", present=1.0, observed=0.531),
            Missingness(modality="labs", present=0.973, observed=0.082),
            Missingness(modality="notes", present=0.614),
            Missingness(modality="static", present=1.0, observed=0.842),
        ),
        patterns=(
            Pattern(modalities=("vitals", "labs", "notes", "static"), samples=5641),
            Pattern(modalities=("vitals", "labs", "static"), samples=3546),
            Pattern(modalities=("vitals", "static"), samples=255),
        ),
    )
