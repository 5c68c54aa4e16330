"""What an encoder is: a modality's batch in, a sequence of d-vectors with its padding mask out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from flame_moe.batch import ModalityBatch
from flame_moe.nn.moe import Sequences
from flame_moe.schema import Modality, ModelConfig


class Encoder(nn.Module, ABC):
    """Base of the encoders. Every linear map in them is a `StackedMatrix`.

    Args:
        modality: what comes in.
        config: widths and dropout.
        stage: the stage at which the modality first appears.
    """

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__()
        self.modality = modality

    @abstractmethod
    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        """Encode (n, L, C) to Sequences (n, T, d); masks padding and cells that were not observed."""
