"""One row of a table: features cut into patches, each patch a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

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

    With `knots` = K each cell x also enters as relu(x - t_k), t_k the K inner quantiles of a standard normal, so that
    the map is piecewise linear in every feature: risk that is high at both ends of a range needs no second layer.
    A cell that was not observed enters as 0 with flag 0, so its content has no influence and no gradient.
    The published code shares one map over all patches, although each patch holds other features; the presets `paper`
    and `reference` do the same.
    """

    knots: Tensor
    affine: ClassVar[Mapping[str, str]] = {"weight": "bias"}

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        self.patches = min(config.patches, modality.features)
        self.size = math.ceil(modality.features / self.patches)
        self.patches = math.ceil(modality.features / self.size)
        maps = 1 if config.preset in ("paper", "reference") else self.patches
        fan = (2 + config.knots) * self.size
        self.weight = StackedMatrix(maps, config.width, fan, stage=stage)
        shares = torch.arange(1, config.knots + 1) / (config.knots + 1)
        self.register_buffer("knots", torch.special.ndtri(shares), persistent=False)
        limit = 1.0 / math.sqrt(fan)
        self.bias = StageVector(torch.empty(maps, config.width).uniform_(-limit, limit), stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        assert part.observed is not None
        observed = part.observed[:, 0]
        values = torch.where(observed, part.values[:, 0], 0.0)
        x, seen = self._cut(values), self._cut(observed.to(values.dtype))
        bends = F.relu(x - self.knots[:, None]) * seen
        cells = torch.cat([x, seen, bends], dim=2).flatten(2)
        if self.weight.matrices == 1:
            self.weight.observe(cells)
        else:
            self.weight.observe_each(cells.transpose(0, 1))
        weight = self.weight.effective(cursor).expand(self.patches, -1, -1)
        x = torch.bmm(cells.transpose(0, 1), weight.mT).transpose(0, 1) + self.bias.at(cursor)
        return Sequences(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))

    def _cut(self, row: Tensor) -> Tensor:
        """(n, C) -> (n, P, 1, size)."""
        return F.pad(row, (0, self.patches * self.size - row.shape[1])).unflatten(1, (self.patches, 1, self.size))
