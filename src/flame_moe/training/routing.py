"""Routing fingerprints: which experts a task's modalities are sent to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.data.loader import to_device
from flame_moe.nn.model import Flame


class Fingerprint(NamedTuple):
    """Where one modality of one task goes in one block.

    Attributes:
        modality: name.
        block: index.
        activation: (E,) share of samples sent to each expert; sums to K.
        gate: (E,) mean gate over all samples, chosen or not; sums to 1.
        usual: share of samples that go to the most frequent set of experts. At 1 the router looks at the modality only
            and not at the sample: whatever the number of experts, the modality has one fixed block.
    """

    modality: str
    block: int
    activation: tuple[float, ...]
    gate: tuple[float, ...]
    usual: float


def fingerprints(model: Flame, batches: Iterable[FlexiBatch], cursor: int) -> list[Fingerprint]:
    """Routing of a task in evaluation mode, over all samples that have each modality; empty where nothing is routed.

    Args:
        model: the network.
        batches: of one task.
        cursor: the task's cursor.
    """
    sums: dict[tuple[str, int], tuple[Tensor, Tensor, Counter[tuple[int, ...]]]] = {}
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            for b, routed in enumerate(model(to_device(batch, device), cursor).routing):
                for name, routing in routed.items():
                    gates = routing.sparse()
                    chosen = torch.zeros_like(gates).scatter(1, routing.chosen, 1.0)
                    zero = torch.zeros_like(gates[0])
                    active, gate, sets = sums.get((name, b), (zero, zero, Counter()))
                    sets.update(tuple(row) for row in routing.chosen.sort(1).values.tolist())
                    sums[name, b] = (active + chosen.sum(0), gate + gates.sum(0), sets)
    model.train(was_training)
    return [
        Fingerprint(
            modality=name,
            block=b,
            activation=tuple((active / sets.total()).tolist()),
            gate=tuple((gate / sets.total()).tolist()),
            usual=max(sets.values()) / sets.total(),
        )
        for (name, b), (active, gate, sets) in sums.items()
    ]
