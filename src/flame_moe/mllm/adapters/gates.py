"""Routing vectors without training: average activations, Arrow's prototypes, and the null expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.routed_layer import NullExpert, RoutedLinear
from flame_moe.mllm.adapters.scores import scores

if TYPE_CHECKING:
    from flame_moe.mllm.adapters.routed_model import RoutedLoraModel

Batch = Mapping[str, Tensor]


def is_empty(tuner: RoutedLoraModel, task: str) -> bool:
    """Whether an expert's routing vectors are all zero: neither trained nor filled."""
    return not any(bool(layer.lora_gate[task].any()) for _, layer in tuner.layers() if task in layer.lora_gate)


def null_is_fitted(tuner: RoutedLoraModel) -> bool:
    """Whether every layer's null expert has been fitted."""
    return all(bool(layer.lora_null[tuner.router].fitted) for _, layer in tuner.layers())


def fill(tuner: RoutedLoraModel, task: str, batches: Iterable[Batch] | None) -> None:
    """Set the routing vectors of an expert, which is active, to mean inputs or to Arrow's prototypes."""
    means = None if batches is None else _mean_inputs(tuner, batches)
    for name, layer in tuner.layers():
        if task in layer.lora_gate:
            vector = arrow_prototype(layer, task) if means is None else means[name]
            layer.lora_gate[task].data.copy_(vector)


def arrow_prototype(layer: RoutedLinear, task: str) -> Tensor:
    """First right singular vector of B A, (n,): the unit input that an expert's output is longest for.

    By the r x r problem: with A^T = Q R, the right singular vectors of B A are Q times those of B R^T.
    """
    down, up = layer.lora_A[task].weight.float(), layer.lora_B[task].weight.float()
    basis, triangle = torch.linalg.qr(down.T)
    return basis @ torch.linalg.svd(up @ triangle.T, full_matrices=False).Vh[0]


def fit_null(tuner: RoutedLoraModel, batches: Sequence[Batch], share: float) -> None:
    """Set vector and offset of every layer's null expert from a sample; the router is active.

    Where the null expert already took part it keeps doing so while the sample runs, so that layers see the inputs that
    they will see.
    """
    config = tuner.options
    means = _mean_inputs(tuner, batches)
    nulls: dict[str, NullExpert] = {name: layer.lora_null[tuner.router] for name, layer in tuner.layers()}
    for name, null in nulls.items():
        null.vector.copy_(means[name])
        null.offset.zero_()
    margins: dict[str, list[Tensor]] = {name: [] for name in nulls}

    def margin(name: str, layer: RoutedLinear, rows: Tensor) -> None:
        pool = [layer.lora_gate[task] for task in config.tasks if task in layer.lora_gate]
        if pool:
            best = scores(rows, torch.stack(pool), config.score).max(dim=-1).values
            margins[name].append(best - nulls[name](rows, config.score)[..., 0])

    _visit(tuner, batches, margin)
    for name, null in nulls.items():
        if margins[name]:
            found = torch.cat(margins[name]).sort().values
            null.offset.copy_(found[min(len(found) - 1, int(share * len(found)))])
        null.fitted.fill_(True)


def _mean_inputs(tuner: RoutedLoraModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Layer -> mean of its input over the real tokens of all batches, (n,) in float32."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def add(name: str, layer: RoutedLinear, rows: Tensor) -> None:
        total[name] = total.get(name, torch.zeros(())) + rows.float().sum(dim=0)
        count[name] = count.get(name, 0) + len(rows)

    _visit(tuner, batches, add)
    unseen = next((name for name, _ in tuner.layers() if not count.get(name)), None)
    if unseen is not None:
        raise AdapterError(f"layer '{unseen}' saw no token", where="batches", mend="Give at least one batch.")
    return {name: total[name] / count[name] for name in total}


def _visit(tuner: RoutedLoraModel, batches: Iterable[Batch], see: Callable[[str, RoutedLinear, Tensor], None]) -> None:
    """Run batches through the model and show every layer's real inputs, (tokens, n)."""

    def before(name: str, layer: Any, args: tuple[Any, ...]) -> None:
        if tuner.tokens.scouted is not None:
            return
        x = args[0]
        real = tuner.tokens.real_of(x)
        see(name, layer, x.reshape(-1, x.shape[-1]) if real is None else x[real])

    handles = [layer.register_forward_pre_hook(partial(before, name)) for name, layer in tuner.layers()]
    try:
        for batch in batches:
            tuner.model(**batch)
    finally:
        for handle in handles:
            handle.remove()
