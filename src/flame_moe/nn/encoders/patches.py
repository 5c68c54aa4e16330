"""Ordered vectors without times (image patches, strokes, codes): one linear map per step, lengths kept."""

from __future__ import annotations

from flame_moe.batch import ModalityBatch
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.moe import Sequences
from flame_moe.schema import Modality, ModelConfig


class PatchEncoder(Encoder):
    """(n, L, C) -> (n, L, d) with the padding mask of the batch."""

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        self.project = StackedLinear(modality.features, config.width, stage=stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        mask = part.mask
        values = part.values.masked_fill(~mask[..., None], 0.0)
        return Sequences(self.project(values, cursor, mask), mask)
