"""The network: growable weights, routing, experts, encoders, heads."""

from __future__ import annotations

from flame_moe.nn.layers import StackedLinear, StackedNorm
from flame_moe.nn.model import Flame, Output
from flame_moe.nn.stacked import StackedMatrix, StageVector

__all__ = ["Flame", "Output", "StackedLinear", "StackedMatrix", "StackedNorm", "StageVector"]
