"""One row of a table: features cut into patches, each patch a step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.batch import ModalityBatch
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.moe import Sequences
from flame_moe.nn.stacked import StackedMatrix, StageVector
from flame_moe.schema import Modality, ModelConfig


class TableEncoder(Encoder):
    """C features, zero-padded and cut into P contiguous patches, each with a linear map of its own: -> (n, P, d).

    A cell that was not observed enters as 0 with flag 0, so its content has no influence and no gradient.
    The published code shares one map over all patches, although each patch holds other features; the presets `paper`
    and `reference` do the same.
    """

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        self.patches = min(config.patches, modality.features)
        self.size = math.ceil(modality.features / self.patches)
        self.patches = math.ceil(modality.features / self.size)
        maps = 1 if config.preset in ("paper", "reference") else self.patches
        self.weight = StackedMatrix(maps, config.width, 2 * self.size, stage=stage)
        limit = 1.0 / math.sqrt(2 * self.size)
        self.bias = StageVector(torch.empty(maps, config.width).uniform_(-limit, limit), stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        assert part.observed is not None
        observed = part.observed[:, 0]
        values = torch.where(observed, part.values[:, 0], 0.0)
        cells = torch.cat([self._cut(values), self._cut(observed.to(values.dtype))], dim=-1)
        weight = self.weight.effective(cursor).expand(self.patches, -1, -1)
        x = torch.einsum("npc,pdc->npd", cells, weight) + self.bias.at(cursor)
        return Sequences(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))

    def _cut(self, row: Tensor) -> Tensor:
        """(n, C) -> (n, P, size)."""
        return F.pad(row, (0, self.patches * self.size - row.shape[1])).unflatten(1, (self.patches, self.size))
