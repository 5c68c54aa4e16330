"""Experience replay: a few samples of earlier tasks are learned again with every batch of a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from flame_moe.batch import FlexiBatch
from flame_moe.continual.methods.base import MethodState, StageContext
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import generator


class Replay(FineTune):
    """Plain fine-tuning, with one batch of remembered samples of one earlier task in each step (Chaudhry et al. 2019,
    arXiv 1902.10486). Tasks are drawn evenly, samples without replacement until all were seen.

    `memory` samples are remembered altogether, shared evenly by the tasks so far and drawn by the seed; when a task is
    added, the others give up their last ones. What is stored is the samples' ids: their content stays in the store,
    which must be at hand. A hospital that may not keep data cannot use this method.
    """

    name: ClassVar[str] = "replay"
    defaults: ClassVar[Mapping[str, float]] = {"memory": 200}

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._earlier: Mapping[str, Problem] = {}

    def prepare(self, context: StageContext) -> None:
        self._earlier = context.earlier

    def replay(self, draw: np.random.Generator) -> Iterator[tuple[Problem, FlexiBatch]] | None:
        return self._endless(draw) if self._earlier else None

    def conclude(self, context: StageContext) -> None:
        self._earlier = {}
        share, rest = divmod(int(self.value("memory")), len(context.cursors))
        drawn = dict(self.memory)
        for name, problem in context.problems.items():
            order = generator(context.seed, "memory", context.stage, name).permutation(problem.train.indices)
            drawn[name] = problem.train.store.ids(order[: share + 1])
        self.memory = {name: tuple(drawn[name][: share + (place < rest)]) for place, name in enumerate(context.cursors)}

    def state(self) -> MethodState:
        return MethodState(meta={"memory": self.memory})

    def restore(self, model: Flame, state: MethodState) -> None:
        self.memory = {str(task): tuple(ids) for task, ids in state.meta["memory"].items()}

    def _endless(self, draw: np.random.Generator) -> Iterator[tuple[Problem, FlexiBatch]]:
        problems = [p for p in self._earlier.values() if len(p.train.indices)]
        streams = [_cycle(p, draw) for p in problems]
        while True:
            chosen = int(draw.integers(len(problems)))
            yield problems[chosen], next(streams[chosen])


def _cycle(problem: Problem, draw: np.random.Generator) -> Iterator[FlexiBatch]:
    while True:
        yield from problem.train.batches(draw)
