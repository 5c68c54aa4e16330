"""Multi-time attention as published: a softmax over time for every channel, in a tensor (n, h, T, L, C)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """phi(t) = (w0 t + b0, sin(W t + b)): (...) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.periodic = nn.Linear(1, 1), nn.Linear(1, width - 1)

    def forward(self, t: Tensor) -> Tensor:
        t = t.unsqueeze(-1)
        return torch.cat([self.linear(t), torch.sin(self.periodic(t))], dim=-1)


class TimeAttention(nn.Module):
    """Observations (n, L, C) at times (n, L) -> (n, T, width); dropout on the expanded weights."""

    def __init__(self, channels: int, width: int, steps: int, heads: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.embed = TimeEmbedding(time_width)
        self.query, self.key = nn.Linear(time_width, time_width), nn.Linear(time_width, time_width)
        self.out = nn.Linear(heads * channels, width)
        self.register_buffer("grid", torch.linspace(0, 1, steps), persistent=False)

    def forward(self, values: Tensor, times: Tensor, mask: Tensor) -> Tensor:
        n, _, channels = values.shape
        q = self._heads(self.query(self.embed(self.grid.unsqueeze(0))))
        k = self._heads(self.key(self.embed(times)))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.unsqueeze(-1).repeat_interleave(channels, -1)
        scores = scores.masked_fill(mask[:, None, None] == 0, -10000.0)
        p = F.dropout(torch.softmax(scores, dim=-2), self.dropout, self.training)
        z = torch.sum(p * values[:, None, None], dim=-2)
        return self.out(z.transpose(1, 2).contiguous().view(n, -1, self.heads * channels))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)
