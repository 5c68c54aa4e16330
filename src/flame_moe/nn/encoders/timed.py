"""Vectors at irregular times (embeddings of notes, images, waveforms): time attention over whole vectors."""

from __future__ import annotations

import torch

from flame_moe.batch import ModalityBatch
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.time_attention import TimeAttention
from flame_moe.nn.moe import Sequences
from flame_moe.schema import Modality, ModelConfig


class TimedEncoder(Encoder):
    """(n, L, C) at times (n, L) -> (n, T, d) on the reference grid."""

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        self.attention = TimeAttention(
            modality.features, config.width, config.steps, config.heads, config.time_width, config.dropout, stage=stage
        )

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        assert part.times is not None
        observed = part.mask[..., None].expand_as(part.values)
        x = self.attention(part.values, part.times, observed, cursor)
        return Sequences(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
