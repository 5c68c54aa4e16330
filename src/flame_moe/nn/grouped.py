"""The pool of experts on packed rows, for a processor: one pass forward, one backward, written by hand.

What autograd would keep of every routed row (the neighbours, two activations, the normalised row, masks, the result) is
computed again from two pre-activations, so that a training step keeps about a third. Rows are worked off in blocks that
fit the cache; matrix products run expert by expert inside a block, everything else runs on the block as a whole.

Shape suffixes: S packed steps, R routed rows sorted by expert, r rows of a block, E experts, K experts per step,
d width, H hidden, k kernel width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame_moe.nn import products
from flame_moe.nn.autograd import applied
from flame_moe.nn.dropout import keep_bits, scale_of

_aten = torch.ops.aten
_FLOATS = 1 << 20
"""Floats that the rows of one block may fill, neighbours and activations together."""
EPS = 1e-5


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


class _Gradients(NamedTuple):
    """What `Weights` gets back, of one expert; None for what is frozen."""

    conv: Tensor | None
    conv_bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    fc1: Tensor | None
    fc1_bias: Tensor | None
    fc2: Tensor | None
    fc2_bias: Tensor | None


class Rows(NamedTuple):
    """Where routed rows come from and go to.

    Attributes:
        near: (R, k) the packed steps that a row reads, its own in the middle; S stands for zeros.
        back: (S, K) the rows of every step.
        place: (R,) the position of a row in `back`, flattened.
        expert: (R,) whose row it is, ascending.
        counts: (E,) rows per expert.
    """

    near: Tensor
    back: Tensor
    place: Tensor
    expert: Tensor
    counts: Tensor


class _Scratch(threading.local):
    """Buffers for the rows of one block, used again from block to block and from call to call.

    Fresh ones of this size come from pages that the allocator has just given back to the system, and touching them anew
    costs as much as the arithmetic. At most about `_FLOATS` numbers for each name.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) of anything, overwritten by the next to take this name."""
        key = name, columns, like.dtype
        if key not in self._kept or len(self._kept[key]) < rows:
            with torch.inference_mode(False):  # what is made while predicting must serve training as well
                self._kept[key] = torch.empty(rows, columns, dtype=like.dtype)
        return self._kept[key][:rows]


_SCRATCH = _Scratch()


class _Block(NamedTuple):
    """Some consecutive rows, and the run of each expert among them: (expert, first, last + 1)."""

    start: int
    end: int
    runs: list[tuple[int, int, int]]


def apply_experts(x: Tensor, gates: Tensor, sets: Sequence[Weights], rows: Rows, rate: float) -> Tensor:
    """Send steps through their experts and add up the answers by the gates.

    The same as `ExpertPool.forward` and a weighted sum, tested against it. Gradients of first order only.

    Args:
        x: (S + 1, d) packed steps and a row of zeros.
        gates: (S, K) their weights.
        sets: of pools or of cursors, all of the type of x; their experts are numbered one set after the other.
        rows: see `Rows`.
        rate: of dropout, 0 outside of training.

    Returns:
        (S, d).
    """
    flat = [tensor for w in sets for tensor in w]
    if not torch.is_grad_enabled():
        return _answer(x, gates, _experts(flat), rows, rows.counts.tolist(), rate, None)
    return applied(_Experts, x, gates, *flat, rows, rows.counts.tolist(), rate)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, *rest: Any) -> Tensor:
        *tensors, rows, counts, rate = rest
        learns = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        out = _answer(x, gates, _experts(tensors), rows, counts, rate, kept if learns else None)
        if learns:
            ctx.save_for_backward(x, gates, *tensors, *kept)
            ctx.rows, ctx.counts, ctx.rate, ctx.weights = rows, counts, rate, len(tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (dout,) = gradients
        x, gates, *tensors = ctx.saved_tensors
        kept, rows, needs = iter(tensors[ctx.weights :]), ctx.rows, ctx.needs_input_grad
        tensors = tensors[: ctx.weights]
        experts = _experts(tensors)
        dw = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs[2:], strict=False)]
        gradient = _gradients(dw, tensors)
        half = rows.near.shape[1] // 2
        dx_rows = x.new_zeros(len(rows.place) + 2 * half, x.shape[1]) if needs[0] else None
        dgate = torch.empty(len(rows.place), dtype=dout.dtype, device=dout.device)
        for block in _blocks(ctx.counts, experts[0]):
            c, a = next(kept), next(kept)
            bits = next(kept) if ctx.rate > 0 else None
            saved = (c, a, bits, ctx.rate)
            _backward(x, gates, experts, rows, block, saved, dout.contiguous(), gradient, dx_rows, dgate)
        dx = None
        if dx_rows is not None:
            own = dx_rows[half : len(dx_rows) - half]
            gathered = torch.embedding_bag(own, rows.back.flatten(), _ends(rows.back))[0]
            dx = torch.cat([gathered, x.new_zeros(1, x.shape[1])])
        dgates = torch.empty_like(gates).flatten().scatter_(0, rows.place, dgate.to(gates.dtype)).view_as(gates)
        return (dx, dgates, *dw, None, None, None)


def _answer(
    x: Tensor,
    gates: Tensor,
    experts: Sequence[Weights],
    rows: Rows,
    counts: Sequence[int],
    rate: float,
    kept: list[Tensor] | None,
) -> Tensor:
    """The forward pass; what the way back needs is put into `kept`, if there is to be one."""
    said = x.new_empty(len(rows.place), x.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(counts, experts[0]):
            left = _forward(x, experts, rows, block, rate, said[block.start : block.end], kept is not None)
            if kept is not None and left is not None:
                kept += [t for t in left if t is not None]
        weights = gates.flatten().to(said.dtype)
        return torch.embedding_bag(said, rows.back.flatten(), _ends(rows.back), per_sample_weights=weights)[0]


def _experts(tensors: Sequence[Tensor]) -> list[Weights]:
    """The weights of each expert, without the axis E; one set of tensors after the other."""
    size = len(Weights._fields)
    sets = [tensors[i : i + size] for i in range(0, len(tensors), size)]
    return [Weights(*own) for one in sets for own in zip(*(t.unbind(0) for t in one), strict=True)]


def _gradients(dw: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[_Gradients]:
    """Where the gradients of each expert are added up."""
    size = len(Weights._fields)
    found: list[_Gradients] = []
    for i in range(0, len(dw), size):
        pairs = zip(dw[i : i + size], tensors[i : i + size], strict=True)
        parts = [[None] * len(t) if d is None else d.unbind(0) for d, t in pairs]
        found += [_Gradients(*own) for own in zip(*parts, strict=True)]
    return found


def _blocks(counts: Sequence[int], w: Weights) -> Iterator[_Block]:
    """Cut the rows into blocks of about as many as fit the cache."""
    width, hidden = w.conv.shape[0], w.fc1.shape[0]
    most = max(64, _FLOATS // (w.conv.shape[1] + 2 * width + 2 * hidden) // 64 * 64)
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
    found = _SCRATCH.take("near", len(near), near.shape[1] * x.shape[1], x)
    torch.index_select(x, 0, near.flatten(), out=found.view(-1, x.shape[1]))
    return found


def _middle(near: Tensor, width: int) -> Tensor:
    """(r, d) the rows themselves."""
    first = (near.shape[1] // width // 2) * width
    return near[:, first : first + width]


def _forward(
    x: Tensor, experts: Sequence[Weights], rows: Rows, block: _Block, rate: float, said: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Fill `said` (r, d); returns what the way back needs: (r, d), (r, H) before their activations, and who dropped."""
    near = _near(x, rows, block)
    count, d, hidden = len(said), x.shape[1], len(experts[0].fc1)
    c = torch.empty_like(said) if learns else _SCRATCH.take("c", count, d, x)
    for e, s, t in block.runs:
        products.addmm(experts[e].conv_bias, near[s:t], experts[e].conv.T, out=c[s:t])
    z = _aten.gelu(c, out=_SCRATCH.take("z", count, d, x)).add_(_middle(near, d))
    a = x.new_empty(count, hidden) if learns else _SCRATCH.take("a", count, hidden, x)
    for e, s, t in block.runs:
        h = torch.layer_norm(z[s:t], z.shape[1:], experts[e].gain, experts[e].shift, EPS)
        products.addmm(experts[e].fc1_bias, h, experts[e].fc1.T, out=a[s:t])
    q = _aten.gelu(a, out=_SCRATCH.take("q", count, hidden, x))
    bits = None
    if rate > 0:
        bits = keep_bits(a.shape, rate, a.device)
        q.mul_(_SCRATCH.take("keep", count, hidden, x).copy_(bits).mul_(scale_of(rate)))
    for e, s, t in block.runs:
        products.addmm(experts[e].fc2_bias, q[s:t], experts[e].fc2.T, out=said[s:t])
    return (c, a, bits) if learns else None


def _backward(
    x: Tensor,
    gates: Tensor,
    experts: Sequence[Weights],
    rows: Rows,
    block: _Block,
    kept: tuple[Tensor, Tensor, Tensor | None, float],
    dout: Tensor,
    dw: Sequence[_Gradients],
    dx_rows: Tensor | None,
    dgate: Tensor,
) -> None:
    """Add the gradients that the rows of a block give to `dw` and `dx_rows`, and write theirs into `dgate`."""
    c, a, bits, rate = kept
    d = x.shape[1]
    here = slice(block.start, block.end)
    near = _near(x, rows, block)
    half, (count, hidden) = rows.near.shape[1] // 2, a.shape
    g = torch.index_select(dout, 0, rows.near[here, half], out=_SCRATCH.take("g", count, d, dout))
    dq = _SCRATCH.take("dq", count, hidden, x)
    q = _aten.gelu(a, out=_SCRATCH.take("q", count, hidden, x))
    if bits is not None:
        keep = _SCRATCH.take("keep", count, hidden, x).copy_(bits).mul_(scale_of(rate))
        q.mul_(keep)
    answered = torch.empty_like(dgate[here])
    for e, s, t in block.runs:
        products.mm(g[s:t], experts[e].fc2, out=dq[s:t])
        torch.mv(g[s:t], experts[e].fc2_bias, out=answered[s:t])
    dgate[here] = answered.add_(torch.bmm(dq[:, None], q[:, :, None]).view(-1))
    weight = gates.flatten().index_select(0, rows.place[here])[:, None].to(g.dtype)
    g.mul_(weight)
    dq.mul_(weight)
    for e, s, t in block.runs:
        _add(dw[e].fc2, dw[e].fc2_bias, g[s:t], q[s:t])
    if bits is not None:
        dq.mul_(keep)
    da = _aten.gelu_backward(dq, a, grad_input=dq)
    z = _aten.gelu(c, out=_SCRATCH.take("z", count, d, x)).add_(_middle(near, d))
    dh, dz = _SCRATCH.take("dh", count, d, x), _SCRATCH.take("dz", count, d, x)
    for e, s, t in block.runs:
        w, into = experts[e], dw[e]
        h, mean, rstd = torch.native_layer_norm(z[s:t], [d], w.gain, w.shift, EPS)
        _add(into.fc1, into.fc1_bias, da[s:t], h)
        products.mm(da[s:t], w.fc1, out=dh[s:t])
        wanted = [True, into.gain is not None, into.shift is not None]
        part = _aten.native_layer_norm_backward(dh[s:t], z[s:t], [d], mean, rstd, w.gain, w.shift, wanted)
        dz[s:t] = part[0]
        for total, gradient in zip((into.gain, into.shift), part[1:], strict=True):
            if total is not None:
                total.add_(gradient)
    dc = _aten.gelu_backward(dz, c, grad_input=_SCRATCH.take("dc", count, d, x))
    for e, s, t in block.runs:
        _add(dw[e].conv, dw[e].conv_bias, dc[s:t], near[s:t])
    if dx_rows is None:
        return
    dnear = near  # its values were read for the last time above
    for e, s, t in block.runs:
        products.mm(dc[s:t], experts[e].conv, out=dnear[s:t])
    _middle(dnear, d).add_(dz)
    inside = (rows.near[here] < len(x) - 1).to(g.dtype)
    for tap in range(2 * half + 1):
        # Tap j of row i read row i + j - half of the same sequence, which lies that far away among the routed rows.
        moved = dx_rows[block.start + tap : block.end + tap]
        moved.addcmul_(dnear[:, tap * d : (tap + 1) * d], inside[:, tap : tap + 1])


def _add(weight: Tensor | None, bias: Tensor | None, g: Tensor, inputs: Tensor) -> None:
    """dW += g^T inputs and db += sum g, where they are asked for."""
    if weight is not None:
        products.add_outer(weight, g, inputs)
    if bias is not None:
        bias.add_(g.sum(0))


def _ends(back: Tensor) -> Tensor:
    """Where the bag of each step begins."""
    return torch.arange(0, back.numel(), back.shape[1], device=back.device)
