"""The shared pool of temporal experts, stored stacked.

Shape suffixes: R packed rows sorted by expert, E experts, d width, H hidden, k kernel width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.dropout import dropout
from flame_moe.nn.grouped import Weights
from flame_moe.nn.layers import uniform_bias
from flame_moe.nn.stacked import StackedMatrix, StageVector


class ExpertPool(nn.Module):
    """E temporal experts (spec of the paper, section on experts):

        c = GELU(conv_k(x) + b_c);  h = LayerNorm(x + c);  y = W2 Dropout(GELU(W1 h + b1)) + b2

    The convolution is a matrix (d, k d) per expert on the concatenated neighbours of a step.

    Args:
        experts: E.
        width: d.
        hidden: H.
        kernel: k, odd; zeros beyond both ends of a sequence.
        dropout: rate between the two layers of the MLP.
        stage: the stage in which the pool is trained first.
    """

    affine: ClassVar[Mapping[str, str]] = {"conv": "conv_bias", "fc1": "fc1_bias", "fc2": "fc2_bias"}

    def __init__(self, experts: int, width: int, hidden: int, kernel: int, dropout: float, *, stage: int = 0) -> None:
        super().__init__()
        self.experts, self.width, self.kernel, self.dropout = experts, width, kernel, dropout
        fan = width * kernel
        self.conv = StackedMatrix(experts, width, fan, stage=stage)
        self.conv_bias = StageVector(uniform_bias(experts, width, fan_in=fan), stage)
        self.norm_weight = StageVector(torch.ones(experts, width), stage)
        self.norm_bias = StageVector(torch.zeros(experts, width), stage)
        self.fc1 = StackedMatrix(experts, hidden, width, stage=stage)
        self.fc1_bias = StageVector(uniform_bias(experts, hidden, fan_in=width), stage)
        self.fc2 = StackedMatrix(experts, width, hidden, stage=stage)
        self.fc2_bias = StageVector(uniform_bias(experts, width, fan_in=hidden), stage)

    def sets(self, cursor: int) -> list[Weights]:
        """`weights`, in the form of several pools."""
        return [self.weights(cursor)]

    def weights(self, cursor: int) -> Weights:
        """Everything that a task with this cursor reads."""
        conv, fc1, fc2 = (m.effective(cursor) for m in (self.conv, self.fc1, self.fc2))
        bc, gain, shift = (v.at(cursor) for v in (self.conv_bias, self.norm_weight, self.norm_bias))
        return Weights(conv, bc, gain, shift, fc1, self.fc1_bias.at(cursor), fc2, self.fc2_bias.at(cursor))

    @property
    def observed(self) -> bool:
        """Whether somebody gathers the inputs of a matrix of the pool."""
        return any(m.observer is not None for m in (self.conv, self.fc1, self.fc2))

    def forward(self, near_RkD: Tensor, counts: Sequence[int], cursor: int, there_R: Tensor | None = None) -> Tensor:
        """Run every expert once, on its own run of rows: the simple form, which `nn.grouped` does faster.

        Args:
            near_RkD: (R, k, d), each row with its neighbours, sorted by expert; the row itself is in the middle.
            counts: rows per expert; sums to R.
            cursor: stage whose weights are read.
            there_R: (R,) bool, false on rows of padding; only read where inputs are observed.

        Returns:
            (R, d).
        """
        conv, bc, gain, shift, fc1, b1, fc2, b2 = self.weights(cursor)
        out = []
        masks = [None] * self.experts if there_R is None else there_R.split(list(counts))
        for e, (near, there) in enumerate(zip(near_RkD.split(list(counts)), masks, strict=True)):
            if len(near):
                self.conv.observe(near.flatten(1), there, e)
                c = F.gelu(F.linear(near.flatten(1), conv[e], bc[e]))
                h = F.layer_norm(near[:, self.kernel // 2] + c, (self.width,), gain[e], shift[e])
                self.fc1.observe(h, there, e)
                q = dropout(F.gelu(F.linear(h, fc1[e], b1[e])), self.dropout, self.training)
                self.fc2.observe(q, there, e)
                out.append(F.linear(q, fc2[e], b2[e]))
        return torch.cat(out)


class Joined:
    """Several pools as one, their experts numbered one pool after the other."""

    def __init__(self, pools: Sequence[ExpertPool]) -> None:
        self.pools, self.kernel = pools, pools[0].kernel
        self.experts, self.dropout = sum(pool.experts for pool in pools), pools[0].dropout
        self.training = any(pool.training for pool in pools)

    def sets(self, cursor: int) -> list[Weights]:
        """Everything that a task with this cursor reads, one pool after the other."""
        return [pool.weights(cursor) for pool in self.pools]

    @property
    def observed(self) -> bool:
        """Whether somebody gathers the inputs of any of them."""
        return any(pool.observed for pool in self.pools)

    def __call__(self, near_RkD: Tensor, counts: Sequence[int], cursor: int, there_R: Tensor | None = None) -> Tensor:
        """See `ExpertPool.forward`."""
        sizes = [pool.experts for pool in self.pools]
        shares = [list(counts[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
        rows = [sum(share) for share in shares]
        near = near_RkD.split(rows)
        there = [None] * len(rows) if there_R is None else there_R.split(rows)
        parts = zip(self.pools, near, shares, there, strict=True)
        return torch.cat([pool(x, share, cursor, mask) for pool, x, share, mask in parts if len(x)])
