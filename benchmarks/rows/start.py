"""How long it takes to begin: importing the package, and from the command to the first batch.

    python -m benchmarks.rows.start RECIPE STORE OUT

runs the command `flame run` until the first batch reaches the model and prints the processor time of the process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Measured, Row, Settings, child

RUNS = 5


def importing(settings: Settings) -> Iterator[Measured]:
    """`import torch, flame_moe`, and with every public name used, beyond `import torch` alone."""
    everything = "import torch, flame_moe; [getattr(flame_moe, name) for name in flame_moe.__all__]"
    codes = {"torch": "import torch", "import": "import torch, flame_moe", "names": everything}
    took: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(RUNS + 1):
        for name, code in codes.items():
            took[name].append(_process(code))
    base, bare, every = (statistics.median(runs[1:]) for runs in took.values())
    extra = bare - base
    yield Measured("start-import", "s", bare, base, extra, 0.5, most=True, note="value: beyond import torch")
    note = "all public names used; value: beyond import torch"
    yield Measured("start-import/names", "s", every, base, every - base, None, note=note)


def _process(code: str) -> float:
    """Processor seconds, of user and system, of a Python process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def first_batch(settings: Settings) -> Iterator[Measured]:
    """From the start of the process, its imports included."""
    from flame_moe.data.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="flame-start-") as place:
        store = str(prepare("digits", None, Path(place) / "store").path)
        took = []
        for number in range(RUNS):
            said = child("benchmarks.rows.start", "digits", store, f"{place}/run{number}")
            took.append(float(said.splitlines()[-1]))
    took = took[1:]
    yield Measured("start-batch", "s", statistics.median(took), None, statistics.median(took), 2.0, most=True)


def main(recipe: str, store: str, out: str) -> None:
    """The command, ended when the first batch arrives."""
    from flame_moe import cli
    from flame_moe.nn.model import Flame

    def arrive(self: Flame, *batch: Any) -> None:
        print(time.process_time(), flush=True)
        os._exit(0)

    Flame.forward = arrive  # type: ignore[assignment,method-assign] - the process ends with it
    sys.argv = ["flame", "run", recipe, out, "--store", store]
    cli.main()


ROWS: dict[str, Row] = {"start-import": importing, "start-batch": first_batch}

if __name__ == "__main__":
    main(*sys.argv[1:])
