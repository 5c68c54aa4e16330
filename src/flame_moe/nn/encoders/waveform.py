"""Evenly sampled signals, thousands of steps long: a residual network along time that shortens them 64 times."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from flame_moe.batch import ModalityBatch
from flame_moe.nn.dropout import dropout
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.convolution import Residual, StackedConv, StackedGroupNorm, pooling
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.moe import Sequences
from flame_moe.schema import Modality, ModelConfig


class WaveformEncoder(Encoder):
    """(n, L, C) -> (n, T, d): ceil(L / 64) steps, averaged to at most `steps` of them.

    Every layer stops at the end of the sequence itself: padding is zero before and after each convolution and has no
    part in the normalisation.
    """

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        self.steps, self.dropout = config.steps, config.dropout
        first, second, third = max(8, config.width // 4), max(8, config.width // 2), config.width
        self.stem = StackedConv(modality.features, first, 15, axes=1, stride=2, stage=stage)
        self.blocks = nn.ModuleList(
            Residual(inputs, outputs, 7, axes=1, stride=step, stage=stage)
            for inputs, outputs, step in ((first, first, 2), (first, second, 4), (second, third, 4))
        )
        self.norm = StackedGroupNorm(third, stage=stage)
        self.out = StackedLinear(third, config.width, stage=stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        mask = part.mask
        signal = part.values.masked_fill(~mask[..., None], 0.0).mT
        mask = mask[:, :: self.stem.stride]
        x = self.stem(signal, cursor, mask)
        x = x.masked_fill(~mask[:, None, :], 0.0)
        for block in self.blocks:
            x, mask = block(x, cursor, mask)
        x = F.relu(self.norm(x, cursor, mask))
        weights = pooling(mask.sum(1), mask.shape[1], self.steps)
        there = weights.any(2)
        x = self.out(weights @ x.mT, cursor, there)
        return Sequences(dropout(x, self.dropout, self.training), there)
