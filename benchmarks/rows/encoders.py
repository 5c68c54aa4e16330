"""Time attention over irregular series: the factorised form against the published expanded one.

    python -m benchmarks.rows.encoders ours|theirs

prints the megabytes by which the process grows in one training step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Measured, Row, Settings, Unavailable, alternate, child, faster, insist_equal
from benchmarks.ours import time_attention
from benchmarks.published.attention import TimeAttention
from flame_moe.training.memory import PeakMemory

SIZE, LENGTH, CHANNELS = 8, 500, 60
WIDTH, STEPS, HEADS, TIME_WIDTH, DROPOUT = 128, 48, 8, 64, 0.1


class Side(NamedTuple):
    """A module, and its forward pass over the batch."""

    module: nn.Module
    forward: Callable[[], Tensor]

    def step(self) -> None:
        """Forward and backward."""
        self.module.zero_grad(set_to_none=True)
        self.forward().square().mean().backward()


def sides(size: int = SIZE, length: int = LENGTH, device: str = "cpu") -> dict[str, Side]:
    """Both with the same weights, in training mode; a third of the cells is observed, one channel never is."""
    torch.manual_seed(0)
    observed = torch.rand(size, length, CHANNELS) < 0.3
    observed[..., 0] = False
    values = torch.randn(size, length, CHANNELS).masked_fill(~observed, 0.0)
    times, mask = torch.rand(size, length).sort(dim=1).values, observed.float()
    values, times, mask, observed = (t.to(device) for t in (values, times, mask, observed))
    theirs = TimeAttention(CHANNELS, WIDTH, STEPS, HEADS, TIME_WIDTH, DROPOUT).to(device)
    ours = time_attention(theirs, CHANNELS, WIDTH, TIME_WIDTH).to(device)
    return {
        "ours": Side(ours, lambda: ours(values, times, observed, 0)),
        "theirs": Side(theirs, lambda: theirs(values, times, mask)),
    }


def check(ours: Side, theirs: Side) -> None:
    """Outputs and gradients, without the dropout, which falls on different tensors."""
    for side in (ours, theirs):
        side.module.eval()
        side.step()
    with torch.no_grad():
        insist_equal("time attention", ours.forward(), theirs.forward())
    for name in ("query", "key", "out"):
        got, want = getattr(ours.module, name).weight.base.grad, getattr(theirs.module, name).weight.grad
        insist_equal(f"gradient of {name}", got[:, : want.shape[1]], want, relative=2e-4)
    for side in (ours, theirs):
        side.module.train()


def row(settings: Settings) -> Iterator[Measured]:
    """Training step: time, and memory beyond what the process holds after a step on a tiny batch."""
    found = sides()
    ours, theirs = found["ours"], found["theirs"]
    check(ours, theirs)
    yield faster("series-encoder/time", alternate(ours.step, theirs.step, min(settings.rounds, 3)), 10.0)
    mine, other = (float(child("benchmarks.rows.encoders", side)) for side in ("ours", "theirs"))
    if not mine or not other:
        raise Unavailable("this system does not tell a process's peak memory")
    yield Measured("series-encoder/memory", "MB", mine, other, other / mine, 20.0)


def growth(name: str) -> float:
    """Megabytes by which this process grows in a training step."""
    sides(1, 10)[name].step()
    side = sides()[name]
    peak = PeakMemory()
    before = peak.bytes
    side.step()
    after = peak.bytes
    return 0.0 if before is None or after is None else (after - before) / 2**20


ROWS: dict[str, Row] = {"series-encoder": row}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(growth(sys.argv[1]))
