"""Routing vectors without training: average activations, Arrow's prototypes, discriminants, and the null expert."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.routed_layer import NullExpert, RoutedLinear
from flame_moe.mllm.adapters.scores import discriminant, pooled, scores
from flame_moe.mllm.adapters.tokens import IGNORED, few_logits

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


def is_fitted(tuner: RoutedLoraModel, task: str) -> bool:
    """Whether an expert's routing vectors come from `fit`."""
    return any(bool(layer.lora_offset[task].any()) for _, layer in tuner.layers() if task in layer.lora_offset)


def fit(tuner: RoutedLoraModel, task: str, batches: Iterable[Batch], background: Iterable[Batch], ridge: float) -> None:
    """Set routing vectors and offsets of an expert to discriminants of its prompts from those of a background.

    Layers see what they will see when they are asked: no expert where all layers agree beforehand, else its own.
    """
    with tuner.without_experts():
        around = prompt_means(tuner, background, "background")
    if tuner.options.granularity == "model":
        with tuner.without_experts():
            own = prompt_means(tuner, batches, "batches")
    else:
        tuner.use_expert(task)
        own = prompt_means(tuner, batches, "batches")
    for name, layer in tuner.layers():
        if len(around[name]) < 2:
            raise AdapterError("the background is a single prompt", where="background", mend="Give some hundred.")
        if task in layer.lora_gate:
            vector, offset = discriminant(own[name], around[name], ridge)
            layer.lora_gate[task].data.copy_(vector)
            layer.lora_offset[task].data.copy_(offset)


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

    def margin(name: str, layer: RoutedLinear, x: Tensor) -> None:
        pool = [layer.lora_gate[task] for task in config.tasks if task in layer.lora_gate]
        if pool:
            rows = _real(tuner, x)
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

    def add(name: str, layer: RoutedLinear, x: Tensor) -> None:
        rows = _real(tuner, x)
        total[name] = total.get(name, torch.zeros(())) + rows.float().sum(dim=0)
        count[name] = count.get(name, 0) + len(rows)

    _visit(tuner, batches, add)
    _insist_on_all(tuner, count, "batches")
    return {name: total[name] / count[name] for name in total}


def prompt_means(tuner: RoutedLoraModel, batches: Iterable[Batch], where: str) -> dict[str, Tensor]:
    """Layer -> mean of its input over the prompt of each sample, (samples, n) in float32."""
    found: dict[str, list[Tensor]] = {}

    def add(name: str, layer: RoutedLinear, x: Tensor) -> None:
        if x.ndim != 3:
            raise AdapterError("a layer does not see whole prompts", where=name, mend="Leave it out of the targets.")
        found.setdefault(name, []).append(pooled(x.float(), tuner.tokens.prompt_of(x))[:, 0])

    _visit(tuner, batches, add)
    _insist_on_all(tuner, found, where)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _insist_on_all(tuner: RoutedLoraModel, seen: Container[str], where: str) -> None:
    unseen = next((name for name, _ in tuner.layers() if name not in seen), None)
    if unseen is not None:
        raise AdapterError(f"layer '{unseen}' saw no token", where=where, mend="Give at least one batch.")


def _real(tuner: RoutedLoraModel, x: Tensor) -> Tensor:
    """The inputs of real tokens, (tokens, n)."""
    real = tuner.tokens.real_of(x)
    return x.reshape(-1, x.shape[-1]) if real is None else x[real]


def _visit(tuner: RoutedLoraModel, batches: Iterable[Batch], see: Callable[[str, RoutedLinear, Tensor], None]) -> None:
    """Run batches through the model and show every layer's inputs, (B, T, n), padding included."""

    def before(name: str, layer: Any, args: tuple[Any, ...]) -> None:
        if tuner.tokens.scouted is None:
            see(name, layer, args[0])

    handles = [layer.register_forward_pre_hook(partial(before, name)) for name, layer in tuner.layers()]
    try:
        for batch in batches:
            labels = batch.get("labels")
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with tuner.tokens.prompted(None if labels is None else labels == IGNORED):
                tuner.model(**inputs, **few_logits(tuner.model))
    finally:
        for handle in handles:
            handle.remove()
