"""Irregular series: time attention and a regular grid, mixed by a learned gate per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.batch import ModalityBatch
from flame_moe.nn.dropout import dropout
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.time_attention import TimeAttention
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.moe import Sequences
from flame_moe.schema import Modality, ModelConfig


def regular_grid(values: Tensor, times: Tensor, observed: Tensor, steps: int) -> Tensor:
    """Last observed value per bin, carried forward; zero (the training mean) before the first observation.

    Args:
        values: (n, L, C) standardised, anything where not observed.
        times: (n, L) in [0, 1], non-decreasing; later times fall into the last bin.
        observed: (n, L, C) bool.
        steps: number of bins T.

    Returns:
        (n, T, 2 C): values, then flags of the bins in which the channel was observed.
    """
    n, length, channels = values.shape
    bins = (times * steps).long().clamp(0, steps - 1)
    place = torch.arange(length, device=values.device)[None, :, None]
    place = torch.where(observed, place, -1)
    last = torch.full((n, steps, channels), -1, dtype=torch.long, device=values.device)
    last = last.scatter_reduce(1, bins[..., None].expand(-1, -1, channels), place, "amax")
    carried = last.cummax(dim=1).values
    filled = torch.where(carried >= 0, values.gather(1, carried.clamp(min=0)), 0.0)
    return torch.cat([filled, (last >= 0).to(values.dtype)], dim=-1)


class SeriesEncoder(Encoder):
    """g I + (1 - g) R: I from time attention, R from the regular grid, g = sigmoid(MLP(max I, max R)) per sample."""

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        channels, width = modality.features, config.width
        self.steps, self.dropout = config.steps, config.dropout
        self.irregular = TimeAttention(
            channels, width, config.steps, config.heads, config.time_width, config.dropout, stage=stage
        )
        self.regular = StackedLinear(2 * channels, width, stage=stage)
        self.mix_hidden = StackedLinear(2 * width, width, stage=stage)
        self.mix = StackedLinear(width, 1, stage=stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        assert part.times is not None
        assert part.observed is not None
        irregular = self.irregular(part.values, part.times, part.observed, cursor)
        grid = regular_grid(part.values, part.times, part.observed, self.steps)
        regular = self.regular(grid, cursor)
        both = torch.cat([irregular.amax(1), regular.amax(1)], dim=-1)
        hidden = F.relu(self.mix_hidden(dropout(both, self.dropout, self.training), cursor))
        g = torch.sigmoid(self.mix(hidden, cursor))[:, :, None]
        x = g * irregular + (1 - g) * regular
        return Sequences(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
