"""The format of a store's profile: what a person wants to see of the data before trusting a model made from them.

Made by `flame_moe.data.profile`, drawn by `flame_moe.report`, so that neither knows the other.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from flame_moe.description import Description
from flame_moe.schema import ModalityKind, TaskKind


def _not_infinite(value: float) -> float:
    if math.isinf(value):
        raise ValueError("infinity is not a result")
    return value


Number = Annotated[
    float, BeforeValidator(lambda value: math.nan if value is None else value), AfterValidator(_not_infinite)
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
QUANTILES: tuple[float, ...] = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of a channel's values: smallest, percentiles, largest."""


class FunnelStep(Description):
    """One rule of the cohort and the samples before and after it."""

    text: str
    before: Count
    after: Count
    dropped: Count


class Funnel(Description):
    """How raw records became samples (`flame_moe.data.funnel.Funnel.plain`)."""

    steps: tuple[FunnelStep, ...] = ()
    counts: dict[str, Count] = Field(default_factory=dict)


class Pattern(Description):
    """How many samples have exactly these modalities."""

    modalities: tuple[str, ...]
    samples: Count


class SplitSize(Description):
    """Samples and subjects of a split."""

    name: str
    samples: Count
    subjects: Count


class Histogram(Description):
    """How many values lie from each edge to the next; the last bin holds its upper edge."""

    edges: tuple[Number, ...]
    counts: tuple[Count, ...]


class ChannelRange(Description):
    """Values of one channel in the training split: the share of its cells that is observed, and `QUANTILES`."""

    name: str
    unit: str = ""
    observed: Share
    quantiles: tuple[Number, ...] = ()


class ModalityProfile(Description):
    """One modality.

    Attributes:
        present: split -> share of its samples that have the modality; an empty split is left out.
        observed: share of the cells that is observed where the modality is there, in what was read for `channels`.
        lengths: steps per sample that has it; None for tables, which have one.
        times: when the steps are, as a part of the window; None without times.
        channels: ranges in the training split; only for kinds whose features are measurements.
        read: training samples that `channels` is made from, of `of` that have the modality.
        events: of codes: type -> events.
    """

    name: str
    kind: ModalityKind
    features: Count
    description: str = ""
    present: dict[str, Share]
    observed: Share | None = None
    lengths: Histogram | None = None
    times: Histogram | None = None
    channels: tuple[ChannelRange, ...] = ()
    read: Count = 0
    of: Count = 0
    events: dict[str, Count] = Field(default_factory=dict)


class SplitLabels(Description):
    """Labels of a task in a split: how many, and the share of each class, or mean and deviation of each value."""

    split: str
    labelled: Count
    share: dict[str, Number] = Field(default_factory=dict)
    mean: dict[str, Number] = Field(default_factory=dict)
    std: dict[str, Number] = Field(default_factory=dict)


class Presence(Description):
    """How often a class occurs among labelled training samples with and without a modality."""

    modality: str
    label: str
    with_n: Count
    with_share: Number
    without_n: Count
    without_share: Number


class TaskProfile(Description):
    """One task: what is asked, and how its labels are spread."""

    name: str
    kind: TaskKind
    modalities: tuple[str, ...]
    description: str = ""
    caveat: str = ""
    labels: tuple[SplitLabels, ...]
    presence: tuple[Presence, ...] = ()


class InputFile(Description):
    """A raw file that the store was made from."""

    name: str
    bytes: Count
    sha256: str


class StoreProfile(Description):
    """A store in plain data.

    Attributes:
        split: how subjects were dealt, in words.
        patterns: the most frequent sets of modalities, most frequent first; `other_patterns` of them, with
            `other_samples` samples, are not listed.
        together: row and column by modality: samples that have both.
        looks: what to look at before trusting the store, one sentence each.
    """

    source: str
    options: dict[str, Any]
    samples: Count
    subjects: Count
    split: str
    funnel: Funnel
    splits: tuple[SplitSize, ...]
    modalities: tuple[ModalityProfile, ...]
    tasks: tuple[TaskProfile, ...]
    patterns: tuple[Pattern, ...]
    other_patterns: Count = 0
    other_samples: Count = 0
    together: tuple[tuple[Count, ...], ...]
    inputs: tuple[InputFile, ...] = ()
    looks: tuple[str, ...] = ()
