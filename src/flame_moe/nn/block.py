"""The cross-modal block: per-modality attention, then one mixture of experts shared by all modalities.

| preset | what differs |
|---|---|
| residual | default: pre-norm residual connections around attention and experts, positions, own patch maps |
| paper | no residual: Y = MoE(LN(MHSA(LN X))), last step read out, no positions |
| reference | paper, with what the published code does: zero-initialised gates, interaction loss on noisy sparse gates |
| no_moe | control: residual without the experts |
| dense | control: the K active experts for everybody, no router; equal active parameters |
| shared_router | control: residual with one router for all modalities |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flame_moe.nn.attention import SelfAttention
from flame_moe.nn.dropout import dropout
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import Router, Routing, choose
from flame_moe.nn.layers import StackedNorm
from flame_moe.nn.moe import Sequences, mixtures
from flame_moe.schema import ModelConfig

_SHARED = "shared"


@dataclass(frozen=True)
class Preset:
    """The switches behind a preset's name."""

    residual: bool = True
    positions: bool = True
    experts: Literal["routed", "dense", "none"] = "routed"
    shared_router: bool = False
    zero_gate: bool = False
    clean_interaction: bool = True
    readout: Literal["last", "mean", "attention"] | None = None


PRESETS: dict[str, Preset] = {
    "residual": Preset(),
    "paper": Preset(residual=False, positions=False, readout="last"),
    "reference": Preset(residual=False, positions=False, zero_gate=True, clean_interaction=False, readout="last"),
    "no_moe": Preset(experts="none"),
    "dense": Preset(experts="dense"),
    "shared_router": Preset(shared_router=True),
}


class ModalityLayer(nn.Module):
    """What one modality owns in a block: its self-attention, and the norms before it and before the experts."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        self.before = StackedNorm(config.width, stage=stage)
        self.attention = SelfAttention(config.width, config.heads, config.dropout, stage=stage)
        routed = PRESETS[config.preset].experts != "none"
        self.between = StackedNorm(config.width, stage=stage) if routed else None


class Column(nn.Module, ABC):
    """What a stage adds to a block beside its pool (`nn.columns`)."""

    @abstractmethod
    def mix(
        self, block: Block, ready: Mapping[str, Sequences], cursor: int
    ) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        """What the experts make of every modality, (n, T, d), and where its sequences went."""


class Block(nn.Module):
    """One block. Modalities meet in the shared experts and nowhere else; the head fuses them.

    Args:
        config: widths, experts, preset.
        stage: the stage in which the shared pool is trained first.
    """

    def __init__(self, config: ModelConfig, stage: int = 0) -> None:
        super().__init__()
        self.config, self.preset = config, PRESETS[config.preset]
        self.layers = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        self.columns = nn.ModuleDict()
        self.pool: ExpertPool | None = None
        if self.preset.experts != "none":
            size = config.top_k if self.preset.experts == "dense" else config.experts
            self.pool = ExpertPool(size, config.width, config.hidden, config.kernel, config.dropout, stage=stage)

    def add_modality(self, name: str, stage: int) -> None:
        """Norms and attention of a modality that first appears at `stage`."""
        self.layers[name] = ModalityLayer(self.config, stage)

    def add_router_head(
        self, name: str, stage: int, *, experts: int | None = None, combine: str = "own", load: str = "expected"
    ) -> None:
        """A router head for the tasks of `stage` on this modality (one for all with a shared router)."""
        if self.preset.experts != "routed":
            return
        key = self._router_key(name)
        if key not in self.routers:
            c = self.config
            self.routers[key] = Router(c.width, c.experts, c.top_k, c.gate, zero=self.preset.zero_gate)
        router = self.routers[key]
        assert isinstance(router, Router)
        if str(stage) not in router.heads:
            router.add_head(stage, experts=experts, combine=combine, load=load)

    def forward(self, inputs: Mapping[str, Sequences], cursor: int) -> tuple[dict[str, Sequences], dict[str, Routing]]:
        """Transform every modality's sequences; also returns where they were routed."""
        return self.together([(inputs, cursor)])[0]

    def together(
        self, parts: Sequence[tuple[Mapping[str, Sequences], int]]
    ) -> list[tuple[dict[str, Sequences], dict[str, Routing]]]:
        """`forward` for the inputs of several tasks, each at its own cursor, with one pass through the experts."""
        attended = [self.attend(inputs, cursor) for inputs, cursor in parts]
        if self.pool is None:
            return [(self._after(inputs, a, {}), {}) for (inputs, _), (a, _) in zip(parts, attended, strict=True)]
        mixed = self._mix([(ready, cursor) for (_, cursor), (_, ready) in zip(parts, attended, strict=True)])
        routed = self.preset.experts == "routed"
        each = zip(parts, attended, mixed, strict=True)
        return [(self._after(inputs, a, said), r if routed else {}) for (inputs, _), (a, _), (said, r) in each]

    def _after(
        self, inputs: Mapping[str, Sequences], attended: Mapping[str, Tensor], said: Mapping[str, Tensor]
    ) -> dict[str, Sequences]:
        """What leaves the block, from what the experts said."""
        if self.pool is None:
            return {name: Sequences(attended[name], mask) for name, (_, mask) in inputs.items()}
        dropped = {name: dropout(y, self.config.dropout, self.training) for name, y in said.items()}
        whole = {n: attended[n] + y for n, y in dropped.items()} if self.preset.residual else dropped
        return {name: Sequences(y, inputs[name].mask) for name, y in whole.items()}

    def attend(self, inputs: Mapping[str, Sequences], cursor: int) -> tuple[dict[str, Tensor], dict[str, Sequences]]:
        """Every modality after its attention, and what of it goes to the experts."""
        rate = self.config.dropout
        attended: dict[str, Tensor] = {}
        ready: dict[str, Sequences] = {}
        for name, (x, mask) in inputs.items():
            layer = self.layers[name]
            assert isinstance(layer, ModalityLayer)
            a = dropout(layer.attention(layer.before(x, cursor), mask, cursor), rate, self.training)
            attended[name] = x + a if self.preset.residual else a
            if layer.between is not None:
                ready[name] = Sequences(layer.between(attended[name], cursor), mask)
        return attended, ready

    def columns_until(self, cursor: int) -> dict[int, Column]:
        """The columns that a task with this cursor may read, by stage, in order."""
        found = {int(stage): column for stage, column in self.columns.items() if int(stage) <= cursor}
        return {stage: column for stage, column in sorted(found.items()) if isinstance(column, Column)}

    def routes(self, name: str, stage: int) -> bool:
        """Whether a modality has a router head of this very stage."""
        router = self.routers[self._router_key(name)]
        assert isinstance(router, Router)
        return str(stage) in router.heads

    def _mix(
        self, parts: Sequence[tuple[dict[str, Sequences], int]]
    ) -> list[tuple[dict[str, Tensor], dict[str, Routing]]]:
        """What the experts make of each task's inputs, and where these went."""
        assert self.pool is not None
        if any(self.columns_until(cursor) for _, cursor in parts):
            return [self._mix_columns(ready, cursor) for ready, cursor in parts]
        routed = [(ready, self.route(ready, cursor), cursor) for ready, cursor in parts]
        said = mixtures(routed, self.pool)
        return [(y, routings) for y, (_, routings, _) in zip(said, routed, strict=True)]

    def _mix_columns(self, ready: dict[str, Sequences], cursor: int) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        """The same for one task, whose column is asked if there is one."""
        columns = self.columns_until(cursor)
        return columns[max(columns)].mix(self, ready, cursor) if columns else self._mix([(ready, cursor)])[0]

    def route(self, ready: Mapping[str, Sequences], cursor: int) -> dict[str, Routing]:
        """Where the sequences of every modality go."""
        if self.preset.experts != "routed":
            return {name: self._to_all(z.x) for name, z in ready.items()}
        scores = []
        for name, z in ready.items():
            router = self.router(name)
            assert router is not None
            scores.append(router.scores(z.x, z.mask, cursor))
        return dict(zip(ready, choose(scores), strict=True))

    def _to_all(self, x: Tensor) -> Routing:
        """Every sequence to every expert, in equal shares."""
        n, k = len(x), self.config.top_k
        index = torch.arange(k, device=x.device).expand(n, k)
        even = torch.full((n, k), 1.0 / k, device=x.device)
        return Routing(index, even, even, even.sum(0))

    def router(self, name: str) -> Router | None:
        """The router of a modality, if it has one."""
        key = self._router_key(name)
        if key not in self.routers:
            return None
        router = self.routers[key]
        assert isinstance(router, Router)
        return router

    def _router_key(self, name: str) -> str:
        return _SHARED if self.preset.shared_router else name
