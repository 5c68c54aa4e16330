"""Steps of an optimiser over a known number of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flame_moe.errors import NonFiniteError


class Steps:
    """AdamW with a linear warm-up, then a cosine down to 0, and gradients clipped to norm 1.

    Args:
        parameters: what is trained.
        lr: highest learning rate.
        steps: how many there will be.
        what: is learned, for messages.
        weight_decay: decoupled.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, steps: int, what: str, *, weight_decay: float = 0.01
    ) -> None:
        self.parameters, self.steps, self.what, self.done = list(parameters), steps, what, 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: warm_cosine(i, steps))

    def __call__(self, loss: Tensor) -> None:
        """Take one step.

        Raises:
            NonFiniteError: before the weights move, if the loss is no number.
        """
        if not bool(torch.isfinite(loss)):
            mend = "Lower the learning rate or the strength."
            raise NonFiniteError(f"the loss became {float(loss)}", where=f"{self.what}, step {self.done}", mend=mend)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return self.done / self.steps


def warm_cosine(step: int, steps: int, warmup: float = 0.06) -> float:
    """Share of the learning rate at a step.

    Example:
        >>> [round(warm_cosine(i, 100), 2) for i in (0, 5, 53, 99)]
        [0.17, 1.0, 0.5, 0.0]
    """
    start = max(1, round(warmup * steps))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))
