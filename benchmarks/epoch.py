"""One process that learns the first stage of a recipe and prints what its epochs took, as JSON.

    python -m benchmarks.epoch RECIPE.toml STORE EPOCHS [--moments]

It uses only what the package has had for long, so that an earlier commit's source can be measured by it as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flame_moe.batch import FlexiBatch
from flame_moe.continual import Learner
from flame_moe.data.loader import Loader
from flame_moe.data.sampling import steps
from flame_moe.data.store import Store
from flame_moe.schema import Recipe, Stage
from flame_moe.training.monitor import Monitor


class Watch(Monitor):
    """Of every epoch: processor seconds of its training steps and of all of it, and the process's own memory after it.

    Attributes:
        training: seconds, loading included and validation left out.
        whole: seconds, validation included.
        own: megabytes that no file backs.
    """

    def __init__(self) -> None:
        self.training: list[float] = []
        self.whole: list[float] = []
        self.own: list[float] = []
        self._steps = self._left = 0
        self._start = 0.0

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        self._steps = self._left = steps
        self._start = time.process_time()

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.training.append(time.process_time() - self._start)

    def epoch(self, record: dict[str, Any]) -> None:
        self.whole.append(time.process_time() - self._start)
        self.own.append(memory("RssAnon"))
        self._left, self._start = self._steps, time.process_time()


def memory(what: str) -> float:
    """Megabytes of this process by Linux's name for them; NaN elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:")), float("nan"))


def loaders(learner: Learner, store: Store, stage: Stage) -> dict[str, Loader]:
    """Batches of the training samples of a stage's tasks."""
    size = learner.recipe.train.batch_size
    return {
        name: Loader(store, learner.preprocessor, learner.tasks[name], store.indices(name, "train"), size)
        for name in stage.tasks
    }


def loading(learner: Learner, store: Store, stage: Stage) -> float:
    """Processor seconds of making the batches of an epoch, and nothing with them."""
    train = learner.recipe.train
    start = time.process_time()
    for _ in steps(loaders(learner, store, stage), train.sampling, train.temperature, np.random.default_rng(0)):
        pass
    return time.process_time() - start


def moments(learner: Learner, store: Store, stage: Stage) -> float:
    """Processor seconds of gathering the second moments of a stage's inputs, over as many as a commit sees."""
    from flame_moe.continual.methods.base import share
    from flame_moe.continual.moments import gather

    def batches() -> Iterator[FlexiBatch]:
        each = loaders(learner, store, stage).values()
        for loader in each:
            yield from islice(loader.batches(np.random.default_rng(0)), share(len(each)))

    start = time.process_time()
    gather(learner.model, batches(), 0)
    return time.process_time() - start


def main(path: str, place: str, epochs: str, *more: str) -> None:
    torch.set_num_threads(1)
    recipe, store = Recipe.load(path), Store.open(place)
    stage = recipe.stages[0].model_copy(update={"epochs": int(epochs)})
    learner, watch = Learner(recipe), Watch()
    learner.learn(store, stage, monitor=watch)
    found = {"training": watch.training, "whole": watch.whole, "own": watch.own, "peak": memory("VmHWM")}
    found["loading"] = loading(learner, store, stage)
    if "--moments" in more:
        found["moments"] = moments(learner, store, stage)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
