"""Methods that hold each weight where it was, the more strongly the more earlier tasks depend on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from flame_moe.continual.methods.base import MethodState, StageContext
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.data.loader import to_device
from flame_moe.errors import CheckpointError
from flame_moe.nn.model import Flame, Output
from flame_moe.schema import MethodConfig
from flame_moe.training.hooks import Seen
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import generator


class Quadratic(FineTune):
    """Fine-tuning with the penalty strength / 2 * sum_n I_n (theta_n - theta*_n)^2.

    theta* are the weights at the end of the stage before. I runs over stages: I <- decay * I + the stage's importance,
    summed over its tasks. Protected is every parameter that tasks share: encoders, attention, experts and routers,
    matrices as well as biases, norms and queries. Heads belong to one task each and are frozen after its stage.

    What is stored is one number per shared parameter.
    """

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.importance: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}

    @abstractmethod
    def quantity(self, problem: Problem, output: Output, target: Tensor) -> Tensor:
        """The scalar of one sample whose gradient is taken."""

    @abstractmethod
    def measure(self, gradient: Tensor) -> Tensor:
        """What the gradient of one sample says of each number's importance."""

    def prepare(self, context: StageContext) -> None:
        shared = dict(_shared(context.model))
        self._anchor = {name: shared[name].detach().clone() for name in self.importance}

    def penalty(self, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        if not self._anchor:
            return None
        terms = []
        for name, parameter in _shared(model):
            if name in self._anchor:
                # Training may be on another device than the model was before it.
                weight, anchor = (t.to(parameter.device) for t in (self.importance[name], self._anchor[name]))
                self.importance[name], self._anchor[name] = weight, anchor
                terms.append((weight * (parameter - anchor).square()).sum())
        return 0.5 * self.value("strength") * torch.stack(terms).sum()

    def conclude(self, context: StageContext) -> None:
        self._anchor = {}
        decay = self.value("decay")
        found = {name: decay * tensor.cpu() for name, tensor in self.importance.items()}
        for problem in context.problems.values():
            draw = generator(context.seed, "importance", context.stage, problem.task.name)
            chosen = draw.permutation(problem.train.indices)[: int(self.value("samples"))]
            few = replace(problem, train=replace(problem.train, indices=chosen))
            for name, tensor in self._importance(context.model, few).items():
                found[name] = found.get(name, 0.0) + tensor.cpu()
        self.importance = found

    def state(self) -> MethodState:
        return MethodState({name: tensor.cpu() for name, tensor in self.importance.items()})

    def restore(self, model: Flame, state: MethodState) -> None:
        shared = dict(_shared(model))
        for name, tensor in state.tensors.items():
            if name not in shared or shared[name].shape != tensor.shape:
                raise CheckpointError(f"the importance of '{name}' does not fit the model")
        self.importance = dict(state.tensors)

    def _importance(self, model: Flame, problem: Problem) -> dict[str, Tensor]:
        """Mean over samples of `measure` of each sample's own gradient, in evaluation mode (no dropout, no noise).

        Exact per sample, one backward pass each: the square of a batch's mean gradient would be too small by about the
        size of the batch. Routing is discrete, so samples cannot share one vectorised pass.
        """
        total: dict[str, Tensor] = {}
        single = replace(problem.train, batch_size=1)
        with _differentiable(model) as shared:
            for batch in single.batches(None):
                ready = to_device(batch, next(model.parameters()).device)
                value = self.quantity(problem, model(ready, problem.cursor), ready.target)
                gradients = torch.autograd.grad(value, list(shared.values()), allow_unused=True)
                for name, gradient in zip(shared, gradients, strict=True):
                    if gradient is not None:
                        total[name] = total.get(name, 0.0) + self.measure(gradient)
        return {name: tensor / len(single.indices) for name, tensor in total.items()}


def _shared(model: Flame) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if not name.startswith("heads."))


@contextmanager
def _differentiable(model: Flame) -> Iterator[Mapping[str, nn.Parameter]]:
    """Shared parameters that require a gradient, in evaluation mode; everything is as it was afterwards."""
    shared = dict(_shared(model))
    before, training = {name: p.requires_grad for name, p in shared.items()}, model.training
    model.eval()
    try:
        for parameter in shared.values():
            parameter.requires_grad_(True)
        yield shared
    finally:
        for name, parameter in shared.items():
            parameter.requires_grad_(before[name])
        model.train(training)
