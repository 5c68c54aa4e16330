"""What to look at before trusting a store: rules that find the usual traps, each with the numbers that set it off."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flame_moe.profile import StoreProfile, TaskProfile

FEW = 10
"""Fewer cases than this in a split make its metrics a matter of luck."""
RARE = 0.1
STRONG = 4.0
"""Standard errors of a difference of shares beyond which it is named; high, because many are looked at."""


def looks(profile: StoreProfile) -> tuple[str, ...]:
    """One sentence for each trap; none is a proof of a mistake."""
    return (*_few_cases(profile), *_unlike_splits(profile), *_telling_presence(profile), *_thin_inputs(profile))


def _few_cases(profile: StoreProfile) -> Iterator[str]:
    for task in profile.tasks:
        for found in task.labels:
            cases = {name: round(share * found.labelled) for name, share in _rates(task, found.share).items()}
            few = {name: n for name, n in cases.items() if n < FEW}
            if found.labelled and few:
                name = min(few, key=lambda name: few[name])
                others = f", and few of {len(few) - 1} other labels" if len(few) > 1 else ""
                yield f"{task.name}: the {found.split} split has {few[name]} of '{name}'{others}."


def _unlike_splits(profile: StoreProfile) -> Iterator[str]:
    for task in profile.tasks:
        by_split = {found.split: found for found in task.labels if found.labelled}
        if not {"train", "test"} <= set(by_split):
            continue
        train, test = by_split["train"], by_split["test"]
        for name, share in _rates(task, train.share).items():
            other = test.share[name]
            if _errors(share, train.labelled, other, test.labelled) > STRONG:
                yield f"{task.name}: '{name}' is {_percent(share)} of training and {_percent(other)} of test labels."


def _telling_presence(profile: StoreProfile) -> Iterator[str]:
    for task in profile.tasks:
        for row in task.presence:
            if _errors(row.with_share, row.with_n, row.without_share, row.without_n) > STRONG:
                yield (
                    f"{task.name}: whether {row.modality} is there says something about '{row.label}': "
                    f"{_percent(row.with_share)} with it, {_percent(row.without_share)} without."
                )


def _thin_inputs(profile: StoreProfile) -> Iterator[str]:
    for modality in profile.modalities:
        share = modality.present.get("train")
        if share is not None and share < RARE:
            yield f"{modality.name}: {_percent(share)} of training samples have it."
        never = [c.name for c in modality.channels if not c.quantiles]
        constant = [c.name for c in modality.channels if c.quantiles and c.quantiles[0] == c.quantiles[-1]]
        for names, what in ((never, "never observed in training"), (constant, "the same value wherever observed")):
            if names:
                yield f"{modality.name}: {_listed(names)} {'is' if len(names) == 1 else 'are'} {what}."


def _rates(task: TaskProfile, share: dict[str, float]) -> dict[str, float]:
    """Shares that a reader must be told of: of a binary task the positive class alone."""
    return dict(list(share.items())[1:]) if task.kind == "binary" else share


def _errors(one: float, n: int, other: float, m: int) -> float:
    """Difference of two shares in its standard errors."""
    pooled = (one * n + other * m) / (n + m)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    return abs(one - other) / spread if spread else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"
