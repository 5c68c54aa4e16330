"""Updates of the experts as stages: trained dense, cut to low rank, and added up to a cursor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flame_moe.continual.moments import Moment, Sums
from flame_moe.mllm.stream.encode import Encoded
from flame_moe.nn.slices import Slice

Update = dict[str, Tensor]
"""Name of a weight -> (experts, out, in)."""


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Both weights of the experts of every layer."""
    return {name: p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}


class Stages:
    """The experts' weights of a model as a base and one slice per stage: W(cursor) = W0 + sum over s <= cursor.

    Args:
        model: with the base weights in it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Update = {name: p.detach().clone() for name, p in expert_weights(model).items()}
        self.slices: list[dict[str, Slice]] = []

    def weights(self, cursor: int) -> Update:
        """The weights of a cursor, -1 for the base; slices are added in their order, so always the same bits."""
        found = {name: base.clone() for name, base in self.base.items()}
        for kept in self.slices[: cursor + 1]:
            for name, part in kept.items():
                if part is not None:
                    found[name] += (part if isinstance(part, Tensor) else part.dense()).view_as(found[name])
        return found

    def read(self, cursor: int) -> None:
        """Put the weights of a cursor into the model."""
        self.put(self.weights(cursor))

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Put some weights into the model."""
        with torch.no_grad():
            for name, p in expert_weights(self.model).items():
                p.copy_(weights[name])

    def update(self) -> Update:
        """What training has changed since the last stage: Delta."""
        before = self.weights(len(self.slices) - 1)
        return {name: p.detach() - before[name] for name, p in expert_weights(self.model).items()}

    def stored(self) -> int:
        """Numbers that all slices hold."""
        parts = [part for kept in self.slices for part in kept.values() if part is not None]
        return sum(p.numel() if isinstance(p, Tensor) else sum(t.numel() for t in _tensors(p)) for p in parts)


def _tensors(part: Any) -> list[Tensor]:
    return [t for t in part if isinstance(t, Tensor)]


@torch.no_grad()
def gather(model: Any, data: Encoded, rows: Iterable[Tensor]) -> dict[str, Moment]:
    """Second moments of what reaches each expert, padding left out: of a layer's tokens those that are routed to it,
    and of its down projection what it makes of them.

    Args:
        model: an OlmoeForCausalLM; not changed.
        data: of the task.
        rows: of its samples, in batches.

    Returns:
        Name of a weight -> Moment over its experts.
    """
    model.eval()
    sums: dict[str, Sums] = {}
    with _watched(model, sums) as mask:
        for which in rows:
            batch = data.batch(which, model.get_input_embeddings())
            mask[0] = batch.mask.bool().flatten()
            model(inputs_embeds=batch.embeds, attention_mask=batch.mask)
    return {name: part.moment() for name, part in sums.items()}


@contextmanager
def _watched(model: Any, sums: dict[str, Sums]) -> Iterator[list[Tensor]]:
    """Sums of the inputs of every layer's experts, while a list holds the mask of the running batch."""
    mask: list[Tensor] = [torch.zeros(0)]
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "gate_up_proj")}
    handles = []
    for name, layer in layers.items():
        count, _, width = layer.gate_up_proj.shape
        sums[f"{name}.gate_up_proj"] = Sums(count, width)
        sums[f"{name}.down_proj"] = Sums(count, layer.down_proj.shape[-1])
        handles.append(layer.register_forward_pre_hook(partial(_see, name, sums, mask)))
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()


def _see(name: str, sums: dict[str, Sums], mask: list[Tensor], layer: Any, args: tuple[Tensor, ...]) -> None:
    states, index, _ = args
    for expert in range(layer.gate_up_proj.shape[0]):
        rows = states[(index == expert).any(-1) & mask[0]]
        if len(rows):
            gate, up = nn.functional.linear(rows, layer.gate_up_proj[expert]).chunk(2, dim=-1)
            sums[f"{name}.gate_up_proj"].rows(expert, rows)
            sums[f"{name}.down_proj"].rows(expert, layer.act_fn(gate) * up)
