"""Routing fingerprints: which experts a task's modalities are sent to."""

from __future__ import annotations

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
    """

    modality: str
    block: int
    activation: tuple[float, ...]
    gate: tuple[float, ...]


def fingerprints(model: Flame, batches: Iterable[FlexiBatch], cursor: int) -> list[Fingerprint]:
    """Routing of a task in evaluation mode, over all samples that have each modality; empty where nothing is routed.

    Args:
        model: the network.
        batches: of one task.
        cursor: the task's cursor.
    """
    sums: dict[tuple[str, int], tuple[Tensor, Tensor, int]] = {}
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            for b, routed in enumerate(model(to_device(batch, device), cursor).routing):
                for name, routing in routed.items():
                    gates = routing.sparse()
                    chosen = torch.zeros_like(gates).scatter(1, routing.chosen, 1.0)
                    old = sums.get((name, b), (torch.zeros_like(gates[0]), torch.zeros_like(gates[0]), 0))
                    sums[name, b] = (old[0] + chosen.sum(0), old[1] + gates.sum(0), old[2] + len(gates))
    model.train(was_training)
    return [
        Fingerprint(name, b, tuple((active / n).tolist()), tuple((gate / n).tolist()))
        for (name, b), (active, gate, n) in sums.items()
    ]
