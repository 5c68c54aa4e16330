"""Measures a learner after every stage and turns what it saw into `Results`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flame_moe import results as r
from flame_moe.analysis.footprint import footprint
from flame_moe.continual.learner import Learner
from flame_moe.continual.stages import LearnedStage
from flame_moe.data.loader import Loader
from flame_moe.data.profile import PATTERNS, all_patterns
from flame_moe.data.store import Store
from flame_moe.data.summary import describe_store
from flame_moe.environment import environment
from flame_moe.schema import SPLITS, Recipe, Stage, Task
from flame_moe.training.engine import Prediction
from flame_moe.training.memory import PeakMemory
from flame_moe.training.metrics import calibration_curve, calibration_pairs, evaluate_predictions
from flame_moe.training.monitor import Monitor
from flame_moe.training.routing import fingerprints

MEASURED = ("val", "test")


class Reference(NamedTuple):
    """Test logits of a task right after its own stage, and a digest of the ids of the samples they are of."""

    logits: NDArray[np.float32]
    samples: str


@dataclass
class Recorder:
    """What was measured so far.

    Attributes:
        recipe: of the run.
        stores: task -> the store on which it is measured.
        reference: task -> its logits on the test split right after its own stage.
        predictions: (after which stage, task) -> what was predicted for the test split; kept if it is given.
    """

    recipe: Recipe
    stores: dict[str, Store] = field(default_factory=dict)
    reference: dict[str, Reference] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    stages: list[r.StageRecord] = field(default_factory=list)
    evaluations: list[r.Evaluation] = field(default_factory=list)
    drift: list[r.Drift] = field(default_factory=list)
    footprint: list[r.Footprint] = field(default_factory=list)
    routing: list[r.Routing] = field(default_factory=list)
    calibration: list[r.Calibration] = field(default_factory=list)
    commits: list[r.Commit] = field(default_factory=list)
    truncations: list[r.Truncation] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    comparison: list[r.Comparison] = field(default_factory=list)
    data: r.DataSummary | None = None
    predictions: dict[tuple[int, str], NDArray[np.float64]] | None = None
    certificate: r.Certificate | None = None

    def full_rank(self, learner: Learner) -> None:
        """Before the commit: the new tasks' metrics on validation, so that the cost of compression can be seen."""
        stage = learner.stages[-1]
        if stage.index == 0 and learner.recipe.method.base_rank is None:
            return
        for name in stage.tasks:
            if name in self.stores:
                self._evaluate(learner, stage.index, name, "val", "full_rank", _selection(learner, stage))

    def learn(
        self,
        learner: Learner,
        store: Store,
        stage: Stage,
        *,
        monitor: Monitor | None = None,
        state_folder: Path | None = None,
        compressed: bool = True,
    ) -> None:
        """Let a learner learn its next stage, with clock and memory in view, and measure it afterwards.

        Args:
            learner: who learns; what the recorder knows must end where it stands.
            store, stage, monitor, state_folder: see `Learner.learn`.
            compressed: also measure the new tasks before the commit.
        """
        began, worked, peak = time.perf_counter(), time.process_time(), PeakMemory()
        before = self.full_rank if compressed else None
        learner.learn(
            store, stage, monitor=monitor, state_folder=state_folder, before_commit=before, earlier=self.stores
        )
        held, worked, trained = peak.bytes, time.process_time() - worked, time.perf_counter()
        self.after_stage(learner, held, worked)
        index = learner.stages[-1].index
        self.timings[f"stage {index}: train"] = trained - began
        self.timings[f"stage {index}: measure"] = time.perf_counter() - trained

    def after_stage(
        self, learner: Learner, peak_bytes: int | None = None, processor_seconds: float | None = None
    ) -> None:
        """After the commit: every task learned so far that has a store, and the model's size."""
        stage = learner.stages[-1]
        self.tasks = dict(learner.tasks)
        self.stages.append(_stage_record(stage, peak_bytes, processor_seconds))
        self.commits += [r.Commit(stage=stage.index, **c._asdict()) for c in stage.commits]
        self.truncations += [r.Truncation(stage=stage.index, split="val", **c._asdict()) for c in stage.changes]
        self._size(learner, stage)
        for name in [name for s in learner.stages for name in s.tasks if name in self.stores]:
            own = learner.stages[learner.cursor(name)]
            for split in MEASURED:
                got = self._evaluate(learner, stage.index, name, split, "committed", _selection(learner, own))
                if split == "test" and got is not None:
                    self._drift(stage.index, name, got)
                    self._calibrate(stage.index, learner.tasks[name], got)
                    if self.predictions is not None:
                        self.predictions[stage.index, name] = got.values
            self._route(learner, stage.index, name)
        for name, variant in learner.variants.items():
            selection = f"validation of {name} alone"
            self._evaluate(variant, stage.index, name, "test", "committed", selection, keep=True)

    def results(self) -> r.Results:
        """Everything measured, in the documented format."""
        return r.Results(
            name=self.recipe.name,
            method=self.recipe.method.name,
            recipe=self.recipe.plain(),
            seed=self.recipe.seed,
            environment=environment(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tasks=tuple(self.tasks.values()),
            stages=tuple(self.stages),
            evaluations=tuple(self.evaluations),
            drift=tuple(self.drift),
            footprint=tuple(self.footprint),
            routing=tuple(self.routing),
            calibration=tuple(self.calibration),
            commits=tuple(self.commits),
            truncations=tuple(self.truncations),
            timings=self.timings,
            data=self.data,
            comparison=tuple(self.comparison),
            certificate=self.certificate,
        )

    @classmethod
    def resume(cls, results: r.Results, reference: Mapping[str, Reference]) -> Recorder:
        """Go on recording where saved results end."""
        return cls(
            recipe=Recipe.parse(results.recipe, where="results.json"),
            reference=dict(reference),
            tasks={task.name: task for task in results.tasks if isinstance(task, Task)},
            stages=list(results.stages),
            evaluations=list(results.evaluations),
            drift=list(results.drift),
            footprint=list(results.footprint),
            routing=list(results.routing),
            calibration=list(results.calibration),
            commits=list(results.commits),
            truncations=list(results.truncations),
            timings=dict(results.timings),
            comparison=list(results.comparison),
            data=results.data,
            certificate=results.certificate,
        )

    def _evaluate(
        self, learner: Learner, after: int, name: str, split: str, phase: r.Phase, selection: str, *, keep: bool = False
    ) -> Prediction | None:
        store, task = self.stores[name], learner.tasks[name]
        indices = store.indices(name, split, modalities=task.modalities)
        if len(indices) == 0:
            return None
        got = learner.predict(store, name, indices)
        row = score(task, got, store.subjects(indices), learner.recipe.train.bootstrap)
        extra = "weights of the task's own best epoch, not those of the saved model" if keep else ""
        note = "; ".join(text for text in (row["note"], extra) if text)
        self.evaluations.append(
            r.Evaluation(
                after_stage=after, task=name, split=split, selection=selection, phase=phase, **{**row, "note": note}
            )
        )
        return got

    def _drift(self, after: int, name: str, got: Prediction) -> None:
        """Largest change of any test logit since the task's own stage; no row where the test samples are others."""
        samples = hashlib.sha256("\n".join(got.ids).encode()).hexdigest()
        before, known = self.reference.setdefault(name, Reference(got.logits, samples))
        if known != samples:
            return
        change = float(np.abs(got.logits.astype(np.float64) - before).max())
        equal = bool(np.array_equal(got.logits.view(np.uint32), before.view(np.uint32)))
        self.drift.append(
            r.Drift(after_stage=after, task=name, max_abs_logit_change=change, bitwise_equal=equal, n=len(before))
        )

    def _calibrate(self, after: int, task: Task, got: Prediction) -> None:
        if task.kind == "regression":
            return
        pairs = calibration_pairs(task.kind, metric_target(task, got.target), got.values, len(task.classes))
        bins = tuple(r.CalibrationBin(**point._asdict()) for point in calibration_curve(*pairs))
        self.calibration.append(r.Calibration(after_stage=after, task=task.name, split="test", bins=bins))

    def _route(self, learner: Learner, after: int, name: str) -> None:
        store, task = self.stores[name], learner.tasks[name]
        indices = store.indices(name, "test", modalities=task.modalities)
        if len(indices) == 0:
            return
        loader = Loader(store, learner.preprocessor, task, indices, max(learner.recipe.train.batch_size, 256))
        for f in fingerprints(learner.model, loader.batches(None), learner.cursor(name)):
            self.routing.append(r.Routing(after_stage=after, task=name, **f._asdict()))

    def _size(self, learner: Learner, stage: LearnedStage) -> None:
        for p in footprint(learner.model):
            counts = {
                "live": p.live_parameters,
                "stored": p.stored_parameters,
                "inference": p.inference_parameters,
                "method": p.method_parameters,
            }
            sizes = {f"{name}_parameters": n for name, n in counts.items()}
            sizes |= {f"{name}_bytes": n * p.bytes_per_number for name, n in counts.items()}
            row = {"after_stage": stage.index, "part": p.part, "trainable_parameters": stage.trainable[p.part], **sizes}
            self.footprint.append(r.Footprint.model_validate(row))
        kept = learner.method.state().tensors.values()
        if kept:
            self.footprint.append(_memory(stage.index, kept))


def _memory(after: int, tensors: Iterable[Tensor]) -> r.Footprint:
    """What a method keeps beside the model in order to learn later stages: stored, and read by no prediction."""
    counted = [(t.numel(), t.numel() * t.element_size()) for t in tensors]
    numbers, space = (sum(column) for column in zip(*counted, strict=True))
    unread = {f"{name}_{what}": 0 for name in ("live", "inference", "method") for what in ("parameters", "bytes")}
    stored = {"stored_parameters": numbers, "stored_bytes": space, "trainable_parameters": 0}
    return r.Footprint.model_validate({"after_stage": after, "part": "memory", **unread, **stored})


def score(task: Task, got: Prediction, subjects: tuple[str, ...] | None, bootstrap: int) -> dict[str, Any]:
    """n, metrics, ci, prevalence and note of a prediction, as an `Evaluation` takes them."""
    target = metric_target(task, got.target)
    found = evaluate_predictions(
        task.kind, target, got.values, classes=task.classes, subjects=subjects, bootstrap=bootstrap
    )
    return {
        "n": found.n,
        "metrics": found.metrics,
        "ci": found.ci if bootstrap else {},
        "prevalence": found.prevalence,
        "note": found.note,
    }


def metric_target(task: Task, target: NDArray[np.float32]) -> NDArray[np.float32]:
    """Targets as the metrics take them: (n,) for binary and multiclass, (n, width) else."""
    return target[:, 0] if task.kind in ("binary", "multiclass") else target


def data_summary(store: Store) -> r.DataSummary:
    """What a report says of a store."""
    plain = describe_store(store)
    splits = {name: len(store.indices(split=name)) for name in SPLITS}
    prevalence = [
        r.Prevalence(task=task, split=split, n=found["labelled"], share=found["prevalence"])
        for task, by_split in plain["labels"].items()
        for split, found in by_split.items()
        if "prevalence" in found
    ]
    everyone = np.arange(len(store))
    missingness = [
        r.Missingness(modality=name, present=float(store.present(name).mean()), observed=_observed(store, name))
        for name in store.modalities
    ]
    return r.DataSummary(
        source=plain["source"],
        samples=sum(splits.values()),
        subjects=len(set(store.subjects(everyone))),
        funnel=r.Funnel.parse(plain["funnel"], where="funnel"),
        prevalence=tuple(prevalence),
        missingness=tuple(missingness),
        patterns=tuple(all_patterns(store)[:PATTERNS]),
    )


def _observed(store: Store, modality: str) -> float | None:
    """Share of a modality's cells that were observed, over the samples that have it."""
    if not store.modalities[modality].has_observed:
        return None
    seen = cells = 0
    for part in np.array_split(np.flatnonzero(store.present(modality)), max(1, len(store) // 2048)):
        observed = store.gather(modality, part).observed
        if observed is not None:
            seen, cells = seen + int(observed.sum()), cells + observed.size
    return seen / cells if cells else None


def _selection(learner: Learner, stage: LearnedStage) -> str:
    if learner.recipe.train.select == "last":
        return f"last epoch ({stage.epochs_run - 1})"
    return f"epoch {stage.best_epoch} of {stage.epochs_run}, best mean validation score of the stage's tasks"


def _stage_record(stage: LearnedStage, peak_bytes: int | None, processor_seconds: float | None) -> r.StageRecord:
    history = tuple(
        r.Epoch(
            epoch=e["epoch"],
            train_loss={name: loss for name, loss in e["train"].items() if name in stage.tasks},
            val_loss={name: metrics["loss"] for name, metrics in e["val"].items()},
            val_metric={name: metrics["auroc" if "auroc" in metrics else "r2"] for name, metrics in e["val"].items()},
        )
        for e in stage.history
    )
    return r.StageRecord(
        index=stage.index,
        tasks=stage.tasks,
        new_modalities=stage.new_modalities,
        epochs_run=stage.epochs_run,
        best_epoch=stage.best_epoch,
        seconds=stage.seconds,
        processor_seconds=processor_seconds,
        peak_bytes=peak_bytes,
        warm_start=tuple(r.WarmStart(**asdict(start)) for start in stage.warm),
        history=history,
    )
