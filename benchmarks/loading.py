"""How much of a training step is loading, and whether memory grows with the data set.

    python benchmarks/loading.py [STORE RECIPE]

Without arguments it uses the digits recipe. The share is CPU time of making the batches of an epoch over CPU time of
the whole epoch, one thread, median of five epochs. Memory: peak of a fresh process that makes every training batch of a
generated `clinic` store, for stores of growing size. Pages of mapped files are the system's to drop, so the process's
own memory (anonymous pages, `RssAnon` of Linux) is told apart from them; `own` must not grow with the store.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from flame_moe.continual import Learner
from flame_moe.data.loader import Loader
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.sampling import steps
from flame_moe.data.store import Store
from flame_moe.recipes import load_recipe
from flame_moe.runs import open_store
from flame_moe.schema import Recipe
from flame_moe.training.monitor import Monitor

SAMPLES = (500, 4000, 16000)


class Stopwatch(Monitor):
    """CPU seconds of every epoch's training, validation left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.left = self.steps = 0
        self.start = 0.0

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        self.steps = self.left = steps
        self.start = time.process_time()

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.seconds.append(time.process_time() - self.start)

    def epoch(self, record: dict[str, object]) -> None:
        self.left, self.start = self.steps, time.process_time()


def share(recipe: Recipe, store: Store) -> tuple[float, float]:
    """CPU seconds of loading an epoch of the first stage, and of the whole training epoch."""
    stage = recipe.stages[0].model_copy(update={"epochs": 5})
    preprocessor = Preprocessor.from_store(store)
    tasks = Learner(recipe).resolve(store, stage)[0]
    size = recipe.train.batch_size
    loaders = {t.name: Loader(store, preprocessor, t, store.indices(t.name, "train"), size) for t in tasks}
    loading = []
    for epoch in range(5):
        start = time.process_time()
        for _ in steps(loaders, recipe.train.sampling, recipe.train.temperature, np.random.default_rng(epoch)):
            pass
        loading.append(time.process_time() - start)
    watch = Stopwatch()
    Learner(recipe).learn(store, stage, monitor=watch)
    return statistics.median(loading), statistics.median(watch.seconds)


def peak(store: str) -> tuple[float, float]:
    """Largest own (anonymous) and largest whole resident megabytes while every training batch of every task is made."""
    opened = Store.open(store)
    preprocessor = Preprocessor.from_store(opened)
    own = 0.0
    for task in opened.tasks.values():
        batches = Loader(opened, preprocessor, task, opened.indices(task.name, "train"), 64).batches()
        for number, _ in enumerate(batches):
            if number % 8 == 0:
                own = max(own, _anonymous())
    return own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _anonymous() -> float:
    """Megabytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def memory() -> None:
    """Print peak memory and store size for a small and a large generated store."""
    from flame_moe.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        for samples in SAMPLES:
            store = prepare("clinic", None, Path(folder) / str(samples), options={"samples": samples})
            size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()) / 2**20
            done = subprocess.run([sys.executable, __file__, "peak", str(store.path)], capture_output=True, text=True)
            own, whole = map(float, done.stdout.split())
            print(f"clinic, {samples} per cohort: store {size:.0f} MB, own {own:.0f} MB, with files {whole:.0f} MB")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments[:1] == ["peak"]:
        print(*peak(arguments[1]))
        return
    store, name = arguments if arguments else (None, "digits")
    recipe = load_recipe(name)
    load, whole = share(recipe, open_store(recipe, store))
    print(f"{recipe.name}: loading {load:.2f} s of {whole:.2f} s CPU per epoch, {load / whole:.1%}")
    if not arguments:
        memory()


if __name__ == "__main__":
    main(sys.argv[1:])
