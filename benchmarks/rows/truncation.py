"""Compressing a stage: how good, how fast, and whether the identities behind it hold."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Measured, Row, Settings, alternate, faster, seconds
from benchmarks.ours import fill
from benchmarks.published.moe import Expert
from flame_moe.continual.moments import Moment
from flame_moe.continual.spectra import by_inputs, by_singular_values, energy_of
from flame_moe.continual.truncation import Mode, Plan, truncate
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import Routing
from flame_moe.nn.moe import Sequences, mixture

WIDTH, HIDDEN, KERNEL, RANK = 128, 256, 3, 32
SEQUENCES, LENGTH, STEPS, LR = 16, 16, 500, 1e-3
NAMES = ("conv", "fc1", "fc2")


class Sums:
    """The second moment of the inputs of the one matrix of a stack."""

    def __init__(self, width: int) -> None:
        self.count, self.first = 0, torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64)

    def rows(self, which: int | None, x: Tensor) -> None:
        x = x.double()
        self.count += len(x)
        self.first += x.sum(0)
        self.second += x.T @ x

    def picks(self, index: Tensor) -> None:
        raise NotImplementedError("an expert has no table")

    def moment(self) -> Moment:
        seen = torch.tensor([float(self.count)])
        return Moment(seen, self.first[None] / self.count, self.second[None] / self.count)


def _run(pool: ExpertPool, x: Tensor, cursor: int) -> Tensor:
    n = len(x)
    one = torch.ones(n, 1)
    way = {"x": Routing(torch.zeros(n, 1, dtype=torch.long), one, one, one.sum(0))}
    return mixture({"x": Sequences(x, torch.ones(x.shape[:2], dtype=torch.bool))}, way, pool, cursor)["x"]


def learned(rank: int, seed: int) -> tuple[ExpertPool, Callable[[], Tensor]]:
    """An expert whose update was trained on a new task, and inputs like those that it was trained on.

    The inputs lie in `rank` directions, of which each varies less than the one before, down to a tenth, and vary a
    little in all others. The task is a network of one hidden layer of 64.
    """
    torch.manual_seed(seed)
    spread = torch.logspace(0, -1, rank)
    basis = torch.linalg.qr(torch.randn(WIDTH, rank)).Q * (WIDTH / spread.square().sum()).sqrt() * spread
    up, down = torch.randn(WIDTH, 64) * WIDTH**-0.5, torch.randn(64, WIDTH) * 64**-0.5

    def inputs() -> Tensor:
        return torch.randn(SEQUENCES, LENGTH, rank) @ basis.T + 0.01 * torch.randn(SEQUENCES, LENGTH, WIDTH)

    pool = fill(ExpertPool(1, WIDTH, HIDDEN, KERNEL, 0.0), [Expert(WIDTH, HIDDEN, KERNEL, 0.0)])
    matrices = [getattr(pool, name) for name in NAMES]
    pool.requires_grad_(False)
    for matrix in matrices:
        matrix.grow(1)
    optimizer = torch.optim.AdamW([p for m in matrices for p in m.active()], lr=LR, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        x = inputs()
        (_run(pool, x, 1) - torch.tanh(x @ up) @ down).square().mean().backward()
        optimizer.step()
    return pool.eval(), inputs


@torch.no_grad()
def errors(pool: ExpertPool, inputs: Callable[[], Tensor]) -> dict[Mode, float]:
    """||f_kept - f|| / ||f - f_before|| on inputs that nothing was fitted to, for either way of truncating."""
    sums = {name: Sums(getattr(pool, name).shape[-1]) for name in NAMES}
    for name, each in sums.items():
        getattr(pool, name).observer = each
    for _ in range(20):
        _run(pool, inputs(), 1)
    for name in NAMES:
        getattr(pool, name).observer = None
    deltas = {name: getattr(pool, name).update() for name in NAMES}
    moments = {name: each.moment() for name, each in sums.items()}
    held = [inputs() for _ in range(10)]
    whole, before = (torch.cat([_run(pool, x, cursor) for x in held]) for cursor in (1, 0))
    found: dict[Mode, float] = {}
    modes: tuple[Mode, ...] = ("weight", "activation")
    for mode in modes:
        kept = copy.deepcopy(pool)
        for name, got in truncate(deltas, Plan(mode=mode, rank=RANK), moments).items():
            getattr(kept, name).compress(got.part)
        out = torch.cat([_run(kept, x, 1) for x in held])
        found[mode] = float((out - whole).norm() / (whole - before).norm())
    return found


def quality(settings: Settings) -> Iterator[Measured]:
    """Three seeds; the mean error of each way, as the published figures are."""
    for rank, gate in ((12, 3.5), (48, 2.2)):
        found = [errors(*learned(rank, seed)) for seed in range(3)]
        plain, aware = (statistics.mean(f[mode] for f in found) for mode in ("weight", "activation"))
        note = f"error of the outputs at rank {RANK}, relative to the update"
        yield Measured(f"trunc-quality/inputs-{rank}", "error", aware, plain, plain / aware, gate, note=note)


def _moment(matrices: int, width: int) -> Moment:
    x = torch.randn(matrices, 2 * width, width, dtype=torch.float64)
    return Moment(torch.full((matrices,), 2.0 * width), x.mean(1), x.transpose(1, 2) @ x / (2 * width))


def speed(settings: Settings) -> Iterator[Measured]:
    """Sixty-four kernels, aware of their inputs, against a loop of singular value decompositions in float32."""
    torch.manual_seed(0)
    delta, moment = torch.randn(64, 128, 384), _moment(64, 384)
    plan = Plan(mode="activation", rank=RANK)

    def theirs() -> list[Tensor]:
        parts = (torch.linalg.svd(d, full_matrices=False) for d in delta)
        return [(u[:, :RANK] * s[:RANK]) @ vh[:RANK] for u, s, vh in parts]

    sides = alternate(lambda: truncate({"w": delta}, plan, {"w": moment}), theirs, settings.rounds)
    yield faster("trunc-time", sides, 1.0, "ours finds the error of what it keeps as well")


def commit(settings: Settings) -> Iterator[Measured]:
    """Every matrix of a pool of 64 experts, hidden width as the width, truncated aware of its inputs."""
    for width, gate in ((128, 1.0), (512, 10.0)):
        torch.manual_seed(0)
        shapes = {"conv": (64, width, KERNEL * width), "fc1": (64, width, width), "fc2": (64, width, width)}
        deltas = {name: torch.randn(shape) for name, shape in shapes.items()}
        moments = {name: _moment(64, shape[-1]) for name, shape in shapes.items()}
        plan = Plan(mode="activation", rank=RANK)
        took = seconds(partial(truncate, deltas, plan, moments))
        yield Measured(f"commit-time/{width}", "s", took, None, took, gate, most=True, note="one thread")


def identities(settings: Settings) -> Iterator[Measured]:
    """The largest relative gap of what has to be equal, in float64 on random data."""
    torch.manual_seed(0)
    w = torch.randn(96, 128, dtype=torch.float64)
    x = torch.randn(400, 20, dtype=torch.float64) @ torch.randn(20, 128, dtype=torch.float64)
    x += 0.1 * torch.randn(400, 128, dtype=torch.float64)
    c, mean = x.T @ x / len(x), x.mean(0)
    whole = energy_of(w, c)
    _, s, vh = torch.linalg.svd(w, full_matrices=False)
    values, vectors = torch.linalg.eigh(c)
    by_weight = s.square() * torch.einsum("ki,ij,kj->k", vh, c, vh)
    by_input = values * (w @ vectors).square().sum(0)
    gaps = {"Eq. 2": max(abs(float(part.sum()) - whole) for part in (by_weight, by_input)) / whole}
    plain, aware = by_singular_values(w), by_inputs(w, mean, c)
    errors, discarded = [], []
    for r in (8, 32, 64):
        lost = w - plain.at(r).dense()
        errors.append(abs(energy_of(lost, c) - float(by_weight[r:].sum())) / whole)
        discarded.append(abs(energy_of(w - aware.at(r).dense(), c) - float(aware.error[r])) / whole)
    gaps |= {"plain error": max(errors), "aware error": max(discarded)}
    tail = values[:-20].sum()
    outside = energy_of(w @ vectors[:, :-20] @ vectors[:, :-20].T, c)
    bound = float(s[0].square() * tail)
    gaps["Prop. 1"] = max(0.0, outside - bound) / whole
    note = ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items())
    yield Measured("identities", "gap", max(gaps.values()), None, max(gaps.values()), 1e-10, most=True, note=note)


ROWS: dict[str, Row] = {
    "trunc-quality": quality,
    "trunc-time": speed,
    "commit-time": commit,
    "identities": identities,
}
