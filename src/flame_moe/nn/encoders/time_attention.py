"""Multi-time attention: an irregular series re-sampled to a regular grid by attention over time (Shukla & Marlin 2021).

Shape suffixes: n sequences, h heads, T grid steps, L observations, C channels, d width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flame_moe.nn.autograd import applied
from flame_moe.nn.dropout import dropout
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.stacked import StackedMatrix, StageVector

# exp(-80) is still a normal float32: a channel whose keys all lie that far below the best one keeps a finite mean.
_FLOOR = -80.0


def time_attention(scores: Tensor, values: Tensor, observed: Tensor) -> Tensor:
    """Per channel, the softmax-weighted mean of the observed values; 0 where a channel has none.

    z_{q,c} = sum_j e_{jq} m_{jc} v_{jc} / sum_j e_{jq} m_{jc} with e = exp(score): one matrix product for numerator and
    denominator, never the (n, L, Q, C) tensor of the expanded form.

    Args:
        scores: (n, L, Q) of every observation for every query.
        values: (n, L, C), anything where not observed.
        observed: (n, L, C) bool.

    Returns:
        (n, Q, C).
    """
    return applied(_Mean, scores, values, observed)


class _Mean(torch.autograd.Function):
    """`time_attention` with its gradient by hand: one tensor (n, L, Q) is made, worked on in place and kept."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor, observed: Tensor) -> Tensor:
        seen = observed.any(-1, keepdim=True)
        e = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        # A key that is not there may score far above those that are: its weight only has to be finite, for m is 0.
        e = e.sub_(e.amax(1, keepdim=True)).clamp_(min=_FLOOR).exp_()
        both = torch.cat([torch.where(observed, values, 0.0), observed.to(values.dtype)], dim=-1).to(e.dtype)
        total, weight = torch.bmm(e.transpose(1, 2), both).chunk(2, dim=-1)
        inverse = torch.where(weight > 0, weight.reciprocal(), 0.0)
        z = total * inverse
        ctx.save_for_backward(e, both, inverse, z, observed)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,), (e, both, inverse, z, observed) = gradients, ctx.saved_tensors
        of_total = gradient * inverse
        of_sums = torch.cat([of_total, -of_total * z], dim=-1)
        of_scores = torch.bmm(both, of_sums.transpose(1, 2)).mul_(e) if ctx.needs_input_grad[0] else None
        of_values = torch.where(observed, torch.bmm(e, of_total), 0.0) if ctx.needs_input_grad[1] else None
        return of_scores, of_values, None


class TimeEmbedding(nn.Module):
    """phi(t) = (w0 t + b0, sin(W t + b)): (..., ) -> (..., width)."""

    affine: ClassVar[Mapping[str, str]] = {"weight": "bias"}

    def __init__(self, width: int, *, stage: int) -> None:
        super().__init__()
        self.weight = StackedMatrix(width, 1, stage=stage)
        self.bias = StageVector(torch.empty(width).uniform_(-1, 1), stage)
        # Periods from the whole window down to about an hour of 48: plain uniform weights see only the window's trend.
        with torch.no_grad():
            self.weight.base[1:, 0] = torch.exp(torch.linspace(0, math.log(50.0), width - 1))

    def forward(self, t: Tensor, cursor: int, mask: Tensor | None = None) -> Tensor:
        self.weight.observe(t[..., None], mask)
        phase = F.linear(t[..., None], self.weight.effective(cursor), self.bias.at(cursor))
        return applied(_Sines, phase)


class _Sines(torch.autograd.Function):
    """The sine of every column but the first, without taking the columns apart and putting them together again."""

    @staticmethod
    def forward(ctx: Any, phase: Tensor) -> Tensor:
        ctx.save_for_backward(phase)
        out = phase.sin()
        out[..., 0] = phase[..., 0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (gradient,), (phase,) = gradients, ctx.saved_tensors
        slope = phase.cos()
        slope[..., 0] = 1.0
        return slope.mul_(gradient)


class TimeAttention(nn.Module):
    """Re-sample observations to `steps` reference times in [0, 1].

    Args:
        channels: C.
        width: d of the output.
        steps: T.
        heads: h.
        time_width: width of the time embedding, a multiple of h.
        dropout: rate on the attention, shared over channels.
        stage: the stage in which it is trained first.
    """

    grid: Tensor

    def __init__(
        self, channels: int, width: int, steps: int, heads: int, time_width: int, dropout: float, *, stage: int
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.embed = TimeEmbedding(time_width, stage=stage)
        self.query = StackedLinear(time_width, time_width, stage=stage)
        self.key = StackedLinear(time_width, time_width, stage=stage)
        self.out = StackedLinear((heads + 1) * channels, width, stage=stage)
        self.register_buffer("grid", torch.linspace(0, 1, steps), persistent=False)

    def forward(self, values: Tensor, times: Tensor, observed: Tensor, cursor: int) -> Tensor:
        """(n, L, C), (n, L), (n, L, C) bool -> (n, T, d)."""
        z = time_attention(self._scores(times, observed.any(-1), cursor), values, observed)
        z = dropout(z, self.dropout, self.training).unflatten(1, (len(self.grid), self.heads))
        # Attending to the observed flags, as the paper does, only tells whether a channel was ever observed.
        ever = observed.any(1).to(z.dtype)[:, None, :].expand(-1, z.shape[1], -1)
        return self.out(torch.cat([*z.unbind(2), ever], dim=-1), cursor)

    def _scores(self, times: Tensor, seen: Tensor, cursor: int) -> Tensor:
        """(n, L) -> (n, L, T h): q_i . k_j / sqrt(d_h), the heads of a grid step one after the other.

        k = W t + b is not computed: q . (W t + b) = (W^T q) . t + q . b.
        """
        embedded = self.embed(times, cursor, seen)
        self.key.weight.observe(embedded, seen)
        q = self.query(self.embed(self.grid, cursor), cursor)
        size = q.shape[-1] // self.heads
        own = torch.eye(self.heads, dtype=q.dtype, device=q.device).repeat_interleave(size, dim=1) / math.sqrt(size)
        apart = (q[:, None, :] * own).flatten(0, 1)
        assert self.key.bias is not None
        return F.linear(embedded, apart @ self.key.weight.effective(cursor), apart @ self.key.bias.at(cursor))
