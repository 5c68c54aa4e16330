"""The pool of experts for a GPU: rows in blocks of one expert each, one batched product per matrix of the pool.

How many rows an expert gets is known on the device alone. Each expert's rows are therefore filled up with zeros to a
multiple of the block: R rows and E experts need at most floor(R / B) + E blocks, a number that the host knows, so it
waits for nothing, whatever the type of the numbers. Nothing is added up by competing threads: what is gathered forward
is gathered back, in a fixed order, so that a step gives the same numbers every time.

Shape suffixes: S packed steps, R routed rows sorted by expert, N blocks of B rows, E experts, K experts per step,
d width, H hidden, k kernel width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_moe.nn.autograd import applied
from flame_moe.nn.dropout import dropout
from flame_moe.nn.grouped import EPS, Rows, Weights

_SMALLEST, _LARGEST = 16, 256
_SPARE = 4
"""About as many blocks as this per expert, so that a quarter of one expert's share is filled up at the most."""


def by_blocks(x: Tensor, gates: Tensor, sets: Sequence[Weights], rows: Rows, rate: float) -> Tensor:
    """The same as `flame_moe.nn.grouped.apply_experts`, on any device.

    Args:
        x: (S + 1, d) packed steps and a row of zeros.
        gates: (S, K) their weights.
        sets: of pools or of cursors; their experts are numbered one set after the other.
        rows: see `Rows`.
        rate: of dropout, 0 outside of training.

    Returns:
        (S, d).
    """
    w = sets[0] if len(sets) == 1 else Weights(*(torch.cat(same) for same in zip(*sets, strict=True)))
    width, experts, count = x.shape[1], len(w.conv), len(rows.expert)
    size = block_size(count, experts)
    expert_N, place_R = _layout(rows, count, size)
    blocks = len(expert_N)

    near = torch.full((blocks * size, rows.near.shape[1]), len(x) - 1, device=x.device)
    near = near.index_copy_(0, place_R, rows.near)
    near_NBD = applied(_Near, x, near, rows, place_R).view(blocks, size, -1)
    # (N, E) with a one at the expert of each block: the way back of every weight is a product with it, in fixed order.
    own_NE = (expert_N[:, None] == torch.arange(experts, device=x.device)).to(x.dtype)

    def product(a_NBi: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        chosen, shift = _of_blocks(matrix, expert_N, own_NE), _of_blocks(bias, expert_N, own_NE)
        return torch.baddbmm(shift[:, None], a_NBi, chosen.mT)

    first = (rows.near.shape[1] // 2) * width
    z = near_NBD[..., first : first + width] + F.gelu(product(near_NBD, w.conv, w.conv_bias))
    gain, shift = (_of_blocks(v, expert_N, own_NE)[:, None] for v in (w.gain, w.shift))
    h = (F.layer_norm(z, (width,), eps=EPS) * gain + shift).to(x.dtype)
    q = dropout(F.gelu(product(h, w.fc1, w.fc1_bias)), rate)
    said = product(q, w.fc2, w.fc2_bias).view(-1, width)
    answers_SKd = applied(_Back, said, place_R[rows.back].flatten()).view(*rows.back.shape, width)
    # Not a batch of S tiny products, which take a GPU several times as long.
    return (answers_SKd * gates[..., None].to(said.dtype)).sum(1)


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: a power of two that leaves an expert of mean load about four blocks.

    Example:
        >>> [block_size(rows, 8) for rows in (1, 1_000, 2_000, 1_000_000)]
        [16, 32, 64, 256]
    """
    wanted = max(1, rows // (_SPARE * experts))
    return min(_LARGEST, max(_SMALLEST, 1 << (wanted - 1).bit_length()))


def _layout(rows: Rows, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Whose each block is (N,), and where in the blocks each row is (R,)."""
    experts = len(rows.counts)
    filled = (rows.counts + (size - 1)).div(size, rounding_mode="floor")
    ends = filled.cumsum(0)
    blocks = torch.arange(count // size + experts, device=ends.device)
    # Blocks behind the last are nobody's; what they say of zeros is read by nobody.
    expert_N = torch.searchsorted(ends, blocks, right=True).clamp_(max=experts - 1)
    moved = (ends - filled) * size - (rows.counts.cumsum(0) - rows.counts)
    place_R = torch.arange(count, device=ends.device) + moved.index_select(0, rows.expert)
    return expert_N, place_R


def _of_blocks(weight: Tensor, expert_N: Tensor, own_NE: Tensor) -> Tensor:
    """(E, ...) -> (N, ...)."""
    if not weight.requires_grad:
        return weight.index_select(0, expert_N)
    return applied(_Chosen, weight, expert_N, own_NE)


class _Chosen(torch.autograd.Function):
    """`index_select` along the experts whose gradient is a product, not a sum in whatever order threads come."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, expert_N: Tensor, own_NE: Tensor) -> Tensor:
        ctx.save_for_backward(own_NE)
        return weight.index_select(0, expert_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,), (own_NE,) = gradients, ctx.saved_tensors
        summed = own_NE.to(gradient.dtype).mT @ gradient.flatten(1)
        return summed.view(-1, *gradient.shape[1:]), None, None


class _Near(torch.autograd.Function):
    """(S + 1, d) -> (N B k, d), each row with its neighbours.

    On the way back a step collects what the rows that read it say. Tap j of a row r read the step that lies j - k // 2
    further on; if that is the step of row q, r = q - (j - k // 2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, near: Tensor, rows: Rows, place_R: Tensor) -> Tensor:
        ctx.rows, ctx.place = rows, place_R
        return x.index_select(0, near.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,), rows = gradients, ctx.rows
        taps, (steps, width) = rows.near.shape[1], (len(rows.back), gradient.shape[1])
        tap_k = torch.arange(taps, device=gradient.device)
        reader_SKk = (rows.back[..., None] - (tap_k - taps // 2)).clamp_(0, len(ctx.place) - 1)
        read_SKk = rows.near[reader_SKk, tap_k] == torch.arange(steps, device=gradient.device)[:, None, None]
        where = (ctx.place[reader_SKk] * taps + tap_k).flatten()
        said = gradient.index_select(0, where).view(steps, -1, width)
        own = said.masked_fill_(~read_SKk.view(steps, -1, 1), 0.0).sum(1)
        return torch.cat([own, own.new_zeros(1, width)]), None, None, None


class _Back(torch.autograd.Function):
    """`index_select` of rows of which none is asked for twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        return gradient.new_zeros(ctx.size, gradient.shape[1]).index_copy_(0, index, gradient), None
