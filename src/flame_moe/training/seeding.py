"""Random numbers that depend on the recipe's seed and the place in the run, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *place: str | int) -> int:
    """A 63-bit seed for a named place in the run, e.g. derive(0, "stage", 1, "epoch", 3)."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_torch(seed: int, *place: str | int) -> None:
    """Seed PyTorch's global generator, which initialisation, dropout and routing noise draw from."""
    torch.manual_seed(derive(seed, *place))


def generator(seed: int, *place: str | int) -> np.random.Generator:
    """A numpy generator of its own for a place in the run."""
    return np.random.default_rng(derive(seed, *place))
