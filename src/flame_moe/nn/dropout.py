"""Dropout from cheap random bits.

PyTorch's own draws one number of 32 bits per element on CPUs, which costs more than the layers around it. Here four
decisions come out of one draw of 64 bits; the rate is thereby rounded to a multiple of 2^-16, and the scale is that of
the rounded rate, so that the expectation is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 1 << 16
_LOWEST = -(1 << 15)


def keep_bits(shape: torch.Size, rate: float, device: torch.device) -> Tensor:
    """Which elements stay, as bool; see `keep_mask`. What stays is to be multiplied by `scale_of(rate)`."""
    dropped = _dropped(rate)
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= dropped / _LEVELS
    return _bits(shape) >= _LOWEST + dropped if dropped < _LEVELS else torch.zeros(shape, dtype=torch.bool)


def scale_of(rate: float) -> float:
    """1 / (1 - rate) of the rounded rate; 1 where all is dropped."""
    kept = _LEVELS - _dropped(rate)
    return _LEVELS / kept if kept else 1.0


def keep_mask(shape: torch.Size, rate: float, like: Tensor) -> Tensor:
    """Which elements stay and how they are scaled: 0 with probability `rate`, else 1 / (1 - rate).

    Draws from PyTorch's global generator.

    Args:
        shape: of the mask.
        rate: in [0, 1]; rounded to a multiple of 2^-16.
        like: gives type and device.
    """
    dropped = _dropped(rate)
    if like.device.type != "cpu" or dropped == _LEVELS:
        return keep_bits(shape, rate, like.device).to(like.dtype).mul_(scale_of(rate))
    mask = torch.empty(shape, dtype=like.dtype)
    torch.ge(_bits(shape), _LOWEST + dropped, out=mask)
    return mask.mul_(scale_of(rate))


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Set elements to zero with probability `rate` and scale the others by 1 / (1 - rate); only in training."""
    if not training or rate <= 0:
        return x
    return x * keep_mask(x.shape, rate, x)


def _dropped(rate: float) -> int:
    return round(rate * _LEVELS)


def _bits(shape: torch.Size) -> Tensor:
    """16 random bits per element, as int16."""
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    return draws.view(torch.int16)[:count].view(shape)
