"""What the routers of a model did while a record was kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flame_moe.mllm.adapters.scores import entropy


class RoutingRecord:
    """Routing mass of every expert in every layer, over the real tokens of some forwards.

    Example:
        >>> record = RoutingRecord()
        >>> record.add("layer", ("a", "b"), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), None)
        >>> record.mass()
        {'a': 0.75, 'b': 0.25}
    """

    def __init__(self) -> None:
        self._mass: dict[str, dict[str, Tensor]] = {}
        self._entropy: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, layer: str, names: Sequence[str], weights: Tensor, real: Tensor | None) -> None:
        """Count the weights of one call of a layer.

        Args:
            layer: its name.
            names: of the E experts.
            weights: (..., E)
            real: (...) which tokens are no padding, None for all.
        """
        chosen = weights.detach().float()
        rows = chosen.reshape(-1, chosen.shape[-1]) if real is None else chosen[real]
        if not len(rows):
            return
        mass = self._mass.setdefault(layer, {})
        for name, share in zip(names, rows.sum(dim=0), strict=True):
            mass[name] = mass.get(name, torch.zeros_like(share)) + share
        self._entropy[layer] = self._entropy.get(layer, torch.zeros(())) + entropy(rows).sum()
        self._tokens[layer] = self._tokens.get(layer, 0) + len(rows)

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Layer -> expert -> its share of the routing mass there, between 0 and 1."""
        return {
            layer: {name: float(total) / self._tokens[layer] for name, total in mass.items()}
            for layer, mass in self._mass.items()
        }

    def mass(self) -> dict[str, float]:
        """Expert -> its share of the routing mass, the mean over layers; shares sum to 1."""
        layers = self.by_layer()
        names = {name: None for mass in layers.values() for name in mass}
        return {name: sum(mass.get(name, 0.0) for mass in layers.values()) / len(layers) for name in names}

    def entropy(self) -> float:
        """Mean entropy of a token's weights in nats, over all layers; nan where nothing was recorded."""
        if not self._tokens:
            return float("nan")
        means = [float(self._entropy[layer]) / tokens for layer, tokens in self._tokens.items()]
        return sum(means) / len(means)
