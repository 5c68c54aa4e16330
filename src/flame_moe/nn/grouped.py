"""The pool of experts on packed rows: one pass forward, one backward, written by hand.

What autograd would keep of every routed row (the neighbours, two activations, the normalised row, masks, the result) is
computed again from two pre-activations, so that a training step keeps about a third. Rows are worked off in blocks that
fit the cache; matrix products run expert by expert inside a block, everything else runs on the block as a whole.

Shape suffixes: S packed steps, R routed rows sorted by expert, r rows of a block, E experts, K experts per step,
d width, H hidden, k kernel width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_moe.nn.dropout import keep_bits, scale_of

_aten = torch.ops.aten
_FLOATS = 1 << 20
"""Floats that the rows of one block may fill, neighbours and activations together."""
_EPS = 1e-5


class Weights(NamedTuple):
    """What a pool reads at one cursor.

    Attributes:
        conv: (E, d, k d), the neighbours of a step one after the other.
        conv_bias: (E, d).
        gain, shift: (E, d) of the layer norm.
        fc1: (E, H, d).
        fc1_bias: (E, H).
        fc2: (E, d, H).
        fc2_bias: (E, d).
    """

    conv: Tensor
    conv_bias: Tensor
    gain: Tensor
    shift: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class Rows(NamedTuple):
    """Where routed rows come from and go to.

    Attributes:
        near: (R, k) the packed steps that a row reads, its own in the middle; S stands for zeros.
        back: (S, K) the rows of every step.
        place: (R,) the position of a row in `back`, flattened.
        counts: E rows per expert.
    """

    near: Tensor
    back: Tensor
    place: Tensor
    counts: Sequence[int]


class _Block(NamedTuple):
    """Some consecutive rows, and the run of each expert among them: (expert, first, last + 1)."""

    start: int
    end: int
    runs: list[tuple[int, int, int]]


def apply_experts(x: Tensor, gates: Tensor, weights: Weights, rows: Rows, rate: float) -> Tensor:
    """Send steps through their experts and add up the answers by the gates.

    The same as `ExpertPool.forward` and a weighted sum, tested against it. Gradients of first order only.

    Args:
        x: (S + 1, d) packed steps and a row of zeros.
        gates: (S, K) their weights.
        weights: of the pool, all of the type of x.
        rows: see `Rows`.
        rate: of dropout, 0 outside of training.

    Returns:
        (S, d).
    """
    out: Tensor = _Experts.apply(x, gates, *weights, rows, rate)  # type: ignore[no-untyped-call]
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, *rest: Any) -> Tensor:
        *tensors, rows, rate = rest
        w = Weights(*tensors)
        learns = any(ctx.needs_input_grad)
        said = x.new_empty(len(rows.place), x.shape[1])
        kept: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            for block in _blocks(rows.counts, w):
                c, a, bits = _forward(x, w, rows, block, rate, said[block.start : block.end])
                kept += [c, a] if bits is None else [c, a, bits]
            out: Tensor = torch.embedding_bag(
                said, rows.back.flatten(), _ends(rows.back), per_sample_weights=gates.flatten().to(said.dtype)
            )[0]
        if learns:
            ctx.save_for_backward(x, gates, *w, *kept)
            ctx.rows, ctx.rate = rows, rate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (dout,) = gradients
        x, gates, *tensors = ctx.saved_tensors
        w, kept, rows = Weights(*tensors[: len(Weights._fields)]), iter(tensors[len(Weights._fields) :]), ctx.rows
        dout = dout.contiguous()
        needs = ctx.needs_input_grad
        dw = [torch.zeros_like(t) if need else None for t, need in zip(w, needs[2:], strict=False)]
        half = rows.near.shape[1] // 2
        dx_rows = x.new_zeros(len(rows.place) + 2 * half, x.shape[1]) if needs[0] else None
        dgate = torch.empty(len(rows.place), dtype=dout.dtype, device=dout.device)
        for block in _blocks(rows.counts, w):
            c, a = next(kept), next(kept)
            bits = next(kept) if ctx.rate > 0 else None
            _backward(x, gates, w, rows, block, (c, a, bits, ctx.rate), dout, dw, dx_rows, dgate)
        dx = None
        if dx_rows is not None:
            own = dx_rows[half : len(dx_rows) - half]
            dx = torch.cat(
                [torch.embedding_bag(own, rows.back.flatten(), _ends(rows.back))[0], x.new_zeros(1, x.shape[1])]
            )
        into = torch.empty_like(gates).flatten()
        into[rows.place] = dgate.to(gates.dtype)
        return (dx, into.view_as(gates), *dw, None, None)


def _blocks(counts: Sequence[int], w: Weights) -> Iterator[_Block]:
    """Cut the rows into blocks of about as many as fit the cache."""
    width, hidden = w.conv.shape[1], w.fc1.shape[1]
    most = max(64, _FLOATS // (w.conv.shape[2] + 2 * width + 2 * hidden) // 64 * 64)
    start = filled = 0
    runs: list[tuple[int, int, int]] = []
    for expert, count in enumerate(counts):
        left = count
        while left:
            taken = min(left, most - filled)
            runs.append((expert, filled, filled + taken))
            filled, left = filled + taken, left - taken
            if filled == most:
                yield _Block(start, start + filled, runs)
                start, filled, runs = start + filled, 0, []
    if runs:
        yield _Block(start, start + filled, runs)


def _near(x: Tensor, rows: Rows, block: _Block) -> Tensor:
    """(r, k d) the neighbours of the rows of a block."""
    near = rows.near[block.start : block.end]
    return x.index_select(0, near.flatten()).view(len(near), -1)


def _middle(near: Tensor, width: int) -> Tensor:
    """(r, d) the rows themselves."""
    first = (near.shape[1] // width // 2) * width
    return near[:, first : first + width]


def _forward(
    x: Tensor, w: Weights, rows: Rows, block: _Block, rate: float, said: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill `said` (r, d); returns what the way back needs: (r, d), (r, H) before their activations, and who dropped."""
    near = _near(x, rows, block)
    c = torch.empty_like(said)
    for e, s, t in block.runs:
        torch.addmm(w.conv_bias[e], near[s:t], w.conv[e].T, out=c[s:t])
    z = _aten.gelu(c).add_(_middle(near, x.shape[1]))
    a = x.new_empty(len(c), w.fc1.shape[1])
    for e, s, t in block.runs:
        h = torch.layer_norm(z[s:t], z.shape[1:], w.gain[e], w.shift[e], _EPS)
        torch.addmm(w.fc1_bias[e], h, w.fc1[e].T, out=a[s:t])
    q = _aten.gelu(a)
    bits = None
    if rate > 0:
        bits = keep_bits(a.shape, rate, a.device)
        q.mul_(bits.to(q.dtype).mul_(scale_of(rate)))
    for e, s, t in block.runs:
        torch.addmm(w.fc2_bias[e], q[s:t], w.fc2[e].T, out=said[s:t])
    return c, a, bits


def _backward(
    x: Tensor,
    gates: Tensor,
    w: Weights,
    rows: Rows,
    block: _Block,
    kept: tuple[Tensor, Tensor, Tensor | None, float],
    dout: Tensor,
    dw: list[Tensor | None],
    dx_rows: Tensor | None,
    dgate: Tensor,
) -> None:
    """Add the gradients that the rows of a block give to `dw` and `dx_rows`, and write theirs into `dgate`."""
    c, a, bits, rate = kept
    d = x.shape[1]
    here = slice(block.start, block.end)
    near = _near(x, rows, block)
    half = rows.near.shape[1] // 2
    g = dout.index_select(0, rows.near[here, half])
    dq, q = torch.empty_like(a), _aten.gelu(a)
    if bits is not None:
        keep = bits.to(a.dtype).mul_(scale_of(rate))
        q.mul_(keep)
    answered = torch.empty_like(dgate[here])
    for e, s, t in block.runs:
        torch.mm(g[s:t], w.fc2[e], out=dq[s:t])
        torch.mv(g[s:t], w.fc2_bias[e], out=answered[s:t])
    dgate[here] = answered.add_((dq * q).sum(1))
    weight = gates.flatten().index_select(0, rows.place[here])[:, None].to(g.dtype)
    g.mul_(weight)
    dq.mul_(weight)
    _accumulate(dw[6], dw[7], g, q, block)
    if bits is not None:
        dq.mul_(keep)
    da = _aten.gelu_backward(dq, a)
    z = _aten.gelu(c).add_(_middle(near, d))
    dz = torch.empty_like(z)
    for e, s, t in block.runs:
        h, mean, rstd = torch.native_layer_norm(z[s:t], [d], w.gain[e], w.shift[e], _EPS)
        if dw[4] is not None:
            dw[4][e].addmm_(da[s:t].T, h)
        dh = torch.mm(da[s:t], w.fc1[e])
        mask = [True, dw[2] is not None, dw[3] is not None]
        into, gain, shift = _aten.native_layer_norm_backward(dh, z[s:t], [d], mean, rstd, w.gain[e], w.shift[e], mask)
        dz[s:t] = into
        for total, part in ((dw[2], gain), (dw[3], shift)):
            if total is not None:
                total[e] += part
    _accumulate(None, dw[5], da, None, block)
    dc = _aten.gelu_backward(dz, c)
    _accumulate(dw[0], dw[1], dc, near, block)
    if dx_rows is None:
        return
    dnear = near  # its values were read for the last time above
    for e, s, t in block.runs:
        torch.mm(dc[s:t], w.conv[e], out=dnear[s:t])
    _middle(dnear, d).add_(dz)
    inside = (rows.near[here] < len(x) - 1).to(g.dtype)
    for tap in range(2 * half + 1):
        # Tap j of row i read row i + j - half of the same sequence, which lies that far away among the routed rows.
        dx_rows[block.start + tap : block.end + tap].addcmul_(
            dnear[:, tap * d : (tap + 1) * d], inside[:, tap : tap + 1]
        )


def _accumulate(dw: Tensor | None, db: Tensor | None, g: Tensor, inputs: Tensor | None, block: _Block) -> None:
    """dW_e += g^T inputs and db_e += sum g over the rows of each expert."""
    for e, s, t in block.runs:
        if dw is not None and inputs is not None:
            dw[e].addmm_(g[s:t].T, inputs[s:t])
        if db is not None:
            db[e] += g[s:t].sum(0)


def _ends(back: Tensor) -> Tensor:
    """Where the bag of each step begins."""
    return torch.arange(0, back.numel(), back.shape[1], device=back.device)
