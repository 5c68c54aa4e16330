"""Multi-task schedules: which tasks' batches make up each training step.

round_robin   every step holds one batch of every task; an epoch is as long as the longest task, and a shorter
              task is reshuffled and starts again as often as needed
proportional  every step holds one batch of one task; an epoch holds every batch of every task exactly once, in
              random order
temperature   every step holds one batch of a task drawn with p ~ n^(1/T), n its number of batches; an epoch has
              as many steps as there are batches, and tasks are reshuffled whenever they run out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch

from flame_moe.batch import FlexiBatch
from flame_moe.data.loader import Loader
from flame_moe.errors import DataError, nearest

Policy = Literal["round_robin", "proportional", "temperature"]
POLICIES: tuple[str, ...] = ("round_robin", "proportional", "temperature")


def steps_per_epoch(loaders: Mapping[str, Loader], policy: Policy) -> int:
    """Number of optimizer steps that `steps` yields.

    Raises:
        DataError: if there are no tasks or the policy is unknown.
    """
    _check(loaders, policy)
    lengths = [len(loader) for loader in loaders.values()]
    return max(lengths) if policy == "round_robin" else sum(lengths)


def steps(
    loaders: Mapping[str, Loader],
    policy: Policy,
    temperature: float,
    generator: np.random.Generator,
    device: torch.device | str | None = None,
) -> Iterator[list[FlexiBatch]]:
    """One epoch of training steps, each a list of batches of different tasks.

    Args:
        loaders: task name -> its training loader.
        policy: see the module.
        temperature: T > 0 of "temperature": 1 draws tasks in proportion to their size, large T evenly.
        generator: decides every order; the same state gives the same epoch.
        device: where the batches go.

    Raises:
        DataError: if there are no tasks, the policy is unknown or the temperature is not positive.
    """
    _check(loaders, policy)
    if not temperature > 0:
        raise DataError(f"a sampling temperature of {temperature:g}", mend="Use a temperature above 0.")
    streams = {name: _endless(loader, generator, device) for name, loader in loaders.items()}
    for tasks in _schedule(loaders, policy, temperature, generator):
        yield [next(streams[name]) for name in tasks]


def _schedule(
    loaders: Mapping[str, Loader], policy: Policy, temperature: float, generator: np.random.Generator
) -> list[list[str]]:
    """Which tasks each step of an epoch holds."""
    names, total = list(loaders), steps_per_epoch(loaders, policy)
    sizes = np.array([len(loader) for loader in loaders.values()])
    if policy == "round_robin":
        return [names] * total
    if policy == "proportional":
        return [[names[i]] for i in generator.permutation(np.repeat(np.arange(len(names)), sizes))]
    weights = (sizes / sizes.max()) ** (1.0 / temperature)
    return [[names[i]] for i in generator.choice(len(names), size=total, p=weights / weights.sum())]


def _endless(loader: Loader, generator: np.random.Generator, device: torch.device | str | None) -> Iterator[FlexiBatch]:
    while True:
        yield from loader.batches(generator, device)


def _check(loaders: Mapping[str, Loader], policy: str) -> None:
    if policy not in POLICIES:
        raise DataError(f"unknown sampling policy '{policy}'", mend=nearest(policy, POLICIES))
    if not loaders:
        raise DataError("there is no task to sample from", mend="Give at least one loader.")
