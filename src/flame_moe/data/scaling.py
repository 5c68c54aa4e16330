"""Scaling of one modality's channels, fitted on observed training cells only.

Shapes: S steps packed end to end, C channels. Every scaler gives float32 and 0 where a cell is not observed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from flame_moe.data.codes import UNKNOWN

Floats = NDArray[np.float64]
Values = NDArray[Any]
Flags = NDArray[np.bool_]
Chunks = Iterable[tuple[Values, Flags | None]]

KNOTS = 64
TAIL = 4.0
KEPT = 1 << 15


class Scaler(Protocol):
    """Maps the channels of one modality to comparable ranges."""

    def apply(self, values: Values, observed: Flags | None) -> Values:
        """(S, C) scaled values, 0 where not observed."""

    def draw(self, generator: np.random.Generator, steps: int, channels: int) -> Values:
        """(steps, channels) made-up values in natural units, spread like the training data channel by channel."""

    def plain(self) -> dict[str, Any]:
        """JSON-ready data that `parse_scaler` reads back."""


@dataclass(frozen=True)
class Identity:
    """Leaves values as they are."""

    def apply(self, values: Values, observed: Flags | None) -> Values:
        return values if observed is None else np.where(observed, values, np.float32(0.0))

    def draw(self, generator: np.random.Generator, steps: int, channels: int) -> Values:
        return generator.standard_normal((steps, channels))

    def plain(self) -> dict[str, Any]:
        return {"scaling": "none"}


@dataclass(frozen=True)
class Standard:
    """(x - mean) / scale per channel; scale is the standard deviation, or 1 for a channel that is constant.

    Attributes:
        mean: (C,) mean of the observed training cells, 0 for a channel that is never observed.
        scale: (C,) their standard deviation (ddof 0).
    """

    mean: Floats
    scale: Floats

    @classmethod
    def fit(cls, chunks: Chunks, channels: int) -> Standard:
        """Combine chunk means and squared deviations (Chan, Golub and LeVeque 1979), in float64."""
        count, mean, squares = np.zeros(channels), np.zeros(channels), np.zeros(channels)
        for values, observed in chunks:
            seen = np.ones(values.shape, dtype=bool) if observed is None else observed
            cells = np.where(seen, values, 0.0).astype(np.float64)
            n = seen.sum(axis=0)
            local = cells.sum(axis=0) / np.maximum(n, 1)
            deviations = (np.where(seen, cells - local, 0.0) ** 2).sum(axis=0)
            total = np.maximum(count + n, 1)
            shift = local - mean
            squares += deviations + np.where(n > 0, shift**2 * count * n / total, 0.0)
            mean += np.where(n > 0, shift * n / total, 0.0)
            count += n
        std = np.sqrt(squares / np.maximum(count, 1))
        constant = std <= 1e-7 * np.abs(mean)
        return cls(mean, np.where(constant, 1.0, std))

    def apply(self, values: Values, observed: Flags | None) -> Values:
        scaled = (values - self.mean.astype(np.float32)) * (1.0 / self.scale).astype(np.float32)
        return scaled if observed is None else np.where(observed, scaled, np.float32(0.0))

    def draw(self, generator: np.random.Generator, steps: int, channels: int) -> Values:
        return self.mean + self.scale * generator.standard_normal((steps, channels))

    def plain(self) -> dict[str, Any]:
        return {"scaling": "standard", "mean": self.mean.tolist(), "scale": self.scale.tolist()}


@dataclass(frozen=True)
class Quantile:
    """Monotone piecewise-linear map of each channel through its training quantiles to standard-normal scores.

    Beyond the outer quantiles the map goes on along the line from the median to the outer quantile, and is clipped
    at +-4. A channel that was constant in training maps to its difference from the constant.

    Attributes:
        knots: for each channel, increasing training quantiles, at most 64; empty if it was never observed.
        scores: for each channel, the normal score of each knot.
    """

    knots: tuple[Floats, ...]
    scores: tuple[Floats, ...]

    @classmethod
    def fit(cls, chunks: Chunks, channels: int) -> Quantile:
        """Quantiles of up to 2^16 evenly thinned observed cells per channel: exact for smaller training sets."""
        kept = [_Thinned() for _ in range(channels)]
        for values, observed in chunks:
            for c in range(channels):
                kept[c].add(values[:, c] if observed is None else values[observed[:, c], c])
        levels = (np.arange(KNOTS) + 0.5) / KNOTS
        pairs = [_knots(thinned.values().astype(np.float64), levels) for thinned in kept]
        return cls(tuple(x for x, _ in pairs), tuple(z for _, z in pairs))

    def apply(self, values: Values, observed: Flags | None) -> Values:
        """The observed cells, channel by channel: z = base + slope (x - anchor) of the segment that holds x."""
        anchor, base, slope = self._segments
        seen = np.ones(values.shape, dtype=bool) if observed is None else observed
        cells = np.flatnonzero(np.ascontiguousarray(seen.T))
        x = np.ascontiguousarray(values.T).ravel()[cells].astype(np.float64)
        ends = np.searchsorted(cells, np.arange(len(self.knots) + 1) * len(values))
        segment = np.empty(len(cells), dtype=np.int64)
        for c, (start, end) in enumerate(pairwise(ends)):
            segment[start:end] = np.searchsorted(self.knots[c], x[start:end], side="right") + c * anchor.shape[1]
        z = slope.ravel()[segment] * (x - anchor.ravel()[segment]) + base.ravel()[segment]
        scaled = np.zeros((values.shape[1], len(values)), dtype=np.float32)
        scaled.ravel()[cells] = np.clip(z, -TAIL, TAIL)
        return np.ascontiguousarray(scaled.T)

    def draw(self, generator: np.random.Generator, steps: int, channels: int) -> Values:
        levels = generator.random((steps, channels))
        columns = [
            np.interp(u, np.linspace(0, 1, len(x)), x) if len(x) else u
            for u, x in zip(levels.T, self.knots, strict=True)
        ]
        return np.stack(columns, axis=1)

    @cached_property
    def _segments(self) -> tuple[Floats, Floats, Floats]:
        """Anchor, base and slope (C, K + 1) of the segments around the knots of every channel."""
        channels, most = len(self.knots), max(1, *(len(x) for x in self.knots))
        anchor, base, slope = np.zeros((3, channels, most + 1))
        for c, (x, z) in enumerate(zip(self.knots, self.scores, strict=True)):
            n = len(x)
            if n == 0:
                continue
            anchor[c, 0], anchor[c, 1 : n + 1] = x[0], x
            if n == 1:
                slope[c, :2] = 1.0
                continue
            base[c, 0], base[c, 1 : n + 1] = z[0], z
            low, high = max(n // 2, 1), min(n // 2, n - 2)
            slope[c, 0] = (z[low] - z[0]) / (x[low] - x[0])
            slope[c, 1:n] = np.diff(z) / np.diff(x)
            slope[c, n] = (z[-1] - z[high]) / (x[-1] - x[high])
        return anchor, base, slope

    def plain(self) -> dict[str, Any]:
        return {
            "scaling": "quantile",
            "knots": [x.tolist() for x in self.knots],
            "scores": [z.tolist() for z in self.scores],
        }


@dataclass(frozen=True)
class Pixels:
    """(x - mean) / scale with one mean and deviation over all training pixels, so that contrasts stay comparable."""

    mean: float
    scale: float

    @classmethod
    def fit(cls, chunks: Chunks) -> Pixels:
        """From the histogram of the 256 grey values: exact, whatever the number of pixels."""
        counts = np.zeros(256)
        for values, _ in chunks:
            counts += np.bincount(np.asarray(values, dtype=np.uint8).ravel(), minlength=256)
        grey, total = np.arange(256.0), max(counts.sum(), 1.0)
        mean = float((counts * grey).sum() / total)
        std = float(np.sqrt((counts * (grey - mean) ** 2).sum() / total))
        return cls(mean, std if std > 0 else 1.0)

    def apply(self, values: Values, observed: Flags | None) -> Values:
        return (values.astype(np.float32) - np.float32(self.mean)) * np.float32(1.0 / self.scale)

    def draw(self, generator: np.random.Generator, steps: int, channels: int) -> Values:
        return np.clip(self.mean + self.scale * generator.standard_normal((steps, channels)), 0, 255)

    def plain(self) -> dict[str, Any]:
        return {"scaling": "pixels", "mean": self.mean, "scale": self.scale}


@dataclass(frozen=True)
class Vocabulary:
    """Codes to rows of an embedding: the most frequent training codes get a row each, from 1; all others share row 0.

    Attributes:
        codes: ascending `code_id` numbers that have a row; code i of this list has row i + 1.
    """

    codes: NDArray[np.int64]

    @classmethod
    def fit(cls, chunks: Chunks, size: int) -> Vocabulary:
        """Keep the `size` most frequent codes; ties go to the smaller number."""
        counts: Counter[int] = Counter()
        for values, _ in chunks:
            found, times = np.unique(values[:, 1], return_counts=True)
            counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
        kept = sorted(counts, key=lambda code: (-counts[code], code))[:size]
        return cls(np.array(sorted(kept), dtype=np.int64))

    def apply(self, values: Values, observed: Flags | None) -> Values:
        """(S, 2) float32: the event type as it is, and the row of its code."""
        place = np.searchsorted(self.codes, values[:, 1])
        known = np.isin(values[:, 1], self.codes)
        return np.stack([values[:, 0], np.where(known, place + 1, UNKNOWN)], axis=1).astype(np.float32)

    def draw(self, generator: np.random.Generator, steps: int, channels: int) -> Values:
        """Codes that have a row, and now and then one that has none; the type is left at 0."""
        choices = np.append(self.codes, UNKNOWN)
        return np.stack([np.zeros(steps, dtype=np.int64), generator.choice(choices, steps)], axis=1)

    def plain(self) -> dict[str, Any]:
        return {"scaling": "vocabulary", "codes": self.codes.tolist()}


def parse_scaler(data: dict[str, Any]) -> Scaler:
    """Read back what `plain` wrote; raises KeyError, TypeError or ValueError on anything else."""
    if data["scaling"] == "none":
        return Identity()
    if data["scaling"] == "pixels":
        return Pixels(float(data["mean"]), float(data["scale"]))
    if data["scaling"] == "vocabulary":
        return Vocabulary(np.array(data["codes"], dtype=np.int64))
    if data["scaling"] == "standard":
        return Standard(np.array(data["mean"], dtype=np.float64), np.array(data["scale"], dtype=np.float64))
    if data["scaling"] == "quantile":
        knots = tuple(np.array(x, dtype=np.float64) for x in data["knots"])
        return Quantile(knots, tuple(np.array(z, dtype=np.float64) for z in data["scores"]))
    raise ValueError(f"unknown scaling '{data['scaling']}'")


class _Thinned:
    """At most 2 x KEPT values of a stream: every first, second, fourth ... value, evenly over the stream."""

    def __init__(self) -> None:
        self._parts: list[Values] = []
        self._size, self._stride, self._skip = 0, 1, 0

    def add(self, values: Values) -> None:
        taken = np.array(values[self._skip :: self._stride])
        self._skip = (self._skip - len(values)) % self._stride
        self._parts.append(taken)
        self._size += len(taken)
        while self._size >= 2 * KEPT:
            whole = np.concatenate(self._parts)
            if len(whole) % 2:
                self._skip += self._stride
            self._parts = [whole[::2]]
            self._size = len(self._parts[0])
            self._stride *= 2

    def values(self) -> Values:
        return np.concatenate(self._parts) if self._parts else np.empty(0, dtype=np.float32)


def _knots(values: Floats, levels: Floats) -> tuple[Floats, Floats]:
    """Distinct quantiles and the mean normal score of the levels that share each."""
    if len(values) == 0:
        return np.empty(0), np.empty(0)
    quantiles = np.quantile(values, levels)
    knots, group = np.unique(quantiles, return_inverse=True)
    scores = np.bincount(group, weights=ndtri(levels)) / np.bincount(group)
    return knots, scores
