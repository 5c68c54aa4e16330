"""Clinic: a generator of nine clinical tasks over four cohorts, whose truth is known.

The same modality sets, kinds of target and class balances as MIMIC-IV, eICU, EMBED and ADNI in the paper, with no
patient in them, so that routing, sharing and forgetting can be checked against what was put in.

Model. For each sample, each task k of its cohort and each modality m there are latent factors

    f_km = sqrt(sharing) g_m + sqrt(1 - sharing) u_km          g_m, u_km ~ N(0, 1)

so two tasks' factors in one modality correlate by `sharing`, and factors of different modalities are independent.
Half the variance of g and u belongs to the subject, so samples of one subject resemble each other. A modality shows
its factors, mixed by a fixed random matrix with three nuisance factors and noise; it shows nothing of other
modalities. The score of a task is y_k = sum_m s_km f_km + N(0, 1); its label says between which thresholds y_k
falls. Modalities are missing completely at random; at least one stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._clinic_tables import CHANNELS, COHORTS, LEVEL, SPREAD, VITALS, Cohort, Question, View
from flame_moe.data.sources._clinic_truth import best_auroc, correlation, thresholds
from flame_moe.data.sources.base import Part, Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import nearest
from flame_moe.schema import Fraction, Modality, Name, Task

Floats = NDArray[np.float64]

CohortName = Literal["mimic", "eicu", "embed", "adni"]
NUISANCE = 3
VISITS = (0.75, 0.2, 0.05)


class ClinicOptions(Description):
    """What is generated.

    Attributes:
        samples: samples per cohort; a smaller number gives the first samples of a larger one.
        seed: decides everything.
        cohorts: which of mimic, eicu, embed, adni.
        signal: task -> modality -> strength, replacing the task's whole default; a modality left out has none.
        missing: modality -> chance that it is missing, replacing its default.
        sharing: correlation of two tasks' factors in one modality, 0 to 1.
        widths: modality -> number of features, for modalities other than ts.
    """

    samples: Annotated[int, Field(ge=1)] = 400
    seed: Annotated[int, Field(ge=0)] = 0
    cohorts: Annotated[tuple[CohortName, ...], Field(min_length=1)] = ("mimic", "eicu", "embed", "adni")
    signal: dict[Name, dict[Name, Annotated[float, Field(ge=0)]]] = Field(default_factory=dict)
    missing: dict[Name, Fraction] = Field(default_factory=dict)
    sharing: Part = 0.3
    widths: dict[Name, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        questions = {name: cohort for cohort in COHORTS.values() for name in cohort.questions}
        views = {name: view for cohort in COHORTS.values() for name, view in cohort.views.items()}
        for task, strengths in self.signal.items():
            if task not in questions:
                raise ValueError(f"unknown task '{task}'. {nearest(task, questions)}")
            for name in strengths:
                if name not in questions[task].views:
                    raise ValueError(f"task '{task}' reads no '{name}'. {nearest(name, questions[task].views)}")
        for label, names in (("missing", self.missing), ("widths", self.widths)):
            for name in names:
                if name not in views:
                    raise ValueError(f"{label} of unknown modality '{name}'. {nearest(name, views)}")
        if "ts" in self.widths:
            raise ValueError(f"modality 'ts' always has its {len(CHANNELS)} named channels")
        if len(set(self.cohorts)) != len(self.cohorts):
            raise ValueError("a cohort is named twice")
        return self

    def strengths(self, task: str, question: Question) -> dict[str, float]:
        """The task's signal: modality -> strength."""
        return dict(self.signal.get(task, question.signal))


def describe(raw: Path | None, options: ClinicOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Modalities and tasks of the chosen cohorts."""
    cohorts = [(name, COHORTS[name]) for name in options.cohorts]
    modalities = [_modality(m, view, options) for _, cohort in cohorts for m, view in cohort.views.items()]
    tasks = [_task(t, q, name, cohort) for name, cohort in cohorts for t, q in cohort.questions.items()]
    return tuple(modalities), tuple(tasks)


def truth(options: ClinicOptions) -> dict[str, Any]:
    """What was put in, as plain data.

    Returns:
        tasks: task -> cohort, signal, balance, `auroc` (of the best score that sees every factor; noise in the
        modalities and missing ones keep models below it) and `auroc_alone` (modality -> the same when only that
        one is seen). correlation: task -> task -> correlation of their scores without noise.
    """
    tasks: dict[str, Any] = {}
    related: dict[str, dict[str, float]] = {}
    for name in options.cohorts:
        for task, question in COHORTS[name].questions.items():
            signal = options.strengths(task, question)
            tasks[task] = {
                "cohort": name,
                "signal": signal,
                "balance": list(question.balance),
                "auroc": _macro(question, correlation(signal, signal)),
                "auroc_alone": {m: _macro(question, correlation(signal, [m])) for m in COHORTS[name].views},
            }
    for a, one in tasks.items():
        related[a] = {b: _related(one, other, options.sharing) for b, other in tasks.items() if a != b}
    return {"tasks": tasks, "correlation": related, "sharing": options.sharing}


def read(raw: Path | None, options: ClinicOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Generate cohort after cohort, subject after subject."""
    funnel.start(options.samples * len(options.cohorts), "samples generated")
    for number, name in enumerate(COHORTS):
        if name not in options.cohorts:
            continue
        plan = _plan(COHORTS[name], number, options)
        made = subject = 0
        while made < options.samples:
            generator = np.random.default_rng([options.seed, number, 1, subject])
            visits = 1 + int(generator.choice(len(VISITS), p=VISITS))
            person = _normals(plan, generator)
            for visit in range(min(visits, options.samples - made)):
                latent = np.sqrt(0.5) * person + np.sqrt(0.5) * _normals(plan, generator)
                yield _sample(f"{name}_{subject}", visit, latent, plan, generator)
                made += 1
            subject += 1


def split(options: ClinicOptions) -> SplitSpec:
    """70/10/20 by subject."""
    return SplitSpec(seed=options.seed)


class _Plan(NamedTuple):
    """A cohort made concrete: what each modality shows and how labels follow.

    Attributes:
        columns: task -> columns of its own factors in the latent matrix (views, 1 + factors); column 0 is shared.
        mixing: modality -> (factors + nuisance, features) matrix.
    """

    cohort: Cohort
    columns: dict[str, slice]
    mixing: dict[str, Floats]
    signal: dict[str, dict[str, float]]
    missing: dict[str, float]
    sharing: float


def _plan(cohort: Cohort, number: int, options: ClinicOptions) -> _Plan:
    columns, end = {}, 1
    for task, question in cohort.questions.items():
        columns[task] = slice(end, end + question.factors)
        end += question.factors
    generator = np.random.default_rng([options.seed, number, 0])
    shown = end - 1 + NUISANCE
    mixing = {
        name: generator.standard_normal((shown, options.widths.get(name, view.features))) / np.sqrt(shown)
        for name, view in cohort.views.items()
    }
    signal = {task: options.strengths(task, question) for task, question in cohort.questions.items()}
    missing = {name: options.missing.get(name, view.missing) for name, view in cohort.views.items()}
    return _Plan(cohort, columns, mixing, signal, missing, options.sharing)


def _normals(plan: _Plan, generator: np.random.Generator) -> Floats:
    factors = sum(question.factors for question in plan.cohort.questions.values())
    return generator.standard_normal((len(plan.cohort.views), 1 + factors))


def _sample(subject: str, visit: int, latent: Floats, plan: _Plan, generator: np.random.Generator) -> Sample:
    factors = np.sqrt(plan.sharing) * latent[:, :1] + np.sqrt(1.0 - plan.sharing) * latent
    views = list(plan.cohort.views)
    targets = {
        task: _label(question, _score(factors[:, plan.columns[task]], views, plan.signal[task], question, generator))
        for task, question in plan.cohort.questions.items()
    }
    gone = generator.random(len(views)) < [plan.missing[name] for name in views]
    gone[generator.integers(len(views))] = False
    modalities = {}
    for row, name in enumerate(views):
        shown = np.concatenate([factors[row, 1:], generator.standard_normal(NUISANCE)]) @ plan.mixing[name]
        observation = _show(plan.cohort.views[name], shown, generator)
        if not gone[row]:
            modalities[name] = observation
    return Sample(f"{subject}_{visit}", subject, modalities, targets)


def _score(
    factors: Floats, views: list[str], signal: Mapping[str, float], question: Question, generator: np.random.Generator
) -> Floats:
    """Standard normal scores: one, or one per label; label l hangs on factor l mod factors of every modality."""
    strengths = np.array([signal.get(name, 0.0) for name in views])
    labels = len(question.classes) if question.kind == "multilabel" else 1
    clean = (strengths @ factors)[np.arange(labels) % question.factors]
    return (clean + generator.standard_normal(labels)) / np.sqrt(1.0 + (strengths**2).sum())


def _label(question: Question, score: Floats) -> NDArray[np.float32]:
    if question.kind == "multiclass":
        return np.searchsorted(thresholds(question.balance), score).astype(np.float32)
    cuts = [thresholds((1.0 - positive, positive))[0] for positive in question.balance]
    return (score > np.array(cuts)).astype(np.float32)


def _show(view: View, shown: Floats, generator: np.random.Generator) -> Observation:
    """What a modality looks like: `shown` (features,) plus noise, at every step."""
    steps = int(generator.integers(view.steps[0], view.steps[1] + 1))
    noise = generator.standard_normal((steps, len(shown)))
    if view.kind == "series":
        return _series(shown, noise, generator)
    values = (shown + noise).astype(np.float32)
    if view.kind == "timed":
        return Observation(values, np.sort(generator.random(steps)).astype(np.float32))
    if view.kind == "table":
        observed = generator.random(values.shape) < 0.95
        observed[0, generator.integers(len(shown))] = True
        return Observation(values, None, observed)
    return Observation(values)


def _series(shown: Floats, noise: Floats, generator: np.random.Generator) -> Observation:
    """Channels in natural units: even ones carry their signal as a level, odd ones as a trend over the window."""
    steps, channels = noise.shape
    times = np.sort(generator.random(steps))
    trend = np.arange(channels) % 2 == 1
    carrier = np.where(trend, np.sqrt(12.0) * (times[:, None] - 0.5), 1.0)
    daily = 0.3 * np.sin(4.0 * np.pi * times)[:, None]
    values = np.array(LEVEL) + np.array(SPREAD) * (shown * carrier + daily + 0.7 * noise)
    observed = generator.random((steps, channels)) < np.where(np.arange(channels) < len(VITALS), 0.8, 0.15)
    observed[~observed.any(axis=1), 0] = True
    return Observation(values.astype(np.float32), times.astype(np.float32), observed)


def _modality(name: str, view: View, options: ClinicOptions) -> Modality:
    return Modality(
        name=name,
        kind=view.kind,
        features=options.widths.get(name, view.features),
        channels=CHANNELS if view.kind == "series" else (),
        description=f"generated: {view.description}",
    )


def _task(name: str, question: Question, family: str, cohort: Cohort) -> Task:
    return Task(
        name=name,
        kind=question.kind,
        modalities=tuple(cohort.views),
        classes=question.classes,
        family=family,
        loss="focal" if question.focal else "plain",
        description=f"generated: {question.description}",
        caveat="Generated data with known truth; says nothing about patients.",
    )


def _macro(question: Question, rho: float) -> float:
    if question.kind == "multiclass":
        return best_auroc(rho, question.balance)
    return float(np.mean([best_auroc(rho, (1.0 - p, p)) for p in question.balance]))


def _related(one: dict[str, Any], other: dict[str, Any], sharing: float) -> float:
    if one["cohort"] != other["cohort"]:
        return 0.0
    a, b = one["signal"], other["signal"]
    norms = np.sqrt(sum(s**2 for s in a.values()) * sum(s**2 for s in b.values()))
    return float(sharing * sum(a[m] * b.get(m, 0.0) for m in a) / norms) if norms > 0 else 0.0


SOURCE = Source(
    name="clinic",
    summary="Generated data with known truth: nine clinical tasks over four cohorts, no patients.",
    needs_raw=False,
    options=ClinicOptions,
    describe=describe,
    read=read,
    split=split,
)
