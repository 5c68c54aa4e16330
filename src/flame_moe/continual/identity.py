"""Inference without task identity: which stage a sample belongs to, from its modality set and its representation.

A *group* is the tasks of one stage that share a family. Of the training samples of each group the model keeps, per
modality m, a Gaussian of low rank over z_m, the mean over steps of what the modality's encoder gives at the stage in
which the modality first appeared (frozen since, so every group is seen by the same eyes), and how often each modality
is there. A new sample x with modalities M gets, for every group g,

    score(g) = sum over all modalities of log P(present or absent | g)
             + sum over m in M of log N(z_m; g) - log mean over groups h of N(z_m; h)

where a group without a Gaussian for m counts as average, and groups that read nothing of M are out. All groups are as
likely beforehand. certainty(g) = softmax of the scores: where groups look alike it stays near an even split, which
says that the sample does not tell which of them is meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flame_moe.data.loader import pad_modality, part_to_device
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.nn.model import Flame
from flame_moe.schema import Task

Floats = NDArray[np.float64]

RANK = 8
SAMPLES = 512
BATCH = 256
PRIOR_SAMPLES = 10
_FLOOR = 1e-6


@dataclass(frozen=True)
class LowRankGaussian:
    """N(mean, basis diag(variances) basis^T + rest (I - basis basis^T)).

    Attributes:
        mean: (d,).
        basis: (d, k) orthonormal.
        variances: (k,) along the basis.
        rest: variance in every other direction.
    """

    mean: Floats
    basis: Floats
    variances: Floats
    rest: float

    @classmethod
    def fit(cls, z: Floats) -> LowRankGaussian:
        """From (n, d) samples; the covariance is drawn to its own mean variance by `PRIOR_SAMPLES` samples."""
        n, d = z.shape
        mean = z.mean(axis=0)
        covariance = (z - mean).T @ (z - mean) / n
        even = np.trace(covariance) / d + _FLOOR
        covariance = (n * covariance + PRIOR_SAMPLES * even * np.eye(d)) / (n + PRIOR_SAMPLES)
        values, vectors = np.linalg.eigh(covariance)
        k = min(RANK, d - 1)
        return cls(mean, vectors[:, d - k :], values[d - k :], float(values[: d - k].mean()))

    def log_density(self, z: Floats) -> Floats:
        """(n, d) -> (n,)."""
        centred = z - self.mean
        along = centred @ self.basis
        across = (centred**2).sum(axis=1) - (along**2).sum(axis=1)
        d, k = self.basis.shape
        logs = np.log(self.variances).sum() + (d - k) * math.log(self.rest) + d * math.log(2 * math.pi)
        return np.asarray(-0.5 * (logs + (along**2 / self.variances).sum(axis=1) + across / self.rest))


@dataclass(frozen=True)
class Group:
    """Tasks of one stage and family, and what their training samples look like.

    Attributes:
        stage, family, tasks: which.
        samples: how many were looked at.
        present: modality -> share of them that have it.
        gaussians: modality -> Gaussian of its representation.
    """

    stage: int
    family: str
    tasks: tuple[str, ...]
    samples: int
    present: Mapping[str, float]
    gaussians: Mapping[str, LowRankGaussian]

    @property
    def name(self) -> str:
        return f"stage {self.stage}, {self.family}"


class Choice(NamedTuple):
    """Where samples belong: (n,) positions in the list of groups, ties to the earlier one; (n, groups) certainties."""

    group: NDArray[np.int64]
    certainty: Floats


@dataclass(frozen=True)
class Encoders:
    """The fixed eyes: a model, how values are scaled, and the stage in which each modality first appeared."""

    model: Flame
    preprocessor: Preprocessor
    born: Mapping[str, int]

    def represent(self, store: Store, name: str, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """Positions within `indices` of the samples that have the modality, and z of each, (k, d)."""
        rows = np.flatnonzero(store.present(name)[indices]) if name in store.modalities else np.empty(0, np.int64)
        found = [np.empty((0, self.model.config.width))]
        was_training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(rows), BATCH):
                part = pad_modality(store, self.preprocessor, name, indices[rows[start : start + BATCH]])
                assert part is not None
                x, mask = self.model.encode(name, part_to_device(part, device), self.born[name])
                weight = mask[..., None].to(x.dtype)
                found.append(((x * weight).sum(1) / weight.sum(1)).double().cpu().numpy())
        self.model.train(was_training)
        return rows, np.concatenate(found)


def fit_groups(encoders: Encoders, store: Store, tasks: Sequence[Task], stage: int) -> list[Group]:
    """The groups of a stage that was just learned, from at most `SAMPLES` training samples of each."""
    groups = []
    for family in dict.fromkeys(task.family for task in tasks):
        own = [task for task in tasks if task.family == family]
        each = [store.indices(task.name, "train", modalities=task.modalities) for task in own]
        indices = np.unique(np.concatenate(each))
        indices = indices[np.unique(np.linspace(0, len(indices) - 1, min(SAMPLES, len(indices))).astype(np.int64))]
        present, gaussians = {}, {}
        for name in encoders.born:
            rows, z = encoders.represent(store, name, indices)
            present[name] = len(rows) / len(indices)
            if len(rows) > 1:
                gaussians[name] = LowRankGaussian.fit(z)
        groups.append(Group(stage, family, tuple(task.name for task in own), len(indices), present, gaussians))
    return groups


def choose(
    groups: Sequence[Group], tasks: Mapping[str, Task], encoders: Encoders, store: Store, indices: ArrayLike
) -> Choice:
    """Which group each sample belongs to; only its modalities are looked at, never a label.

    Args:
        groups: at least one.
        tasks: descriptions of their tasks.
        encoders: see there.
        store: where the samples are.
        indices: (n,) of them; each must have a modality that some task reads.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    score = np.zeros((len(wanted), len(groups)))
    readable = np.zeros(score.shape, dtype=bool)
    for name in encoders.born:
        rows, z = encoders.represent(store, name, wanted)
        there = np.isin(np.arange(len(wanted)), rows)
        for g, group in enumerate(groups):
            share = (group.samples * group.present.get(name, 0.0) + 0.5) / (group.samples + 1.0)
            score[:, g] += np.where(there, math.log(share), math.log1p(-share))
            readable[:, g] |= there & any(name in tasks[task].modalities for task in group.tasks)
        known = [g for g, group in enumerate(groups) if name in group.gaussians]
        if known and len(rows):
            logs = np.stack([groups[g].gaussians[name].log_density(z) for g in known], axis=1)
            score[np.ix_(rows, np.array(known))] += (
                logs - np.logaddexp.reduce(logs, axis=1, keepdims=True) + math.log(len(known))
            )
    score = np.where(readable, score, -np.inf)
    certainty = np.exp(score - np.logaddexp.reduce(score, axis=1, keepdims=True))
    return Choice(certainty.argmax(axis=1).astype(np.int64), certainty)


def plain(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """The JSON part of groups; `tensors` is the rest."""
    keys = ("stage", "family", "tasks", "samples", "present")
    return [{**{key: getattr(g, key) for key in keys}, "gaussians": list(g.gaussians)} for g in groups]


def tensors(groups: Sequence[Group]) -> dict[str, Tensor]:
    """The numbers of the Gaussians, "<group>|<modality>|<which>" -> tensor."""
    return {
        f"{i}|{name}|{key}": torch.from_numpy(np.ascontiguousarray(getattr(gaussian, key)))
        for i, group in enumerate(groups)
        for name, gaussian in group.gaussians.items()
        for key in ("mean", "basis", "variances")
    } | {
        f"{i}|{name}|rest": torch.tensor([gaussian.rest], dtype=torch.float64)
        for i, group in enumerate(groups)
        for name, gaussian in group.gaussians.items()
    }


def parse(data: Sequence[Mapping[str, Any]], numbers: Mapping[str, Tensor]) -> list[Group]:
    """What `plain` and `tensors` gave; raises KeyError, TypeError or ValueError on anything else."""

    def gaussian(place: str) -> LowRankGaussian:
        mean, basis, variances = (numbers[f"{place}|{key}"].numpy() for key in ("mean", "basis", "variances"))
        return LowRankGaussian(mean, basis, variances, float(numbers[f"{place}|rest"].item()))

    return [
        Group(
            int(g["stage"]),
            str(g["family"]),
            tuple(g["tasks"]),
            int(g["samples"]),
            {str(name): float(share) for name, share in g["present"].items()},
            {str(name): gaussian(f"{i}|{name}") for name in g["gaussians"]},
        )
        for i, g in enumerate(data)
    ]
