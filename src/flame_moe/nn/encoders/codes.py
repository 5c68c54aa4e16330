"""Typed events at irregular times (diagnoses, drugs, treatments): a transformer layer, then one step per event type."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.batch import ModalityBatch
from flame_moe.nn.attention import SelfAttention
from flame_moe.nn.dropout import dropout
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.time_attention import TimeEmbedding
from flame_moe.nn.layers import StackedLinear, StackedNorm
from flame_moe.nn.moe import Sequences
from flame_moe.nn.stacked import StackedMatrix, StageVector
from flame_moe.schema import Modality, ModelConfig


class StackedEmbedding(nn.Module):
    """One vector per row of a table; a stage changes the table by a truncated update, like any other matrix.

    The optimizer does not decay it: a row would shrink in every step in which its code does not occur.

    Args:
        rows: how many.
        width: of a vector; its expected length is 1.
        stage: the stage in which it is trained first.
    """

    def __init__(self, rows: int, width: int, *, stage: int) -> None:
        super().__init__()
        self.weight = StackedMatrix(rows, width, stage=stage, bound=math.sqrt(3.0 / width))

    def forward(self, index: Tensor, cursor: int, mask: Tensor | None = None) -> Tensor:
        """(...) whole numbers -> (..., width); those outside the mask (...) are padding."""
        if self.weight.observer is not None:
            self.weight.observer.picks(index.flatten() if mask is None else index[mask])
        return F.embedding(index, self.weight.effective(cursor))


class CodeEncoder(Encoder):
    """(n, L, 2) event types and rows of codes, at times (n, L) -> (n, types + 1, d).

    An event enters as code + type + time; a token that stands for the sample goes before them; one pre-norm
    transformer layer lets all of them meet. Out come the mean of the events of each type, in the order of
    `Modality.types`, and last the sample's token, which every read-out finds. A type without an event is a step that
    is not there; the published code puts a copy of the sample's token in its place. Row 0, the code that is unknown,
    starts at zero: type and time are all that is known of it.
    """

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        width = config.width
        self.types, self.dropout = len(modality.types), config.dropout
        self.embed_code = StackedEmbedding(modality.vocabulary + 1, width, stage=stage)
        with torch.no_grad():
            self.embed_code.weight.base[0] = 0.0
        self.embed_type = StackedEmbedding(self.types, width, stage=stage)
        self.embed_time = TimeEmbedding(config.time_width, stage=stage)
        self.time_map = StackedLinear(config.time_width, width, stage=stage)
        self.sample = StageVector(torch.randn(width) / math.sqrt(width), stage)
        self.before = StackedNorm(width, stage=stage)
        # Without dropout on its weights attention needs no (n, h, L, L) tensor, and long histories fit into memory.
        self.attention = SelfAttention(width, config.heads, 0.0, stage=stage)
        self.between = StackedNorm(width, stage=stage)
        self.up = StackedLinear(width, config.hidden, stage=stage)
        self.down = StackedLinear(config.hidden, width, stage=stage)
        self.out = StackedLinear(width, width, stage=stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        mask = part.mask
        kind, row = part.values.masked_fill(~mask[..., None], 0.0).long().unbind(-1)
        x = torch.cat([self.sample.at(cursor).expand(len(row), 1, -1), self._events(part, kind, row, cursor)], dim=1)
        there = F.pad(mask, (1, 0), value=True)
        x = self._layer(self._drop(x), there, cursor)
        x = self.out(self._drop(x), cursor, there)
        of_type = (kind[:, None, :] == torch.arange(self.types, device=kind.device)[None, :, None]) & mask[:, None, :]
        count = of_type.sum(2, keepdim=True)
        means = torch.bmm(of_type.to(x.dtype), x[:, 1:]) / count.clamp(min=1)
        return Sequences(torch.cat([means, x[:, :1]], dim=1), F.pad(count[..., 0] > 0, (0, 1), value=True))

    def _events(self, part: ModalityBatch, kind: Tensor, row: Tensor, cursor: int) -> Tensor:
        """(n, L, d); zero on padding."""
        assert part.times is not None
        mask = part.mask
        time = self.time_map(self.embed_time(part.times, cursor, mask), cursor, mask)
        time = time / math.sqrt(self.sample.at(cursor).shape[0])
        x = self.embed_code(row, cursor, mask) + self.embed_type(kind, cursor, mask) + time
        return x.masked_fill(~mask[..., None], 0.0)

    def _layer(self, x: Tensor, mask: Tensor, cursor: int) -> Tensor:
        x = x + self._drop(self.attention(self.before(x, cursor), mask, cursor))
        return x + self._drop(self.down(F.gelu(self.up(self.between(x, cursor), cursor, mask)), cursor, mask))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)
