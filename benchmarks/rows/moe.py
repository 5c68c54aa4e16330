"""The mixture of experts: routers, dispatch, experts and auxiliary losses of one block, against the published loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Measured, Settings, alternate, faster, insist_equal, saved_bytes
from benchmarks.ours import Mixture, flat_kernel
from benchmarks.published.moe import SeqMoE
from flame_moe.nn.moe import Sequences

WIDTH = 128
WORKLOADS = {"embed4": (1,) * 4, "mimic3": (48,) * 3, "mixed5": (1, 16, 48, 128, 256)}
"""Lengths of the sequences of each modality."""
BATCHES = 4
WARM = 15
"""Steps before step times under noisy routing are looked at: every new number of rows is prepared for once."""


class Pair(NamedTuple):
    """Both sides with the same weights, and the same batches in the layout of each."""

    ours: Mixture
    theirs: SeqMoE
    batches: list[dict[str, Tensor]]

    def for_ours(self) -> list[dict[str, Sequences]]:
        """Batch first, nothing padded."""
        return [
            {
                n: Sequences(
                    x.transpose(0, 1).contiguous(), torch.ones(x.shape[1::-1], dtype=torch.bool, device=x.device)
                )
                for n, x in b.items()
            }
            for b in self.batches
        ]


def pair(workload: str, size: int, batches: int = BATCHES) -> Pair:
    """Sides of one workload, checked to compute the same."""
    torch.manual_seed(0)
    lengths = {f"m{i}": steps for i, steps in enumerate(WORKLOADS[workload])}
    theirs = SeqMoE(list(lengths), width=WIDTH)
    made = Pair(
        Mixture(theirs, width=WIDTH),
        theirs,
        [{name: torch.randn(steps, size, WIDTH) for name, steps in lengths.items()} for _ in range(batches)],
    )
    check(made, f"{workload}, {size}")
    return made


def check(sides: Pair, name: str, atol: float = 2e-5) -> None:
    """Outputs, auxiliary loss, and gradients of inputs and experts, in evaluation mode, where nothing is drawn."""
    theirs = {n: x.clone().requires_grad_() for n, x in sides.batches[0].items()}
    ours = {n: s.x.clone().requires_grad_() for n, s in sides.for_ours()[0].items()}
    sides.theirs.eval()
    sides.ours.eval()
    want, want_aux = sides.theirs(theirs)
    masks = {n: s.mask for n, s in sides.for_ours()[0].items()}
    got, aux = sides.ours({n: Sequences(x, masks[n]) for n, x in ours.items()})
    insist_equal(f"{name}: auxiliary loss", aux, want_aux, atol=atol)
    for n in want:
        insist_equal(f"{name}: output of {n}", got[n].transpose(0, 1), want[n], atol=atol)
    for out, extra in ((want, want_aux), (got, aux)):
        torch.stack([(y * y.cos()).sum() for y in out.values()]).sum().add(extra).backward()
    for n in want:
        insist_equal(f"{name}: gradient of {n}", ours[n].grad.transpose(0, 1), theirs[n].grad, relative=2e-4)
    experts, pool = sides.theirs.experts, sides.ours.block.pool
    for what, got_grad, want_grad in (
        ("kernels", pool.conv.base.grad, torch.stack([flat_kernel(e.conv.weight.grad) for e in experts])),
        ("first maps", pool.fc1.base.grad, torch.stack([e.fc1.weight.grad for e in experts])),
        ("second maps", pool.fc2.base.grad, torch.stack([e.fc2.weight.grad for e in experts])),
        ("norms", pool.norm_weight.at(0).grad, torch.stack([e.norm.weight.grad for e in experts])),
    ):
        insist_equal(f"{name}: gradient of {what}", got_grad, want_grad, relative=2e-4)


def forward(model: torch.nn.Module, batches: list) -> Callable[[], object]:
    """Evaluation mode, without gradients, one batch after the other."""
    model.eval()
    turn = cycle(batches)

    def call() -> object:
        with torch.no_grad():
            return model(next(turn))

    return call


def step(model: torch.nn.Module, batches: list) -> Callable[[], None]:
    """Forward and backward in training mode, noise and dropout on."""
    model.train()
    turn = cycle(batches)

    def call() -> None:
        model.zero_grad(set_to_none=True)
        _loss(model(next(turn))).backward()

    return call


def _loss(result: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    out, aux = result
    return torch.stack([y.float().square().mean() for y in out.values()]).sum() + aux


def infer(name: str, workload: str, size: int, gate: float) -> Callable[[Settings], Iterator[Measured]]:
    def row(settings: Settings) -> Iterator[Measured]:
        sides = pair(workload, size)
        ours, theirs = forward(sides.ours, sides.for_ours()), forward(sides.theirs, sides.batches)
        yield faster(f"{name}/{workload}-{size}", alternate(ours, theirs, settings.rounds), gate)

    return row


def train(name: str, workload: str, size: int, gate: float) -> Callable[[Settings], Iterator[Measured]]:
    def row(settings: Settings) -> Iterator[Measured]:
        sides = pair(workload, size)
        ours, theirs = step(sides.ours, sides.for_ours()), step(sides.theirs, sides.batches)
        yield faster(f"{name}/{workload}-{size}", alternate(ours, theirs, settings.rounds), gate)

    return row


def both(*rows: Callable[[Settings], Iterator[Measured]]) -> Callable[[Settings], Iterator[Measured]]:
    """One row of several cases."""

    def row(settings: Settings) -> Iterator[Measured]:
        for each in rows:
            yield from each(settings)

    return row


def memory(settings: Settings) -> Iterator[Measured]:
    """Bytes saved for backward, each memory once, without parameters and without the inputs that both are given."""
    sides = pair("mimic3", 512, 1)
    sides.ours.train()
    sides.theirs.train()
    theirs = {n: x.requires_grad_() for n, x in sides.batches[0].items()}
    want = saved_bytes(lambda: sides.theirs(theirs), sides.theirs) / 2**20
    ours = {n: Sequences(s.x.detach().requires_grad_(), s.mask) for n, s in sides.for_ours()[0].items()}
    got = saved_bytes(lambda: sides.ours(ours), sides.ours) / 2**20
    yield Measured("moe-train-memory", "MB", got, want, want / got, 2.5)


def bf16(settings: Settings) -> Iterator[Measured]:
    """Both under autocast to bfloat16; ours has to route as it does in float32."""
    sides = pair("mimic3", 128)
    batches = sides.for_ours()
    sides.ours.eval()
    sides.theirs.eval()
    with torch.no_grad():
        plain = [sides.ours.route(b) for b in batches]
        with torch.autocast("cpu", torch.bfloat16):
            cast = [sides.ours.route(b) for b in batches]
            error = max(
                float((sides.ours(b)[0][n].float() - y).abs().max()) for b in batches[:1] for n, y in _exact(sides, b)
            )
    flips = sum(int((a[n].chosen != b[n].chosen).sum()) for a, b in zip(plain, cast, strict=True) for n in a)
    ours, theirs = (forward(m, b) for m, b in ((sides.ours, batches), (sides.theirs, sides.batches)))

    def under(call: Callable[[], object]) -> Callable[[], object]:
        def wrapped() -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return call()

        return wrapped

    found = alternate(under(ours), under(theirs), settings.rounds)
    note = f"{flips} experts chosen differently, largest error {error:.1e}"
    yield faster("moe-bf16-infer", found, 1.2, note)
    yield Measured("moe-bf16-infer/flips", "experts", flips, None, flips, 0.0, most=True)


def _exact(sides: Pair, batch: dict[str, Sequences]) -> list[tuple[str, Tensor]]:
    with torch.autocast("cpu", enabled=False):
        return list(sides.ours(batch)[0].items())


def stability(settings: Settings) -> Iterator[Measured]:
    """Median step under noisy routing over the median step of the same batch drawn in the same way every time."""
    sides = pair("embed4", 512)
    batches = sides.for_ours()
    noisy, fixed = step(sides.ours, batches), step(sides.ours, batches[:1])
    for call in (noisy, fixed):
        for _ in range(WARM):
            torch.manual_seed(1)
            call()
    took: dict[str, list[float]] = {"noisy": [], "fixed": []}
    for number in range(10 * settings.rounds):
        for name, call in (("noisy", noisy), ("fixed", fixed)):
            torch.manual_seed(number if name == "noisy" else 0)
            start = time.process_time()
            call()
            took[name].append(time.process_time() - start)
    noise, calm = (1e3 * statistics.median(took[name]) for name in ("noisy", "fixed"))
    yield Measured("shape-stability", "ms", noise, calm, noise / calm, 1.1, most=True, note="noisy over fixed routing")


ROWS: dict[str, Callable[[Settings], Iterator[Measured]]] = {
    "moe-infer-small": infer("moe-infer-small", "embed4", 8, 5.0),
    "moe-infer-embed": infer("moe-infer-embed", "embed4", 512, 2.3),
    "moe-infer-mimic": both(infer("moe-infer-mimic", "mimic3", 8, 1.7), infer("moe-infer-mimic", "mimic3", 128, 1.4)),
    "moe-infer-ragged": infer("moe-infer-ragged", "mixed5", 32, 1.6),
    "moe-train-small": train("moe-train-small", "embed4", 8, 3.8),
    "moe-train-embed": train("moe-train-embed", "embed4", 512, 2.4),
    "moe-train-mimic": both(train("moe-train-mimic", "mimic3", 8, 1.6), train("moe-train-mimic", "mimic3", 128, 1.35)),
    "moe-train-ragged": train("moe-train-ragged", "mixed5", 32, 1.5),
    "moe-train-memory": memory,
    "moe-bf16-infer": bf16,
    "shape-stability": stability,
}
