"""FLAME: encoders, blocks with per-modality routing into shared experts, and one head per task (arXiv 2605.09355)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flame_moe.batch import FlexiBatch, ModalityBatch
from flame_moe.errors import RecipeError, nearest
from flame_moe.nn.attention import positions
from flame_moe.nn.block import PRESETS, Block
from flame_moe.nn.encoders import ENCODERS, TokenEncoder
from flame_moe.nn.fusion import Head
from flame_moe.nn.gating import Router, Routing
from flame_moe.nn.layers import StackedNorm
from flame_moe.nn.losses import balance_loss, interaction_loss
from flame_moe.nn.moe import Sequences
from flame_moe.nn.stacked import Growable, growables
from flame_moe.schema import Modality, ModelConfig, Task


class Output(NamedTuple):
    """What one forward gives.

    Attributes:
        logits: (B, outputs); standardised values for regression.
        aux: scalar, balance and interaction losses with their coefficients; 0 where nothing is routed.
        routing: per block, modality -> Routing.
    """

    logits: Tensor
    aux: Tensor
    routing: tuple[dict[str, Routing], ...]


class ModalityPath(nn.Module):
    """What one modality owns outside the blocks: its encoder and the norms before and after them."""

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__()
        self.encoder = ENCODERS[modality.kind](modality, config, stage)
        self.enter = StackedNorm(config.width, stage=stage)
        self.leave = StackedNorm(config.width, stage=stage)


class Flame(nn.Module):
    """The network. It grows by modalities, router heads and tasks; what a stage trains is not its business.

    Example:
        >>> from flame_moe.schema import Modality, ModelConfig, Task
        >>> model = Flame(ModelConfig(width=8, heads=2, experts=2, time_width=4))
        >>> model.add_modality(Modality(name="labs", kind="table", features=3), stage=0)
        >>> model.add_router_heads(["labs"], stage=0)
        >>> model.add_task(Task(name="died", kind="binary", modalities=("labs",), classes=("no", "yes")))
        >>> sorted(model.tasks)
        ['died']
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.preset = config, PRESETS[config.preset]
        self.modalities: dict[str, Modality] = {}
        self.tasks: dict[str, Task] = {}
        self.paths = nn.ModuleDict()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.heads = nn.ModuleDict()
        self.apart = nn.ModuleDict()

    def add_modality(self, modality: Modality, stage: int) -> None:
        """Encoder, attention and norms for a modality that first appears at `stage`."""
        self.modalities[modality.name] = modality
        self.paths[modality.name] = ModalityPath(modality, self.config, stage)
        for block in self._blocks():
            block.add_modality(modality.name, stage)

    def start_from(self, modality: str, weights: Mapping[str, Tensor]) -> None:
        """Put pre-trained weights into the encoder of a modality of kind tokens, strictly."""
        for network in self.networks():
            if modality in network.paths:
                encoder = network._path(modality).encoder
                assert isinstance(encoder, TokenEncoder)
                encoder.reader.module.load_state_dict(weights, strict=True)

    def add_router_heads(
        self,
        modalities: Iterable[str],
        stage: int,
        *,
        experts: int | None = None,
        combine: str = "own",
        load: str = "expected",
    ) -> None:
        """Router heads of `stage` for these modalities, in every block (see `nn.gating.Router.add_head`)."""
        for name in modalities:
            for block in self._blocks():
                block.add_router_head(name, stage, experts=experts, combine=combine, load=load)

    def add_task(self, task: Task) -> None:
        """A head for a task; its modalities must be there.

        Raises:
            RecipeError: for a modality the model does not know.
        """
        for name in task.modalities:
            if name not in self.modalities:
                raise RecipeError(
                    f"unknown modality '{name}'", where=f"task '{task.name}'", mend=nearest(name, self.modalities)
                )
        self.tasks[task.name] = task
        readout = self.config.readout if self.preset.readout is None else self.preset.readout
        self.heads[task.name] = Head(task, self.config.width, readout, self.config.dropout)

    def add_apart(self, task: Task, stage: int) -> None:
        """A network of its own for a task, from scratch, with all of the task's modalities; they must be known."""
        own = Flame(self.config)
        for name in task.modalities:
            own.add_modality(self.modalities[name], stage)
        own.add_router_heads(task.modalities, stage)
        own.add_task(task)
        self.tasks[task.name] = task
        self.apart[task.name] = own

    def networks(self) -> list[Flame]:
        """This network and those that tasks have for themselves."""
        return [self, *(own for own in self.apart.values() if isinstance(own, Flame))]

    def forward(self, batch: FlexiBatch, cursor: int) -> Output:
        """Logits of the batch's task, read at the weights of stage `cursor`.

        Raises:
            RecipeError: if the model has no head for the batch's task.
        """
        return self.together([(batch, cursor)])[0]

    def together(self, batches: Sequence[tuple[FlexiBatch, int]]) -> list[Output]:
        """`forward` for batches of several tasks, each at its own cursor, in one pass through the experts.

        Raises:
            RecipeError: if the model has no head for one of the tasks.
        """
        for batch, _ in batches:
            if batch.task not in self.tasks:
                raise RecipeError(f"the model has no task '{batch.task}'", mend=nearest(batch.task, self.tasks))
        own = iter(self._shared([(batch, cursor) for batch, cursor in batches if batch.task not in self.apart]))
        return [self.apart[b.task](b, c) if b.task in self.apart else next(own) for b, c in batches]

    def _shared(self, batches: Sequence[tuple[FlexiBatch, int]]) -> list[Output]:
        """The batches of tasks that have no network for themselves."""
        cursors = [cursor for _, cursor in batches]
        states = [self._encoded(batch, cursor) for batch, cursor in batches]
        routings: list[list[dict[str, Routing]]] = [[] for _ in batches]
        for block in self._blocks() if batches else ():
            for i, (state, routed) in enumerate(block.together(list(zip(states, cursors, strict=True)))):
                states[i] = state
                routings[i].append(routed)
        found = []
        for (batch, cursor), state, routed_by in zip(batches, states, routings, strict=True):
            left = {name: Sequences(self._path(name).leave(s.x, cursor), s.mask) for name, s in state.items()}
            rows = {name: batch.modalities[name].rows for name in left}
            logits = self.heads[batch.task](left, rows, batch.size)
            found.append(Output(logits, self._auxiliary(self.tasks[batch.task], routed_by, logits), tuple(routed_by)))
        return found

    def _encoded(self, batch: FlexiBatch, cursor: int) -> dict[str, Sequences]:
        """What the first block gets of each modality that the batch has, in the task's order."""
        names = [name for name in self.tasks[batch.task].modalities if name in batch.modalities]
        return {name: self.encode(name, batch.modalities[name], cursor) for name in names}

    def before_experts(self, batch: FlexiBatch, cursor: int) -> Iterator[tuple[Block, dict[str, Sequences]]]:
        """What each block gives to its experts, modality -> Sequences, block after block."""
        state = self._encoded(batch, cursor)
        for block in self._blocks():
            yield block, block.attend(state, cursor)[1]
            state = block(state, cursor)[0]

    def routers(self, modality: str) -> Iterator[Router]:
        """The routers of a modality, block by block; none where nothing is routed."""
        for block in self._blocks():
            router = block.router(modality)
            if router is not None:
                yield router

    def growables(self, modalities: Iterable[str]) -> Iterator[tuple[str, Growable]]:
        """Everything that can grow and that tasks on these modalities reach: shared experts, their paths, attention."""
        known = set(modalities)
        for name, part in growables(self):
            where = name.split(".")
            owner = where[1] if where[0] == "paths" else where[3] if where[2] == "layers" else None
            if owner is None or owner in known:
                yield name, part

    def encode(self, name: str, part: ModalityBatch, cursor: int) -> Sequences:
        """What the blocks get of one modality: (n, T, d) and its mask."""
        path = self._path(name)
        x, mask = path.encoder(part, cursor)
        x = path.enter(x * math.sqrt(self.config.width), cursor)
        if self.preset.positions:
            x = x + positions(x.shape[1], x.shape[2], x.device)
        return Sequences(x, mask)

    def _auxiliary(self, task: Task, routings: list[dict[str, Routing]], logits: Tensor) -> Tensor:
        """lambda_bal * sum of balance losses + lambda_div * interaction loss, summed over blocks."""
        total = torch.zeros((), device=logits.device)
        for routed in routings:
            parts = list(routed.values())
            if parts:
                balance = balance_loss(parts)
                spread = interaction_loss(parts, task.interaction, clean=self.preset.clean_interaction)
                total = total + self.config.balance * balance + self.config.interaction * spread
        return total

    def _path(self, name: str) -> ModalityPath:
        path = self.paths[name]
        assert isinstance(path, ModalityPath)
        return path

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block
