"""A stage's training in rounds, each with a schedule, an optimizer and a best epoch of its own; saved as it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flame_moe.continual.methods import Commit, Method, StageContext
from flame_moe.errors import CheckpointError
from flame_moe.nn import products
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import growables
from flame_moe.schema import TrainConfig
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint
from flame_moe.training.engine import Fitted, fit, validate
from flame_moe.training.monitor import Monitor
from flame_moe.training.state import TrainingState

STATE_KIND, STATE_VERSION = "flame-moe-training", 1
_MODEL = "model|"


class Change(NamedTuple):
    """Metrics of one task on its validation split, without intervals, around the compression of its stage's updates.

    Attributes:
        task: which.
        before: name -> value with the updates as they were trained.
        after: the same once they are compressed, before anything trains on.
    """

    task: str
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass
class Progress:
    """What the rounds of a stage have done so far, and the model with which the present round began.

    Attributes:
        round: number of the round.
        compressed: whether the updates have been compressed.
        history: one record per epoch of the rounds before it.
        commits: what became of the updates, once they are compressed.
        changes: what that did to the stage's tasks.
        tensors: of the whole model at the start of the round; empty in the first round, which starts from the method.
        structure: of its weights that grow.
    """

    round: int = 0
    compressed: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)

    def keep(self, model: Flame) -> None:
        """Remember the model as it is."""
        self.tensors = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
        self.structure = {name: part.structure() for name, part in growables(model)}

    def put_back(self, model: Flame) -> None:
        """Bring a model that has begun the stage to where this round began."""
        for name, part in growables(model):
            part.restore(self.structure[name])
        model.load_state_dict(self.tensors, strict=True)

    def meta(self) -> dict[str, Any]:
        """The JSON part."""
        commits, changes = ([row._asdict() for row in rows] for rows in (self.commits, self.changes))
        plain = {name: getattr(self, name) for name in ("round", "compressed", "history", "structure")}
        return {**plain, "commits": commits, "changes": changes}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Progress:
        """The inverse of `meta` and `tensors`."""
        rows = {
            "commits": [Commit.parse(row) for row in meta["commits"]],
            "changes": [Change(**row) for row in meta["changes"]],
        }
        return cls(**{**meta, **rows}, tensors=dict(tensors))


class Saved:
    """The place of a stage's training state, if it has one.

    Args:
        folder: where.
        stage, tasks: what is learned.
        base: digest of the model with which the stage began.
    """

    def __init__(self, folder: Path | None, stage: int, tasks: Sequence[str], base: str) -> None:
        self.folder, self.stage, self.tasks, self.base = folder, stage, list(tasks), base

    def save(self, state: TrainingState, progress: Progress) -> None:
        """Write the state atomically."""
        assert self.folder is not None
        place = {"stage": self.stage, "tasks": self.tasks, "base": self.base, "products": products.in_use()}
        manifest = {**place, "state": state.meta(), "progress": progress.meta()}
        tensors = {**state.tensors(), **{_MODEL + name: t for name, t in progress.tensors.items()}}
        save_checkpoint(self.folder, tensors, manifest, kind=STATE_KIND, version=STATE_VERSION)

    def load(self) -> tuple[TrainingState | None, Progress]:
        """The saved state, or none and the progress of a stage that has just begun.

        Raises:
            CheckpointError: if it is damaged, of another stage, or begun on another model.
        """
        if self.folder is None or not self.folder.exists():
            return None, Progress()
        tensors, manifest = load_checkpoint(self.folder, kind=STATE_KIND, version=STATE_VERSION)
        found, tasks = manifest.get("stage"), manifest.get("tasks") or []
        if (found, tasks) != (self.stage, self.tasks):
            of = f"stage {found} ({', '.join(tasks)}), not of stage {self.stage} ({', '.join(self.tasks)})"
            mend = "Remove it to start the stage anew."
            raise CheckpointError(f"the saved training state is of {of}", where=str(self.folder), mend=mend)
        if manifest.get("base") != self.base:
            what = "the saved training state was begun on another model"
            raise CheckpointError(what, where=str(self.folder), mend="Remove it to start the stage anew.")
        model = {name.removeprefix(_MODEL): tensors.pop(name) for name in list(tensors) if name.startswith(_MODEL)}
        try:
            progress = Progress.rebuild(model, manifest["progress"])
            return TrainingState.rebuild(tensors, manifest["state"]), progress
        except (KeyError, TypeError, ValueError, AttributeError):
            mend = "Remove it to start the stage anew."
            raise CheckpointError("the saved training state is damaged", where=str(self.folder), mend=mend) from None


def train(
    method: Method, context: StageContext, config: TrainConfig, *, saved: Saved, monitor: Monitor
) -> tuple[Fitted, Progress]:
    """Train a stage, round after round, and leave the model at the best epoch of the last one.

    Args:
        method: which divides the training, and has begun the stage.
        context: of the stage.
        config: how; its epochs are those of all rounds.
        saved: where the state is saved after every epoch; if one is there, training goes on from it.
        monitor: who is told of progress.

    Returns:
        The outcome of all rounds together, and what was compressed on the way.
    """
    rounds = method.rounds(context.stage, config.epochs)
    state, progress = saved.load()
    if progress.round:
        progress.put_back(context.model)
    fitted = Fitted([], 0, {})
    for number in range(progress.round, len(rounds)):
        part = rounds[number]
        if number > progress.round:
            progress.round, progress.history = number, fitted.history
            if part.compressed and not rounds[number - 1].compressed:
                progress.commits, progress.changes = compress(method, context)
                progress.compressed = True
            progress.keep(context.model)
        if number:
            method.enter(context, part)
        settings = config.model_copy(update={"epochs": part.epochs})
        fitted = _fit(method, context, settings, progress, saved, monitor, state)
        state = None
    # The last step's gradients are as large as the model and of no more use.
    context.model.zero_grad(set_to_none=True)
    return fitted, progress


def compress(method: Method, context: StageContext) -> tuple[list[Commit], list[Change]]:
    """Bring the stage's updates to the form in which they are kept, and measure its tasks before and after."""
    if not method.compresses(context.stage):
        return method.compress(context), []
    before = {name: validate(context.model, problem) for name, problem in context.problems.items()}
    commits = method.compress(context)
    after = {name: validate(context.model, problem) for name, problem in context.problems.items()}
    return commits, [Change(name, before[name], after[name]) for name in before]


def _fit(
    method: Method,
    context: StageContext,
    config: TrainConfig,
    progress: Progress,
    saved: Saved,
    monitor: Monitor,
    state: TrainingState | None,
) -> Fitted:
    """One round; its history follows that of the rounds before it."""
    fitted = fit(
        context.model,
        method.problems(context),
        config,
        stage=context.stage,
        seed=context.seed,
        monitor=monitor,
        hooks=method,
        first=len(progress.history),
        resume=state,
        save=None if saved.folder is None else lambda now: saved.save(now, progress),
    )
    return fitted._replace(history=[*progress.history, *fitted.history])
