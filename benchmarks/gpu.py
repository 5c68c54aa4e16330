"""What the package does on a GPU: against the published design, and against dense products of as many operations.

    python -m benchmarks.gpu [--rounds N] [--out FILE]

Time is wall time between two points at which the device has nothing left to do. Before anything is timed, outputs and
gradients of both sides have to agree on the device, and the forward and backward pass run in the mode of PyTorch in
which whatever waits for the device is an error.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.__main__ import line
from benchmarks.harness import Measured, Sides, alternate, insist_equal
from benchmarks.rows import encoders, moe
from flame_moe.data.loader import to_device
from flame_moe.environment import environment
from flame_moe.files import write_text
from flame_moe.nn.stacked import StackedMatrix

DEVICE = "cuda"
CASES = (
    ("embed4", 8),
    ("embed4", 512),
    ("mimic3", 8),
    ("mimic3", 128),
    ("mimic3", 1024),
    ("mixed5", 32),
    ("mixed5", 256),
)
STAGES = (1, 4, 16)
SINGLE, HALF = torch.float32, torch.bfloat16
APART = 2e-4
"""Most by which outputs of both sides may differ in float32: the sums of a GPU are longer apart than a processor's."""


def clock() -> float:
    """Seconds, once the device has done everything."""
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def unwaiting() -> Iterator[None]:
    """Let every wait for the device be an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def under(kind: torch.dtype, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == HALF):
            return call()

    return run


def pair(workload: str, size: int) -> moe.Pair:
    """Both sides on the device, checked there: the outputs in float32, and that ours waits for nothing."""
    made = moe.pair(workload, size)
    sides = moe.Pair(
        made.ours.to(DEVICE),
        made.theirs.to(DEVICE),
        [{name: x.to(DEVICE) for name, x in batch.items()} for batch in made.batches],
    )
    moe.check(sides, f"{workload}, {size}, on the device", atol=APART)
    ours = sides.for_ours()
    for call in (moe.forward(sides.ours, ours), moe.step(sides.ours, ours)):
        call()
        with unwaiting():
            call()
    return sides


def dense(sides: moe.Pair, kind: torch.dtype, training: bool) -> Callable[[], object]:
    """As many multiplications as the experts do, in three products of all routed rows with one matrix each."""
    pool = sides.ours.block.pool
    assert pool is not None
    rows = sum(x.shape[0] * x.shape[1] for x in sides.batches[0].values()) * sides.ours.block.config.top_k
    single = all(len(x) == 1 for x in sides.batches[0].values())
    width, hidden, taps = pool.width, pool.fc1.shape[1], 1 if single else pool.kernel
    shapes = ((taps * width, width), (width, hidden), (hidden, width))
    held = [
        (torch.randn(rows, i, device=DEVICE, dtype=kind), torch.randn(i, o, device=DEVICE, dtype=kind))
        for i, o in shapes
    ]
    given = [torch.randn(rows, o, device=DEVICE, dtype=kind) for _, o in shapes]

    def call() -> None:
        for (x, w), g in zip(held, given, strict=True):
            x @ w
            if training:
                g @ w.T
                x.T @ g

    return call


def mixture() -> Iterator[Measured]:
    for workload, size in CASES:
        sides = pair(workload, size)
        for kind in (SINGLE, HALF):
            for training in (False, True):
                make = moe.step if training else moe.forward
                name = f"gpu-moe-{'train' if training else 'infer'}/{workload}-{size}/{short(kind)}"
                ours = under(kind, make(sides.ours, sides.for_ours()))
                theirs = under(kind, make(sides.theirs, sides.batches))
                found = alternate(ours, theirs, ROUNDS, clock)
                floor = alternate(dense(sides, kind, training), ours, ROUNDS, clock)
                note = f"dense products alone {1e3 * floor.ours:.3g} ms, {100 / floor.ratio:.0f} % of ours"
                yield compared(name, found, note)
        torch.cuda.empty_cache()


def series() -> Iterator[Measured]:
    """A training step of time attention: 8 samples of 500 observations of 60 channels."""
    found = encoders.sides(device=DEVICE)
    ours, theirs = found["ours"], found["theirs"]
    encoders.check(ours, theirs)
    with unwaiting():
        ours.step()
    yield compared("gpu-series-encoder", alternate(ours.step, theirs.step, ROUNDS, clock))
    mine, other = (peak(side.step) for side in (ours, theirs))
    yield Measured("gpu-series-encoder/memory", "MB", mine, other, other / mine, None)


def peak(step: Callable[[], object]) -> float:
    """Megabytes that a step takes beyond what is held already."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def stages() -> Iterator[Measured]:
    """The whole model after 1, 4 and 16 stages over one that never had a stage, and that it waits for nothing."""
    part = to_device(models.batch(), torch.device(DEVICE))
    for count in STAGES:
        net, plain = models.model(), models.model()
        models.learn(net, count)
        agree(net, count - 1)
        net, plain = net.to(DEVICE), plain.to(DEVICE)
        calls = models.inference(net, part, count - 1), models.inference(plain, part, 0)
        calls[0]()
        with unwaiting():
            calls[0]()
        yield slower(f"gpu-stages-infer/{count}", alternate(*calls, ROUNDS, clock))
        models.begin(net, count)
        net.to(DEVICE)
        calls = models.training_step(net, part, count), models.training_step(plain, part, 0)
        calls[0]()
        with unwaiting():
            calls[0]()
        yield slower(f"gpu-stages-train/{count}", alternate(*calls, ROUNDS, clock))


def agree(net: nn.Module, cursor: int) -> None:
    """Insist that the device says what the processor says."""
    net.eval()
    part = models.batch()
    with torch.no_grad():
        want = net(part, cursor).logits
        got = net.to(DEVICE)(to_device(part, torch.device(DEVICE)), cursor).logits.cpu()
    insist_equal("logits of processor and device", got, want, atol=1e-4)


def forget_zero() -> Iterator[Measured]:
    """Logits at every stage's cursor before and after all later stages, on the device."""
    net, part = models.model().to(DEVICE).eval(), to_device(models.batch(), torch.device(DEVICE))
    seen: dict[int, Tensor] = {}
    changed = 0
    for stage in range(max(STAGES)):
        if stage:
            with torch.no_grad():
                models.grow(net, stage)
                for _, weight in net.growables(models.TASK.modalities):
                    weight.commit(models.by_weight(models.RANK) if isinstance(weight, StackedMatrix) else None)
        net.to(DEVICE)
        with torch.no_grad():
            seen[stage] = net(part, stage).logits.clone()
            changed += sum(int((net(part, s).logits != logits).sum()) for s, logits in seen.items())
    yield Measured("gpu-cl-forget-zero", "numbers", changed, None, changed, 0.0, most=True)


def compared(name: str, sides: Sides, note: str = "") -> Measured:
    return Measured(name, "ms", 1e3 * sides.ours, 1e3 * sides.theirs, sides.ratio, None, note=note)


def slower(name: str, sides: Sides) -> Measured:
    return Measured(name, "ms", 1e3 * sides.ours, 1e3 * sides.theirs, 1 / sides.ratio, 1.05, most=True)


def short(kind: torch.dtype) -> str:
    return "bf16" if kind == HALF else "fp32"


def ceilings() -> dict[str, str]:
    """What the card reaches here: a large product of each type, and a large copy."""
    found = {}
    for kind in (SINGLE, HALF):
        x = torch.randn(8192, 8192, device=DEVICE, dtype=kind)
        took = best(lambda x=x: x @ x)
        found[f"{short(kind)} product"] = f"{2 * 8192**3 / took / 1e12:.0f} TFLOP/s"
    x = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    found["copy"] = f"{2 * 2**30 / best(lambda: y.copy_(x)) / 1e12:.2f} TB/s"
    return found


def best(call: Callable[[], object]) -> float:
    call()
    took = []
    for _ in range(10):
        start = clock()
        call()
        took.append(clock() - start)
    return min(took)


ROUNDS = 7


def main() -> None:
    global ROUNDS
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns that two sides take")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "PyTorch finds no CUDA device: nothing was measured\n")
    ROUNDS = chosen.rounds
    torch.set_num_threads(1)
    about: dict[str, Any] = {**environment().plain(), **ceilings()}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    found = []
    for part in (forget_zero, stages, series, mixture):
        try:
            for measured in part():
                print(line(measured), flush=True)
                found.append(measured.plain())
        except (AssertionError, RuntimeError) as error:
            print(f"{part.__name__} broke: {error}", flush=True)
            found.append({"name": part.__name__, "broke": str(error)})
    if chosen.out is not None:
        write_text(chosen.out, json.dumps({"machine": about, "rounds": ROUNDS, "rows": found}, indent=1) + "\n")
    sys.exit(1 if any("broke" in row or row["passed"] is False for row in found) else 0)


if __name__ == "__main__":
    main()
