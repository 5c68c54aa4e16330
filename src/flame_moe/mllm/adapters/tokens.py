"""Which tokens of the running forward are real, which belong to the prompt, and whether a forward is running at all.

A linear layer sees vectors only. The hooks here sit on the wrapped model and on its language model (public hooks of
`torch.nn.Module`), read `attention_mask`, and leave the answer where every adapted layer of the model finds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flame_moe.mllm.adapters.inputs import CACHES, check_inputs, filled_cache
from flame_moe.mllm.adapters.record import RoutingRecord

IGNORED = -100
"""Label of a token that no loss counts: the prompt."""
_MEMORY = "flame_routing"
_KEPT = "logits_to_keep"


class Tokens:
    """What one model's layers know of the tokens that they are given; shared by all of them.

    Attributes:
        real: (B, T) which tokens of this forward are no padding; None if all are.
        prompt: (B, T) which tokens decide the routing of the whole sequence; None if all real ones do.
        running: how many of the hooked models are inside their forward. It is 0 while gradient checkpointing
            computes a layer again during backward, so nothing is counted twice.
        decided: scores of the samples, by name of layer or of expert, that the first forward with a cache left there.
        scout: whether a forward has to run once beforehand, so that all layers can agree.
        scouted: expert -> its score in each layer, (B,) each, while such a forward runs; else None.
        record: what keeps the routing of the layers, if somebody asked for it.
        outer: length of the prompt that `generate` was called with, known only inside it.
        told: (B, T) the prompt that `prompted` was told, inside it.
    """

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.prompt: Tensor | None = None
        self.running = 0
        self.decided: dict[str, Tensor] = {}
        self.scout: Callable[[], bool] | None = None
        self.scouted: dict[str, list[Tensor]] | None = None
        self.record: RoutingRecord | None = None
        self.outer: int | None = None
        self.told: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, inner: nn.Module) -> None:
        """Hook the wrapped model and, where it is another one, the language model in it."""
        for module in {id(m): m for m in (model, inner)}.values():
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def real_of(self, x: Tensor) -> Tensor | None:
        """The mask of real tokens in the shape of a layer's input, (..., n) -> (...); None if all of them are real.

        A layer whose input is laid out otherwise (the experts of a sparse layer, a vision tower) has no such mask.
        """
        return _shaped(self.real, x)

    def prompt_of(self, x: Tensor) -> Tensor | None:
        """Like `real_of`, of the tokens that decide for the sequence."""
        return _shaped(self.real if self.prompt is None else self.prompt, x)

    @contextmanager
    def recording(self) -> Iterator[RoutingRecord]:
        """Keep what the routers do inside the block."""
        before, self.record = self.record, RoutingRecord()
        try:
            yield self.record
        finally:
            self.record = before

    @contextmanager
    def prompted(self, mask: Tensor | None) -> Iterator[None]:
        """Say which tokens of the forwards inside belong to the prompt: (B, T). Labels would make a loss too."""
        before, self.told = self.told, mask
        try:
            yield
        finally:
            self.told = before

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running += 1
        if self.running > 1:
            return
        try:
            given = _arguments(module, args, kwargs)
            shape = _shape(given)
            check_inputs(module, given)
            cache = filled_cache(given)
            past = 0 if cache is None else int(cache.get_seq_length())
            self.real = None if shape is None else _real(given.get("attention_mask"), *shape, past)
            self.prompt = None if shape is None else self._prompt(given, *shape)
            self.decided = dict(getattr(cache, _MEMORY, {}))
            if not self.decided and self.scout is not None and self.scout():
                self.decided = self._scout(module, given)
        except BaseException:
            self.running = 0
            raise

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.running = max(0, self.running - 1)
        if self.running or not self.decided:
            return
        given = _arguments(module, args, kwargs)
        kept = output if isinstance(output, Mapping) else {}
        cache = next((found[name] for found in (given, kept) for name in CACHES if found.get(name) is not None), None)
        if hasattr(cache, "get_seq_length"):
            setattr(cache, _MEMORY, self.decided)

    def _scout(self, module: nn.Module, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the forward once without cache and gradient; expert -> (B,) its mean score over layers."""
        self.scouted = {}
        try:
            with torch.no_grad():
                module(**_without_cache(given), **few_logits(module))
            return {name: torch.stack(found).mean(dim=0) for name, found in self.scouted.items()}
        finally:
            self.scouted = None

    def _prompt(self, given: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
        labels = given.get("labels")
        if self.told is not None and self.told.shape == (batch, length):
            prompt = self.told.bool()
        elif isinstance(labels, Tensor) and labels.shape == (batch, length):
            prompt = labels == IGNORED
        elif self.outer is not None and self.outer < length:
            prompt = torch.zeros(batch, length, dtype=torch.bool)
            prompt[:, : self.outer] = True
        else:
            return None
        return prompt if self.real is None else prompt.to(self.real.device) & self.real


def few_logits(module: nn.Module) -> dict[str, int]:
    """What a forward is given whose logits nobody reads: of a large vocabulary they are a fifth of the work."""
    return {_KEPT: 1} if _KEPT in inspect.signature(module.forward).parameters else {}


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by name, those given by place included."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, T) of a forward's input."""
    for name, axes in (("input_ids", 2), ("inputs_embeds", 3)):
        value = given.get(name)
        if isinstance(value, Tensor) and value.ndim == axes:
            return value.shape[0], value.shape[1]
    return None


def _real(mask: Any, batch: int, length: int, past: int) -> Tensor | None:
    """The columns of a padding mask that belong to this forward's tokens, (B, T).

    A mask of four axes (of a static cache, or made by hand) says which key a query attends to: a token that nobody
    attends to is padding. Those of a static cache have columns for tokens that are still to come.

    Args:
        mask: what the model was given, or one per kind of attention.
        batch: B.
        length: T.
        past: how many tokens are in the cache.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.shape[0] != batch:
        return None
    if mask.ndim == 4 and mask.shape[-1] >= past + length:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed.any(dim=1).any(dim=1)[:, past : past + length]
    if mask.ndim == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].bool()
    return None


def _without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a first forward without its cache, nor the columns that a mask has for a static one's future."""
    left = {name: value for name, value in given.items() if name not in (*CACHES, "labels", "use_cache", _KEPT)}

    def cut(mask: Any) -> Any:
        if isinstance(mask, Mapping):
            return {kind: cut(part) for kind, part in mask.items()}
        return mask[..., : mask.shape[-2]] if isinstance(mask, Tensor) and mask.ndim == 4 else mask

    return left | {"attention_mask": cut(given.get("attention_mask")), "use_cache": False}


def _shaped(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if x.shape[:-1] == mask.shape:
        return mask.to(x.device)
    if x.ndim == 2 and x.shape[0] == mask.numel():
        return mask.reshape(-1).to(x.device)
    return None
