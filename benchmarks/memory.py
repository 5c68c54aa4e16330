"""Whether the memory of loading grows with the data set.

    python -m benchmarks.memory

Peak of a fresh process that makes every training batch of a generated `clinic` store, for stores of growing size.
Pages of mapped files are the system's to drop, so the process's own memory (anonymous pages, `RssAnon` of Linux) is
told apart from them; `own` must not grow with the store.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.epoch import memory
from benchmarks.harness import child
from flame_moe.data.loader import Loader
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store

SAMPLES = (500, 4000, 16000)


def peak(store: str) -> tuple[float, float]:
    """Largest own (anonymous) and largest whole resident megabytes while every training batch of every task is made."""
    opened = Store.open(store)
    preprocessor = Preprocessor.from_store(opened)
    own = 0.0
    for task in opened.tasks.values():
        batches = Loader(opened, preprocessor, task, opened.indices(task.name, "train"), 64).batches()
        for number, _ in enumerate(batches):
            if number % 8 == 0:
                own = max(own, memory("RssAnon"))
    return own, memory("VmHWM")


def sizes() -> None:
    """Print peak memory and store size for a small and a large generated store."""
    from flame_moe.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        for samples in SAMPLES:
            store = prepare("clinic", None, Path(folder) / str(samples), options={"samples": samples})
            size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()) / 2**20
            own, whole = map(float, child("benchmarks.memory", "peak", str(store.path)).split())
            print(f"clinic, {samples} per cohort: store {size:.0f} MB, own {own:.0f} MB, with files {whole:.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(*peak(sys.argv[2]))
    else:
        sizes()
