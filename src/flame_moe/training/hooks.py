"""What a learning method may add to the steps of training. The loop knows these calls and no method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.nn.model import Flame, Output
from flame_moe.training.problem import Problem


class Seen(NamedTuple):
    """One batch of a step, after its forward pass.

    Attributes:
        problem: whose batch it is.
        batch: as the model saw it: on its device, with what was dropped left out.
        output: what the model said, with its graph.
        loss: scalar that enters the step's loss: weighted task loss plus auxiliary loss.
    """

    problem: Problem
    batch: FlexiBatch
    output: Output
    loss: Tensor


class Hooks:
    """Calls of every training step, in this order; as they stand they change nothing, not even the last bit."""

    def replay(self, draw: np.random.Generator) -> Iterator[tuple[Problem, FlexiBatch]] | None:
        """Batches of earlier tasks for one epoch, without end: one joins every step. None: there are none.

        Args:
            draw: of this epoch and this purpose alone, so that the order of the stage's own batches stays as it is.
        """
        return None

    def penalty(self, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        """A scalar that is added to the step's loss, given the batches of the step, replayed ones last; or None."""
        return None

    def adjust_gradients(self, model: Flame) -> None:
        """Change `.grad` in place: after the backward pass, before clipping."""

    def after_step(self, model: Flame) -> None:
        """Correct the weights in place: after the optimizer's step, which may move what has no gradient (decay)."""
