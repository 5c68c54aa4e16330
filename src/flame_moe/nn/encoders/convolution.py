"""Pieces of small residual networks on signals and pictures, made of weights that grow (He et al. 2016).

Nothing is taken from other samples: normalisation is over groups of channels of the sample itself (Wu and He 2018), so
a sample does not depend on its batch mates. A mask keeps the padding of signals out of every layer.

Shape suffixes: n sequences or pictures, C channels, then one axis (steps) or two (rows, columns).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.stacked import StackedMatrix, StageVector


class StackedConv(nn.Module):
    """A convolution without bias whose kernel is one `StackedMatrix` (out, in * k ** axes); length ceil(L / stride).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: its width along every axis, odd.
        axes: 1 for signals, 2 for pictures.
        stride: steps from one output to the next.
        stage: the stage in which it is trained first.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, axes: int, stride: int = 1, stage: int) -> None:
        super().__init__()
        fan = inputs * kernel**axes
        self.shape, self.stride = (outputs, inputs, *[kernel] * axes), stride
        self.weight = StackedMatrix(outputs, fan, stage=stage, bound=math.sqrt(3.0 / fan))

    def forward(self, x: Tensor, cursor: int, mask: Tensor | None = None) -> Tensor:
        """(n, in, ...) -> (n, out, ...); what comes out where `mask` (n, L) is false is of no use."""
        if self.weight.observer is not None:
            self.weight.observe(self.unfolded(x), mask)
        kernel = self.weight.effective(cursor).view(self.shape)
        run, width, stride = F.conv1d if len(self.shape) == 3 else F.conv2d, self.shape[-1], self.stride
        if width == 1 and stride > 1:
            # A point-wise convolution with a stride writes out of bounds in PyTorch 2.13 on CPUs (oneDNN, channels
            # last, more than one thread): the steps between are dropped first, which is the same and reads less.
            x, stride = x[(slice(None), slice(None), *[slice(None, None, stride)] * (x.ndim - 2))].contiguous(), 1
        return run(x, kernel, stride=stride, padding=width // 2)

    def unfolded(self, x: Tensor) -> Tensor:
        """(n, in, ...) -> (n, places, in * k ** axes): what the kernel sees, in the layout of the weight."""
        kernel, pad = self.shape[-1], self.shape[-1] // 2
        if len(self.shape) == 3:
            return F.pad(x, (pad, pad)).unfold(2, kernel, self.stride).transpose(1, 2).flatten(2)
        return F.unfold(x, kernel, padding=pad, stride=self.stride).mT


class StackedGroupNorm(nn.Module):
    """Group normalisation with about eight channels per group, over the steps that exist; one affine copy per stage."""

    eps = 1e-5

    def __init__(self, channels: int, *, stage: int) -> None:
        super().__init__()
        self.groups = math.gcd(channels, max(1, channels // 8))
        self.weight = StageVector(torch.ones(channels), stage)
        self.bias = StageVector(torch.zeros(channels), stage)

    def forward(self, x: Tensor, cursor: int, mask: Tensor | None = None) -> Tensor:
        """(n, C, ...) -> (n, C, ...); with a mask (n, L), exact zeros on padding, which must be zero in x as well."""
        weight, bias = self.weight.at(cursor), self.bias.at(cursor)
        if mask is None:
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        grouped = x.unflatten(1, (self.groups, -1))
        count = (mask.sum(1) * grouped.shape[2])[:, None, None, None].to(x.dtype)
        there = mask[:, None, None, :]
        mean = grouped.sum((2, 3), keepdim=True) / count
        centred = (grouped - mean).masked_fill(~there, 0.0)
        scale = torch.rsqrt(centred.square().sum((2, 3), keepdim=True) / count + self.eps)
        y = (centred * scale).flatten(1, 2) * weight[:, None] + bias[:, None]
        return y.masked_fill(~mask[:, None, :], 0.0)


class Residual(nn.Module):
    """x' = skip(x) + conv(relu(norm(conv(relu(norm(x)))))), the first convolution and the skip with the stride.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: odd width.
        axes: 1 or 2.
        stride: of the block.
        stage: the stage in which it is trained first.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, axes: int, stride: int, stage: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = StackedGroupNorm(inputs, stage=stage)
        self.first = StackedConv(inputs, outputs, kernel, axes=axes, stride=stride, stage=stage)
        self.between = StackedGroupNorm(outputs, stage=stage)
        self.second = StackedConv(outputs, outputs, kernel, axes=axes, stage=stage)
        changes = stride > 1 or inputs != outputs
        self.skip = StackedConv(inputs, outputs, 1, axes=axes, stride=stride, stage=stage) if changes else None

    def forward(self, x: Tensor, cursor: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(n, in, ...) and the mask of its steps, if any -> (n, out, ...) with its mask."""
        after = None if mask is None else mask[:, :: self.stride]
        h = _kept(self.first(F.relu(self.before(x, cursor, mask)), cursor, after), after)
        h = self.second(F.relu(self.between(h, cursor, after)), cursor, after)
        return _kept(h + (x if self.skip is None else self.skip(x, cursor, after)), after), after


def pooling(lengths: Tensor, steps: int, bins: int) -> Tensor:
    """Weights of the mean over bins: the L steps of a sequence fall into min(L, bins) bins of like size, in order.

    Args:
        lengths: (n,) L >= 1 of each sequence.
        steps: T, at least the longest.
        bins: most bins of a sequence.

    Returns:
        (n, B, T) with B = min(T, bins); the rows of bins that a sequence does not have are zero.
    """
    used = lengths.clamp(max=bins)[:, None]
    place = torch.arange(steps, device=lengths.device)[None]
    bin_of = (place * used).div(lengths[:, None], rounding_mode="floor")
    there = place < lengths[:, None]
    hit = (bin_of[:, None, :] == torch.arange(min(steps, bins), device=lengths.device)[None, :, None]) & there[:, None]
    return hit / hit.sum(2, keepdim=True).clamp(min=1)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[:, None, :], 0.0)
