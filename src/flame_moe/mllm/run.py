"""One method on one stream: learn task after task, measure after each, and say everything in results.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame_moe.environment import environment
from flame_moe.errors import RecipeError
from flame_moe.files import replacing_folder
from flame_moe.mllm.measures import answer_measures
from flame_moe.mllm.methods import Method, Settings, TaskData, method_named
from flame_moe.mllm.shelf import Shelf
from flame_moe.mllm.stream.encode import IGNORED, Batch
from flame_moe.mllm.stream.llava import Say
from flame_moe.mllm.stream.score import ask, exact, graded
from flame_moe.mllm.stream.tiers import Stream
from flame_moe.progression import progression
from flame_moe.report import write_report
from flame_moe.results import (
    AnswerRouting,
    Answers,
    AnswerStage,
    AnswerTask,
    Drift,
    Evaluation,
    Footprint,
    Results,
    StageRecord,
)
from flame_moe.training.device import choose_device

RESULTS, REPORT, ADAPTERS = "results.json", "report.html", "adapters"
PROBES = 32
"""Test samples of each task whose logits are compared with those of the day it was learned."""
RESAMPLES = 1000
ROUTED = 100
"""Test samples of each task from which the share of its own expert is measured."""
Show = Callable[[str], None]


class Outcome(NamedTuple):
    """A stream that was learned.

    Attributes:
        results: everything measured.
        method: with what it learned.
        right: (after which stage, task) -> (n,) bool, which test samples were answered exactly.
    """

    results: Results
    method: Method
    right: dict[tuple[int, str], Tensor]


class _Before(NamedTuple):
    """The base model before any stage: exact match on each task and on the foundation, and its cross-entropy there."""

    right: dict[str, float]
    nats: float


@dataclass
class _Record:
    """What was measured so far."""

    stages: list[StageRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    footprint: list[Footprint] = field(default_factory=list)
    costs: list[AnswerStage] = field(default_factory=list)
    routing: list[AnswerRouting] = field(default_factory=list)
    probes: dict[str, Tensor] = field(default_factory=dict)
    right: dict[tuple[int, str], Tensor] = field(default_factory=dict)


def settings_for(stream: Stream, changes: Mapping[str, Any]) -> Settings:
    """The stream's settings with some changed.

    Raises:
        RecipeError: naming a key that does not exist or a value that it cannot have.
    """
    return Settings.parse({**stream.tier.settings.plain(), **changes}, where=f"settings of '{stream.name}'")


def learn_stream(
    stream: Stream,
    method: str,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    accelerator: str = "cpu",
    shelf: Shelf | None = None,
    say: Say = lambda text, share: None,
    show: Show = lambda line: None,
) -> Outcome:
    """Learn a stream with one method.

    Args:
        stream: of `flame_moe.mllm.stream.tiers.open_stream`.
        method: of `flame_moe.mllm.methods.METHODS`.
        seed: of new weights and of the order of samples; the data do not depend on it.
        changes: of settings.
        accelerator: where the model learns and answers: cpu, cuda or auto.
        shelf: of experts that other methods have trained; seconds of results count what they took then.
        say: told of progress.
        show: given the accuracy matrix line by line, as it grows.

    Raises:
        FlameError: if method or settings do not make sense, or a loss is no number.
    """
    kind = method_named(method)
    settings = settings_for(stream, changes or {})
    if seed < 0:
        raise RecipeError(f"the seed {seed} is negative", mend="Give 0 or more.")
    device = choose_device(accelerator, where="--accelerator")
    torch.set_num_threads(1)
    learner = kind(stream.model().to(device), settings, seed, stream.sample)
    learner.shelf = shelf
    say("the base model", 0.0)
    record, before = _Record(), _before(stream, learner)
    show(_head(stream))
    show(_line("before", [before.right[task.name] for task in stream.tasks], before.right["foundation"]))
    groups = [list(stream.tasks)] if kind.joint else [[task] for task in stream.tasks]
    known: list[TaskData] = []
    for stage, group in enumerate(groups):
        start = time.perf_counter()
        learner.learn(group, say)
        seconds = time.perf_counter() - start + learner.spared
        known += group
        _cost(record, stage, group, learner, settings, seconds)
        _measure(record, stage, known, stream, learner, last=stage == len(groups) - 1, say=say)
        values = {
            e.task: e.metrics["accuracy"] for e in record.evaluations if (e.after_stage, e.split) == (stage, "test")
        }
        row = [values.get(task.name) for task in stream.tasks]
        show(_line(f"after {group[-1].name}", row, record.costs[-1].foundation))
    return Outcome(_results(stream, learner, settings, seed, record, before), learner, record.right)


def free(out: Path, files: Sequence[str], *, overwrite: bool) -> None:
    """Insist, before any work, that a run may be written there.

    Args:
        out: its folder.
        files: what it will hold.
        overwrite: whether a run that is there is replaced.

    Raises:
        RecipeError: if something is there that must not be replaced.
    """
    held = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if not held or (overwrite and held <= set(files)):
        return
    ours = held <= set(files)
    mend = "Give another folder, or --overwrite." if ours else "Give another folder."
    raise RecipeError("there is a run already" if ours else "what is there is no run", where=str(out), mend=mend)


def write_run(results: Results, out: Path, method: Method | None = None) -> None:
    """Write results.json and report.html of a run, both or neither.

    Args:
        results: of the run.
        out: its folder.
        method: whose adapters are kept beside them, as PEFT keeps adapters.
    """
    with replacing_folder(out) as work:
        results.save(work / RESULTS)
        write_report(results, work / REPORT)
        if method is not None:
            method.model.save_pretrained(work / ADAPTERS)


def _before(stream: Stream, learner: Method) -> _Before:
    answer = partial(ask, stream.model().to(next(learner.embedding.parameters()).device))
    right = {task.name: exact(answer, task.test, learner.embedding) for task in stream.tasks}
    kept = graded(answer, stream.foundation, learner.embedding)
    right["foundation"] = kept.right
    return _Before({name: float(each.float().mean()) for name, each in right.items()}, float(kept.nats.mean()))


def _cost(
    record: _Record, stage: int, group: list[TaskData], learner: Method, settings: Settings, seconds: float
) -> None:
    trained = sum(p.numel() for p in learner.trained())
    steps = -(-learner.samples // settings.batch)
    epochs = -(-learner.samples // max(1, sum(len(task.train) for task in group)))
    names = tuple(task.name for task in group)
    record.stages.append(
        StageRecord(index=stage, tasks=names, epochs_run=epochs, best_epoch=epochs, seconds=round(seconds, 3))
    )
    record.costs.append(AnswerStage(after_stage=stage, samples=learner.samples, steps=steps, seconds=round(seconds, 3)))
    for part, count in learner.stored().items():
        record.footprint.append(
            Footprint(
                after_stage=stage,
                part=part,
                live_parameters=0 if part == "memory" else count,
                live_bytes=0 if part == "memory" else 4 * count,
                stored_parameters=count,
                stored_bytes=4 * count,
                trainable_parameters=trained if part == "experts" else 0,
            )
        )


def _measure(
    record: _Record, stage: int, known: list[TaskData], stream: Stream, learner: Method, *, last: bool, say: Say
) -> None:
    for i, task in enumerate(known):
        say("measuring", i / len(known))
        for split, data in (("test", task.test), *((("val", task.val),) if last else ())):
            right = exact(_asker(learner, task.name), data, learner.embedding)
            record.evaluations.append(_evaluation(stage, task.name, split, right))
            if split == "test":
                record.right[stage, task.name] = right
        _probe(record, stage, task, learner)
        share = learner.routing(task.name, task.test.take(range(min(ROUTED, len(task.test)))))
        if share is not None:
            record.routing.append(
                AnswerRouting(after_stage=stage, task=task.name, own=share.own, entropy=share.entropy)
            )
    if not learner.knows_task:
        kept = graded(_asker(learner, None), stream.foundation, learner.embedding)
        told = {"foundation": float(kept.right.float().mean()), "foundation_nats": float(kept.nats.mean())}
        record.costs[-1] = record.costs[-1].model_copy(update=told)


def _asker(learner: Method, task: str | None) -> Callable[[Batch], Tensor]:
    return lambda batch: learner.logits(batch, task)


def _evaluation(stage: int, task: str, split: str, right: Tensor) -> Evaluation:
    n, value = len(right), float(right.float().mean())
    drawn = np.random.default_rng(n).binomial(n, value, RESAMPLES) / n
    low, high = (float(x) for x in np.percentile(drawn, [2.5, 97.5]))
    return Evaluation(
        after_stage=stage,
        task=task,
        split=split,
        n=n,
        metrics={"accuracy": value},
        ci={"accuracy": (low, high)},
        selection="last step",
    )


@torch.no_grad()
def _probe(record: _Record, stage: int, task: TaskData, learner: Method) -> None:
    """Compare the logits of some test samples with those right after their task was learned."""
    batch = task.test.batch(torch.arange(min(PROBES, len(task.test))), learner.embedding).answers
    now = learner.logits(batch, task.name)[:, :-1][batch.labels[:, 1:] != IGNORED].clone()
    if task.name not in record.probes:
        record.probes[task.name] = now
        return
    then = record.probes[task.name]
    change = float((now - then).abs().max())
    record.drift.append(
        Drift(
            after_stage=stage,
            task=task.name,
            max_abs_logit_change=change,
            bitwise_equal=torch.equal(now, then),
            n=len(batch.mask),
        )
    )


def _results(
    stream: Stream, learner: Method, settings: Settings, seed: int, record: _Record, before: _Before
) -> Results:
    answers = Answers(
        stream=stream.name,
        order=stream.order,
        licence=stream.tier.licence,
        before=before.right,
        foundation_nats=before.nats,
        stages=tuple(record.costs),
        routing=tuple(record.routing),
        base=dict(stream.about),
    )
    found = Results(
        name=stream.name.replace("-", "_"),
        method=learner.label,
        recipe={"stream": stream.name, "order": stream.order, "method": learner.name, "settings": settings.plain()},
        seed=seed,
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tasks=tuple(AnswerTask(name=task.name, description=_asked(task)) for task in stream.tasks),
        stages=tuple(record.stages),
        evaluations=tuple(record.evaluations),
        drift=tuple(record.drift),
        footprint=tuple(record.footprint),
        answers=answers,
    )
    measured = answer_measures(progression(found, "accuracy"))
    return found.model_copy(update={"answers": answers.model_copy(update={"measures": measured})})


def _asked(task: TaskData) -> str:
    return "; ".join(dict.fromkeys(item.kind for item in task.test.items))


def _head(stream: Stream) -> str:
    return f"{'':<18}" + "".join(f"{task.name[:10]:>11}" for task in stream.tasks) + f"{'foundation':>12}"


def _line(name: str, values: list[float | None], foundation: float | None) -> str:
    said = "".join(f"{'' if v is None else f'{v:.3f}':>11}" for v in values)
    return f"{name[:17]:<18}{said}{'' if foundation is None else f'{foundation:.3f}':>12}"
