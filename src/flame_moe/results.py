"""The format of results.json: everything a run measured, and how. Documented in `docs/results.md`.

Reports are made from this file alone, so a number that is not here cannot be shown. NaN (a metric that does not exist)
is `null` in the file and NaN in memory; infinity is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.files import write_text
from flame_moe.profile import Count, Number, Share
from flame_moe.profile import Funnel as Funnel
from flame_moe.profile import FunnelStep as FunnelStep
from flame_moe.profile import Pattern as Pattern
from flame_moe.schema import Name, Task, TaskKind

FORMAT: Final = "flame-moe-results"
VERSION: Final = 1
PRIMARY: dict[TaskKind | Literal["answer"], str] = {
    "binary": "auroc",
    "multiclass": "auroc",
    "multilabel": "auroc",
    "regression": "r2",
    "answer": "accuracy",
}
"""The metric that speaks for a task of each kind."""
LOWER_IS_BETTER = frozenset({"brier", "ece", "rmse", "mae"})


Phase = Literal["committed", "full_rank"]
Part = Literal["encoders", "experts", "attention", "routers", "heads", "memory"]


class Environment(Description):
    """What the run ran on (`flame_moe.environment.environment`); products: see `flame_moe.nn.products`."""

    python: str
    torch: str
    numpy: str
    platform: str
    cpu: str
    threads: Count
    package: str
    products: str = "default"
    gpu: str | None = None
    git_commit: str | None = None


class Epoch(Description):
    """One epoch of a stage: task -> mean loss, and task -> primary metric on the validation split."""

    epoch: Count
    train_loss: dict[str, Number]
    val_loss: dict[str, Number] = Field(default_factory=dict)
    val_metric: dict[str, Number] = Field(default_factory=dict)


class WarmStart(Description):
    """The earlier task as which a new one began: routers and the head's part of the shared modalities, and whether its
    last layer too; `source` and `similarity` are null where no earlier task shares a routed modality."""

    task: str
    source: str | None
    similarity: Number | None
    modalities: tuple[str, ...]
    linear: bool


class StageRecord(Description):
    """How one stage was learned.

    `peak_bytes` is the most memory that the process held while the stage was learned, `processor_seconds` the time that
    it used of all its threads together; null where that was not measured.
    """

    index: Count
    tasks: tuple[str, ...]
    new_modalities: tuple[str, ...] = ()
    epochs_run: Count
    best_epoch: Count
    seconds: Number
    processor_seconds: Number | None = None
    peak_bytes: Count | None = None
    warm_start: tuple[WarmStart, ...] = ()
    history: tuple[Epoch, ...] = ()


class Evaluation(Description):
    """Metrics of one task on one split after one stage.

    `phase` tells whether the stage's update was already truncated to its rank ("committed", what is deployed) or not
    ("full_rank"); `selection` how the weights were chosen (for example "joint validation loss, epoch 7").
    """

    after_stage: Count
    task: str
    split: str
    n: Count
    metrics: dict[str, Number]
    ci: dict[str, tuple[Number, Number]] = Field(default_factory=dict)
    prevalence: dict[str, Number] = Field(default_factory=dict)
    selection: str = ""
    phase: Phase = "committed"
    note: str = ""


class Drift(Description):
    """Largest change of any logit of a task, on the same n samples, since the stage in which it was learned."""

    after_stage: Count
    task: str
    max_abs_logit_change: Number
    bitwise_equal: bool
    n: Count


class Footprint(Description):
    """Size of one part of the model: live while serving, stored in the checkpoint, trained in the stage.

    `inference_...` is accounting A, what predicting any task learned so far reads; `method_...` is accounting B, what
    of it lies in weights that stages may change. Both are null in files written before they were measured.
    """

    after_stage: Count
    part: Part
    live_parameters: Count
    live_bytes: Count
    stored_parameters: Count
    stored_bytes: Count
    trainable_parameters: Count
    inference_parameters: Count | None = None
    inference_bytes: Count | None = None
    method_parameters: Count | None = None
    method_bytes: Count | None = None


class Routing(Description):
    """Per expert, the share of samples sent to it and its mean gate, for one task, modality and block.

    `usual` is the share of samples that go to the most frequent set of experts; null in files written before it was
    measured.
    """

    after_stage: Count
    task: str
    modality: str
    block: Count
    activation: tuple[Number, ...]
    gate: tuple[Number, ...]
    usual: Number | None = None


class CalibrationBin(Description):
    """Mean predicted probability and observed frequency of the n predictions in one bin."""

    low: Share
    high: Share
    confidence: Number
    frequency: Number
    n: Count


class Calibration(Description):
    """Calibration curve of one task on one split after one stage."""

    after_stage: Count
    task: str
    split: str
    bins: tuple[CalibrationBin, ...]


class Commit(Description):
    """One weight update truncated to `rank`: the relative Frobenius error |Delta - A B| / |Delta|.

    `rank` is null where the update was stored dense, because factors would have cost as much; of a stack of matrices
    that keep different ranks it is the largest, and `ranks` has each. `functional_error` is the relative root mean
    square of what the outputs lost on the training inputs; null where these were not gathered. `parameters` is what is
    stored; null in files written before it was recorded.
    """

    stage: Count
    matrix: str
    rank: Count | None
    relative_error: Number
    functional_error: Number | None = None
    ranks: tuple[Count | None, ...] = ()
    parameters: Count | None = None


class Truncation(Description):
    """Metrics of a task of a stage on one split, just before and just after the updates of the stage were truncated."""

    stage: Count
    task: str
    split: str
    before: dict[str, Number]
    after: dict[str, Number]


class Prevalence(Description):
    """Labelled samples of a task in a split, and the share of each class among them."""

    task: str
    split: str
    n: Count
    share: dict[str, Number]


class Missingness(Description):
    """Share of samples that have a modality, and of its cells that were observed where it is there."""

    modality: str
    present: Share
    observed: Share | None = None


class DataSummary(Description):
    """What the samples are."""

    source: str = ""
    samples: Count | None = None
    subjects: Count | None = None
    funnel: Funnel = Funnel()
    prevalence: tuple[Prevalence, ...] = ()
    missingness: tuple[Missingness, ...] = ()
    patterns: tuple[Pattern, ...] = ()


class CertifiedTask(Description):
    """A task of the certificate: when, and how many tensors and probe inputs it covers."""

    task: str
    issued: str
    tensors: Count
    probes: Count


class Certificate(Description):
    """What the certificate of the run covers (`flame_moe.continual.certificate`); `digest` is over all of it."""

    digest: str
    tasks: tuple[CertifiedTask, ...]


class Comparison(Description):
    """The same stream learned by another method, to hold beside this one.

    `stages` is empty in files written before it was kept.
    """

    name: str
    stages: tuple[StageRecord, ...] = ()
    evaluations: tuple[Evaluation, ...]
    drift: tuple[Drift, ...] = ()
    footprint: tuple[Footprint, ...] = ()


class AnswerTask(Description):
    """A task of a language model: its answers are text, right if all of it is."""

    name: Name
    kind: Literal["answer"] = "answer"
    description: str = ""
    caveat: str = ""


class AnswerStage(Description):
    """What one stage of a language model cost and kept.

    `foundation` is the exact match on skills of the base model that no stage trains, `foundation_nats` the
    cross-entropy of their answers in nats per token; null for methods that must be told the task. `samples` were shown
    in training, with repetition, and `seconds` is the training alone.
    """

    after_stage: Count
    samples: Count
    steps: Count
    seconds: Number
    foundation: Number | None = None
    foundation_nats: Number | None = None


class AnswerRouting(Description):
    """How the samples of a task are routed after a stage: the share of the weight that its own expert has, and the
    entropy of the weights over the experts in nats; means over tokens, layers and samples."""

    after_stage: Count
    task: str
    own: Number
    entropy: Number


class Answers(Description):
    """A stream of tasks of a language model (`flame_moe.mllm`).

    `before` is the exact match of the base model on each task and on the foundation, before any stage, and
    `foundation_nats` its cross-entropy there; `measures` has the numbers of `flame_moe.mllm.measures`, by name.
    """

    stream: str
    order: str
    licence: str
    before: dict[str, Number]
    foundation_nats: Number | None = None
    stages: tuple[AnswerStage, ...]
    routing: tuple[AnswerRouting, ...] = ()
    measures: dict[str, Number] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)


class Results(Description):
    """One run: what was measured, on what, after which stage, and how.

    Example:
        >>> results = Results.load("runs/demo/results.json")  # doctest: +SKIP
        >>> results.final("mortality").metrics["auroc"]  # doctest: +SKIP
        0.86
    """

    format: Literal["flame-moe-results"] = FORMAT
    version: Literal[1] = VERSION
    name: Name
    method: str = "FLAME"
    recipe: dict[str, Any]
    seed: Count
    environment: Environment
    created: str
    tasks: tuple[Annotated[Task | AnswerTask, Field(discriminator="kind")], ...]
    stages: Annotated[tuple[StageRecord, ...], Field(min_length=1)]
    evaluations: tuple[Evaluation, ...]
    drift: tuple[Drift, ...] = ()
    footprint: tuple[Footprint, ...] = ()
    routing: tuple[Routing, ...] = ()
    calibration: tuple[Calibration, ...] = ()
    commits: tuple[Commit, ...] = ()
    truncations: tuple[Truncation, ...] = ()
    timings: dict[str, Number] = Field(default_factory=dict)
    data: DataSummary | None = None
    comparison: tuple[Comparison, ...] = ()
    certificate: Certificate | None = None
    answers: Answers | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Results:
        known = {task.name for task in self.tasks}
        named = {task for stage in self.stages for task in stage.tasks}
        named |= {row.task for row in self.evaluations} | {row.task for row in self.drift}
        named |= {row.task for row in self.routing} | {row.task for row in self.calibration}
        named |= {row.task for row in self.truncations}
        for other in self.comparison:
            named |= {row.task for row in other.evaluations} | {row.task for row in other.drift}
        if unknown := sorted(named - known):
            raise ValueError(f"task '{unknown[0]}' has results but is not described in 'tasks'")
        if [stage.index for stage in self.stages] != list(range(len(self.stages))):
            raise ValueError("stages must be listed in order, with index 0, 1, 2, ...")
        return self

    @property
    def last_stage(self) -> int:
        """Index of the last stage learned."""
        return self.stages[-1].index

    def learned_in(self, task: str) -> int:
        """Index of the stage in which a task was learned.

        Raises:
            DataError: if no stage learned it.
        """
        for stage in self.stages:
            if task in stage.tasks:
                return stage.index
        raise DataError(f"no stage learned the task '{task}'", where=f"results '{self.name}'")

    def final(self, task: str, split: str = "test") -> Evaluation | None:
        """The committed evaluation of a task after the last stage, if there is one."""
        rows = [r for r in self.evaluations if (r.task, r.split, r.phase) == (task, split, "committed")]
        return next((row for row in rows if row.after_stage == self.last_stage), None)

    def save(self, path: str | Path) -> Path:
        """Write results.json atomically: a crash leaves the old file or the new one, never half of one."""
        return write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results.json.

        Raises:
            DataError: if the file is missing, truncated, something else, of another version or inconsistent.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError("there are no such results", where=str(path), mend="Check the path.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            mend = "The file is damaged or incomplete: run again, or restore it from a copy."
            raise DataError(f"the results are not valid JSON: {error}", where=str(path), mend=mend) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            mend = "Give the results.json of a run."
            raise DataError("the file does not hold flame-moe results", where=str(path), mend=mend)
        if data.get("version") != VERSION:
            mend = f"This package reads version {VERSION}: install the package version that wrote the file."
            raise DataError(f"the results are of version {data.get('version')!r}", where=str(path), mend=mend)
        return cls.parse(data, where=str(path))
