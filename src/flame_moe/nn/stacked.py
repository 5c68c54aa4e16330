"""Weights that grow: the one place where continual growth lives.

A task keeps a *cursor*, the stage at which it was learned, and reads every weight as it stood at that stage:

    effective(cursor) = base + sum of the frozen slices with stage <= cursor (+ delta while its stage is being learned)

(paper Eq. 4). The frozen part is one dense matrix per cursor, computed once and cached outside the checkpoint, so
that training and serving cost what a plain layer costs, whatever the number of stages.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from flame_moe.nn.slices import Kind, LowRank, Ragged, Slice, allocate, assemble, kind_of, tensors

Factorise = Callable[[Tensor], Slice]


class Observer(Protocol):
    """Who is shown the inputs of a weight (see `StackedMatrix.observe`)."""

    def rows(self, which: int | None, x: Tensor) -> None:
        """Inputs (N, in) of one matrix of the stack; for None (matrices, N, in), of each."""

    def picks(self, index: Tensor) -> None:
        """Numbers (N,) of the rows that were read from a table."""


class Growable(nn.Module, ABC):
    """Something that is frozen after its stage and may receive an update of its own in a later one."""

    @abstractmethod
    def grow(self, stage: int) -> None:
        """Start an update for `stage`; it changes nothing until it is trained."""

    @abstractmethod
    def commit(self, factorise: Factorise | None = None) -> float | None:
        """Freeze the update in progress; returns the relative Frobenius error of its compression, if any."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """JSON-ready shape of what is stored, enough for `restore` to allocate it."""

    @abstractmethod
    def restore(self, structure: dict[str, Any]) -> None:
        """Allocate what `structure` names, so that a state dict can be loaded strictly."""


class _Sum(NamedTuple):
    """The dense weight of a cursor, and what it was made from."""

    total: Tensor
    sources: list[tuple[str, Tensor, int]]


class StackedMatrix(Growable):
    """A linear map (out, in), or a stack of them (..., out, in), that grows by frozen low-rank slices (Eq. 3-4).

    The update in progress is dense when it begins (`delta`); `compress` may turn it into factors that train on
    (`delta_a`, `delta_b`, and `delta_dense` for the matrices of a stack that stay dense).

    A base may itself be cut to factors (`cut_base`); it is then empty and its stage has a slice like any other.

    Args:
        shape: (..., out, in).
        stage: the stage in which the base is trained.
        bound: the base is drawn uniformly from [-bound, bound]; default 1 / sqrt(in).

    Example:
        >>> w = StackedMatrix(4, 3)
        >>> before = w.effective(0).clone()
        >>> w.grow(1)
        >>> torch.equal(w.effective(1), before)
        True
    """

    cache_size = 16
    observer: Observer | None = None

    def __init__(self, *shape: int, stage: int = 0, bound: float | None = None) -> None:
        super().__init__()
        limit = 1.0 / math.sqrt(shape[-1]) if bound is None else bound
        self.shape = torch.Size(shape)
        self.base = nn.Parameter(torch.empty(shape).uniform_(-limit, limit))
        self.base_stage = stage
        self.delta: nn.Parameter | None
        self.register_parameter("delta", None)
        self.delta_stage: int | None = None
        self._kind: Kind = "dense"
        self._slices: dict[int, Kind] = {}
        self._cache: OrderedDict[int, _Sum] = OrderedDict()

    @property
    def matrices(self) -> int:
        """How many maps are stacked."""
        return math.prod(self.shape[:-2])

    def effective(self, cursor: int) -> Tensor:
        """The weight a task with this cursor reads: (..., out, in)."""
        frozen = self._frozen(tuple(s for s in self._slices if s <= cursor))
        if self.delta_stage is not None and cursor >= self.delta_stage:
            return frozen + self._dense(self.update())
        return frozen

    def observe(self, x: Tensor, mask: Tensor | None = None, which: int = 0) -> None:
        """Show the inputs (..., in) of one matrix of the stack, those in the mask, to whoever gathers them."""
        if self.observer is not None:
            self.observer.rows(which, x.flatten(0, -2) if mask is None else x[mask])

    def observe_each(self, x: Tensor) -> None:
        """Show the inputs (matrices, N, in) of all matrices of the stack."""
        if self.observer is not None:
            self.observer.rows(None, x)

    def slice(self, stage: int) -> LowRank | Ragged | Tensor:
        """The frozen update of a stage; raises KeyError where that stage left this weight alone."""
        return assemble(self._slices[stage], self._named(f"slice{stage}_"), self.shape)

    def update(self) -> LowRank | Ragged | Tensor:
        """The update in progress, which trains."""
        if self.delta is not None:
            return self.delta
        return assemble(self._kind, self._named("delta_"), self.shape)

    def active(self) -> list[nn.Parameter]:
        """Parameters of the update in progress, if there is one."""
        return [p for name, p in self.named_parameters(recurse=False) if name.startswith("delta")]

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages that left a slice, in order."""
        return tuple(self._slices)

    def grow(self, stage: int) -> None:
        if self.delta_stage is not None:
            raise RuntimeError(f"stage {self.delta_stage} is still being learned: commit it before stage {stage}")
        if self._slices and stage <= max(self._slices):
            raise RuntimeError(f"stage {stage} does not come after stage {max(self._slices)}")
        self.base.requires_grad_(False)
        self.delta = nn.Parameter(self.base.new_zeros(self.shape))
        self.delta_stage = stage

    def compress(self, part: Slice) -> None:
        """Put `part` in the place of the update in progress; it trains on in that form. None ends the update."""
        stage = self.delta_stage
        if stage is None:
            raise RuntimeError("there is no update in progress: grow first")
        self._end()
        if part is None:
            return
        self.delta_stage, self._kind = stage, kind_of(part)
        for name, tensor in tensors(part).items():
            parameter = nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))
            self.register_parameter("delta" if self._kind == "dense" else f"delta_{name}", parameter)

    @torch.no_grad()
    def cut_base(self, factorise: Factorise) -> Slice:
        """Put a compressed form in the place of the base, and return it; a dense one leaves the base as it is."""
        part = factorise(self.base)
        if not isinstance(part, LowRank | Ragged):
            return part
        self._write(self.base_stage, part)
        self.base = nn.Parameter(self.base.new_empty(0), requires_grad=False)
        return part

    @torch.no_grad()
    def commit(self, factorise: Factorise | None = None) -> float | None:
        """Turn the update into a slice, compressed first if a way is given; an update of exact zeros leaves none."""
        self.base.requires_grad_(False)
        if self.delta_stage is None:
            return None
        stage, update = self.delta_stage, self.update()
        self._end()
        delta = self._dense(update)
        if not bool(delta.any()):
            return None
        part: Slice = update if factorise is None else factorise(delta)
        if part is None:
            return 1.0
        self._write(stage, part)
        return float((delta - self._dense(part)).norm() / delta.norm())

    def structure(self) -> dict[str, Any]:
        kinds = {str(s): kind for s, kind in self._slices.items()}
        plain: dict[str, Any] = {"base_stage": self.base_stage, "slices": kinds, "delta": self.delta_stage}
        return plain if self._kind == "dense" else {**plain, "update": self._kind}

    def restore(self, structure: dict[str, Any]) -> None:
        self._end()
        self.base_stage = int(structure["base_stage"])
        self.base.requires_grad_(False)
        if str(self.base_stage) in structure["slices"]:
            self.base = nn.Parameter(self.base.new_empty(0), requires_grad=False)
        for stage, kind in structure["slices"].items():
            self._write(int(stage), allocate(kind, self.shape, self.base))
        if structure["delta"] is not None:
            self.grow(int(structure["delta"]))
            if "update" in structure:
                self.compress(allocate(structure["update"], self.shape, self.base))

    def _named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a slice, or of the update in progress, by the names that `tensors` gives them."""
        own = {**self._parameters, **self._buffers}
        found = {name: own.get(prefix + name) for name in ("a", "b", "dense")}
        return {name: t for name, t in found.items() if t is not None}

    def _dense(self, part: LowRank | Ragged | Tensor) -> Tensor:
        return part if isinstance(part, Tensor) else part.dense().view(self.shape)

    def _end(self) -> None:
        """Forget the update in progress."""
        for name in ("delta_a", "delta_b", "delta_dense"):
            self._parameters.pop(name, None)
        self.delta, self.delta_stage, self._kind = None, None, "dense"

    def _write(self, stage: int, part: LowRank | Ragged | Tensor) -> None:
        for name, tensor in tensors(part).items():
            frozen = tensor.detach()
            self.register_buffer(f"slice{stage}_{name}", frozen.clone(memory_format=torch.contiguous_format))
        self._slices[stage] = kind_of(part)

    def _frozen(self, stages: tuple[int, ...]) -> Tensor:
        """Base plus the given slices, added in order so that every prefix is reused bit for bit."""
        if not stages:
            return self.base if self.base.numel() else self.base.new_zeros(self.shape)
        hit = self._cache.get(stages[-1])
        if hit is not None and self._holds(hit):
            self._cache.move_to_end(stages[-1])
            return hit.total
        part = self.slice(stages[-1])
        # A sum that is first read while predicting must not stay an inference tensor: later training reads it too.
        with torch.inference_mode(False):
            total = self._frozen(stages[:-1]) + self._dense(part)
        if not self.base.requires_grad:
            self._cache[stages[-1]] = _Sum(total, self._sources(stages))
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return total

    def _sources(self, stages: tuple[int, ...]) -> list[tuple[str, Tensor, int]]:
        """Name, tensor and write counter of everything that a sum is made from."""
        names = ["base", *(f"slice{s}_{name}" for s in stages for name in self._named(f"slice{s}_"))]
        own: dict[str, Tensor | None] = {**self._parameters, **self._buffers}
        return [(name, t, t._version) for name in names if (t := own[name]) is not None]

    def _holds(self, cached: _Sum) -> bool:
        """Whether a cached sum is still one of the tensors that are there: the same ones, never written to since."""
        if self.base.requires_grad:
            return False
        parameters, buffers = self._parameters, self._buffers
        for name, tensor, version in cached.sources:
            now = buffers[name] if name in buffers else parameters.get(name)
            if now is not tensor or tensor._version != version:
                return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedMatrix:
        self._cache.clear()
        # PyTorch's hook for moving and casting has no annotations; the cached sums must not outlive a move.
        return cast(StackedMatrix, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}


class StageVector(Growable):
    """A small parameter (bias, norm, query) with one frozen copy per stage that changed it.

    A cursor reads the copy of the greatest stage <= cursor. For a bias this is b0 plus the sum of stage deltas.

    Args:
        value: the initial value, any shape.
        stage: the stage in which it is trained first.
    """

    def __init__(self, value: Tensor, stage: int = 0) -> None:
        super().__init__()
        self.copies = nn.ParameterDict({str(stage): nn.Parameter(value.clone())})
        self._places: dict[int, str] = {}
        """Which copy a cursor reads; forgotten when copies come or go."""

    def at(self, cursor: int) -> Tensor:
        """The copy that a task with this cursor reads."""
        place = self._places.get(cursor)
        if place is None:
            stages = [int(s) for s in self.copies]
            place = str(max((s for s in stages if s <= cursor), default=min(stages)))
            self._places[cursor] = place
        return self.copies[place]

    def grow(self, stage: int) -> None:
        source = self.at(stage)
        self.copies.requires_grad_(False)
        self.copies[str(stage)] = nn.Parameter(source.detach().clone())
        self._places = {}

    def commit(self, factorise: Factorise | None = None) -> float | None:
        """Freeze the newest copy, or drop it if training left it as it was."""
        self.copies.requires_grad_(False)
        stages = sorted(int(s) for s in self.copies)
        if len(stages) > 1 and torch.equal(self.copies[str(stages[-1])], self.copies[str(stages[-2])]):
            del self.copies[str(stages[-1])]
            self._places = {}
        return None

    def structure(self) -> dict[str, Any]:
        return {"stages": [int(s) for s in self.copies]}

    def restore(self, structure: dict[str, Any]) -> None:
        like = next(iter(self.copies.values()))
        self.copies = nn.ParameterDict({str(s): nn.Parameter(torch.empty_like(like)) for s in structure["stages"]})
        self.copies.requires_grad_(False)
        self._places = {}


class Settled(Growable):
    """A module that is trained in the stage in which it appears and is frozen ever after: no stage gives it an update.

    Args:
        module: with parameters of its own, none of them growable.
        stage: the stage in which it is trained.
    """

    def __init__(self, module: nn.Module, stage: int) -> None:
        super().__init__()
        self.module, self.stage = module, stage

    def grow(self, stage: int) -> None:
        """Nothing: it does not grow."""

    def commit(self, factorise: Factorise | None = None) -> float | None:
        self.module.requires_grad_(False)
        return None

    def structure(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def restore(self, structure: dict[str, Any]) -> None:
        self.stage = int(structure["stage"])
        self.module.requires_grad_(False)


def growables(module: nn.Module) -> Iterator[tuple[str, Growable]]:
    """Every growable below `module`, with its name."""
    for name, child in module.named_modules():
        if isinstance(child, Growable):
            yield name, child
