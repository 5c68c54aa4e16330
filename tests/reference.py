"""The slow and obvious versions of what the network does fast: plain loops over samples, experts and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

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


def naive_interaction(p: list[Tensor]) -> float:
    """Mean over unordered pairs of the cosine of two expert distributions."""
    cosines = [float(p[a] @ p[b] / (p[a].norm() * p[b].norm())) for a in range(len(p)) for b in range(a)]
    return sum(cosines) / len(cosines)


def normal_cdf(x: float) -> float:
    """Phi, from the error function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
