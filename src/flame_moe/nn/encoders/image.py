"""Pictures at times: a small residual network, then a square of steps per picture."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.batch import ModalityBatch
from flame_moe.nn.dropout import dropout
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.convolution import Residual, StackedConv, StackedGroupNorm, pooling
from flame_moe.nn.encoders.time_attention import TimeEmbedding
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.moe import Sequences
from flame_moe.nn.stacked import StageVector
from flame_moe.schema import Modality, ModelConfig

MAP = 64
"""The first convolution brings the longer side of a picture down to this many pixels, whatever its size."""


class ImageEncoder(Encoder):
    """(n, L, H W channels) pictures at times (n, L) -> (n, L cells, d).

    A convolution with stride, three residual blocks that halve the map twice, and the mean over a square of at most
    `patches` cells: 4 x 4 with the default of 16. Each step knows its cell and the time of its picture. Pictures that
    are not there are not computed.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        height, width, channels = modality.shape
        self.shape, self.dropout = (height, width, channels), config.dropout
        stride = max(2, math.ceil(max(height, width) / MAP))
        first, second, third = max(8, config.width // 4), max(8, config.width // 2), config.width
        self.stem = StackedConv(channels, first, 2 * stride - 1, axes=2, stride=stride, stage=stage)
        self.blocks = nn.ModuleList(
            Residual(inputs, outputs, 3, axes=2, stride=step, stage=stage)
            for inputs, outputs, step in ((first, first, 1), (first, second, 2), (second, third, 2))
        )
        self.norm = StackedGroupNorm(third, stage=stage)
        for name, size in (("rows", height), ("columns", width)):
            left = math.ceil(size / (4 * stride))
            self.register_buffer(name, pooling(torch.tensor([left]), left, math.isqrt(config.patches))[0], False)
        cells = len(self.rows) * len(self.columns)
        self.out = StackedLinear(third, config.width, stage=stage)
        self.place = StageVector(torch.randn(cells, config.width) / math.sqrt(config.width), stage)
        self.embed_time = TimeEmbedding(config.time_width, stage=stage)
        self.time_map = StackedLinear(config.time_width, config.width, stage=stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        assert part.times is not None
        cells = self._cells(part.take(part.values), cursor)
        time = self.time_map(self.embed_time(part.take(part.times), cursor), cursor) / math.sqrt(cells.shape[-1])
        tokens = dropout(cells + self.place.at(cursor) + time[:, None], self.dropout, self.training)
        mask = part.mask.repeat_interleave(tokens.shape[1], dim=1)
        return Sequences(part.put(tokens).flatten(1, 2), mask)

    def _cells(self, pictures: Tensor, cursor: int) -> Tensor:
        """(P, H W channels) -> (P, cells, d)."""
        planes = pictures.unflatten(1, self.shape).movedim(3, 1).clone(memory_format=torch.contiguous_format)
        x = self.stem(planes, cursor)
        for block in self.blocks:
            x, _ = block(x, cursor)
        x = F.relu(self.norm(x, cursor))
        return self.out((self.rows @ x @ self.columns.T).flatten(2).mT, cursor)
