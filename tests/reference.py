"""The slow and obvious versions of what the network does fast: plain loops over samples, experts and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.encoders import CodeEncoder, ImageEncoder, WaveformEncoder
from flame_moe.nn.encoders.convolution import Residual, StackedConv, StackedGroupNorm
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import Routing
from flame_moe.nn.moe import Sequences


def naive_expert(pool: ExpertPool, e: int, x: Tensor, cursor: int) -> Tensor:
    """One expert on one unpadded sequence, with a real convolution: (T, d) -> (T, d)."""
    d, k = pool.width, pool.kernel
    taps = pool.conv.effective(cursor)[e].view(d, k, d).permute(0, 2, 1)
    c = F.gelu(F.conv1d(x.T[None], taps, pool.conv_bias.at(cursor)[e], padding=k // 2))[0].T
    h = F.layer_norm(x + c, (d,), pool.norm_weight.at(cursor)[e], pool.norm_bias.at(cursor)[e])
    q = F.gelu(F.linear(h, pool.fc1.effective(cursor)[e], pool.fc1_bias.at(cursor)[e]))
    return F.linear(q, pool.fc2.effective(cursor)[e], pool.fc2_bias.at(cursor)[e])


def naive_mixture(
    inputs: Mapping[str, Sequences], routings: Mapping[str, Routing], pool: ExpertPool, cursor: int
) -> dict[str, Tensor]:
    """Y_i = sum_j gate_ij Expert_j(Z_i), one sample and one expert at a time; zeros on padding."""
    out = {}
    for name, (x, mask) in inputs.items():
        rows = []
        for i in range(len(x)):
            length = int(mask[i].sum())
            total = torch.zeros(length, x.shape[2])
            for j, e in enumerate(routings[name].chosen[i].tolist()):
                total = total + routings[name].gates[i, j] * naive_expert(pool, e, x[i, :length], cursor)
            rows.append(F.pad(total, (0, 0, 0, x.shape[1] - length)))
        out[name] = torch.stack(rows)
    return out


def naive_time_attention(scores: Tensor, values: Tensor, observed: Tensor) -> Tensor:
    """The expanded form: a softmax over the observed steps of every channel, 0 where a channel has none."""
    n, heads, steps, _ = scores.shape
    out = torch.zeros(n, heads, steps, values.shape[2])
    for i in range(n):
        for c in range(values.shape[2]):
            seen = observed[i, :, c]
            if seen.any():
                weights = torch.softmax(scores[i][:, :, seen], dim=-1)
                out[i, :, :, c] = weights @ values[i, seen, c]
    return out


def naive_grid(values: Tensor, times: Tensor, observed: Tensor, steps: int) -> Tensor:
    """Last observed value per bin carried forward, then flags, cell by cell."""
    n, length, channels = values.shape
    out = torch.zeros(n, steps, 2 * channels)
    for i in range(n):
        for c in range(channels):
            bins: dict[int, float] = {}
            for j in range(length):
                if observed[i, j, c]:
                    bins[min(int(times[i, j] * steps), steps - 1)] = float(values[i, j, c])
            carried = 0.0
            for t in range(steps):
                carried = bins.get(t, carried)
                out[i, t, c], out[i, t, channels + c] = carried, float(t in bins)
    return out


def naive_codes(net: CodeEncoder, events: Tensor, times: Tensor, cursor: int) -> dict[str, Tensor]:
    """One sample: (L, 2), (L,) -> its vector ("sample") and one per event type that it has, event by event."""
    d, heads = net.sample.at(cursor).shape[0], net.attention.heads
    code, kind = net.embed_code.weight.effective(cursor), net.embed_type.weight.effective(cursor)
    tokens = [net.sample.at(cursor)]
    for (k, row), t in zip(events.long().tolist(), times, strict=True):
        tokens.append(code[row] + kind[k] + net.time_map(net.embed_time(t, cursor), cursor) / math.sqrt(d))
    x = torch.stack(tokens)
    q, k_, v = net.attention.inputs(net.before(x, cursor), cursor).split(d, dim=-1)
    mixed = []
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        mixed.append(torch.softmax(q[:, part] @ k_[:, part].T / math.sqrt(d / heads), dim=-1) @ v[:, part])
    x = x + net.attention.output(torch.cat(mixed, dim=-1), cursor)
    x = x + net.down(F.gelu(net.up(net.between(x, cursor), cursor)), cursor)
    x = net.out(x, cursor)
    found = {"sample": x[0]}
    for k in sorted(set(events[:, 0].long().tolist())):
        found[net.modality.types[k]] = torch.stack(
            [x[1 + i] for i in range(len(events)) if int(events[i, 0]) == k]
        ).mean(0)
    return found


def naive_image(net: ImageEncoder, picture: Tensor, time: Tensor, cursor: int) -> Tensor:
    """One picture (H, W, channels) at one time: (cells, d), cell by cell."""
    x = _naive_residual(net.stem, net.blocks, net.norm, picture.permute(2, 0, 1), cursor)
    when = net.time_map(net.embed_time(time, cursor), cursor) / math.sqrt(net.place.at(cursor).shape[1])
    tokens = []
    for rows in _naive_bins(x.shape[1], len(net.rows)):
        for columns in _naive_bins(x.shape[2], len(net.columns)):
            mean = torch.stack([x[:, i, j] for i in rows for j in columns]).mean(0)
            tokens.append(net.out(mean, cursor) + net.place.at(cursor)[len(tokens)] + when)
    return torch.stack(tokens)


def naive_waveform(net: WaveformEncoder, signal: Tensor, cursor: int) -> Tensor:
    """One signal (L, C) without padding: (T, d)."""
    x = _naive_residual(net.stem, net.blocks, net.norm, signal.T, cursor)
    bins = _naive_bins(x.shape[1], min(x.shape[1], net.steps))
    return torch.stack([net.out(torch.stack([x[:, i] for i in steps]).mean(0), cursor) for steps in bins])


def _naive_residual(stem: StackedConv, blocks: nn.ModuleList, norm: StackedGroupNorm, x: Tensor, cursor: int) -> Tensor:
    x = _naive_conv(stem, x, cursor)
    for block in blocks:
        assert isinstance(block, Residual)
        h = _naive_conv(block.first, F.relu(_naive_norm(block.before, x, cursor)), cursor)
        h = _naive_conv(block.second, F.relu(_naive_norm(block.between, h, cursor)), cursor)
        x = h + (x if block.skip is None else _naive_conv(block.skip, x, cursor))
    return F.relu(_naive_norm(norm, x, cursor))


def _naive_conv(conv: StackedConv, x: Tensor, cursor: int) -> Tensor:
    """Every output position on its own: the window around it, zeros beyond the ends, times the flat kernel."""
    k, weight = conv.shape[-1], conv.weight.effective(cursor)
    padded = F.pad(x, (k // 2, k // 2) * (x.ndim - 1))
    if x.ndim == 2:
        starts = range(0, x.shape[1], conv.stride)
        return torch.stack([weight @ padded[:, i : i + k].flatten() for i in starts], dim=1)
    rows, columns = (range(0, size, conv.stride) for size in x.shape[1:])
    grid = [[weight @ padded[:, i : i + k, j : j + k].flatten() for j in columns] for i in rows]
    return torch.stack([torch.stack(row, dim=1) for row in grid], dim=1)


def _naive_norm(norm: StackedGroupNorm, x: Tensor, cursor: int) -> Tensor:
    out = []
    for group in x.chunk(norm.groups):
        out.append((group - group.mean()) / torch.sqrt(group.var(correction=0) + norm.eps))
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.cat(out) * norm.weight.at(cursor).view(shape) + norm.bias.at(cursor).view(shape)


def _naive_bins(size: int, bins: int) -> list[list[int]]:
    return [[i for i in range(size) if i * bins // size == b] for b in range(bins)]


def naive_interaction(p: list[Tensor]) -> float:
    """Mean over unordered pairs of the cosine of two expert distributions."""
    cosines = [float(p[a] @ p[b] / (p[a].norm() * p[b].norm())) for a in range(len(p)) for b in range(a)]
    return sum(cosines) / len(cosines)


def normal_cdf(x: float) -> float:
    """Phi, from the error function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
