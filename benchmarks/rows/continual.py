"""What stages cost: one expert against the published stacks, the whole model against one that never had a stage."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.harness import Measured, Row, Settings, alternate, faster, insist_equal, no_slower
from benchmarks.ours import fill
from benchmarks.published.moe import Expert
from benchmarks.published.stacks import LowRankExpert, StackedExpertMLP, TruncatedExpert
from flame_moe.continual.truncation import by_weight
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import Routing
from flame_moe.nn.moe import Sequences, mixture, mixtures
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import StackedMatrix, growables

WIDTH, HIDDEN, KERNEL, DROPOUT = 128, 256, 3, 0.1
STAGES, RANK = 16, 32
SEQUENCES, LENGTH = 16, 48
NAMES = ("conv", "fc1", "fc2")


def _expert() -> Expert:
    return Expert(WIDTH, HIDDEN, KERNEL, DROPOUT)


class OneExpert(nn.Module):
    """A pool of one expert, to which every sequence goes."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.pool = fill(ExpertPool(1, WIDTH, HIDDEN, KERNEL, DROPOUT), [expert])
        self.mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
        one = torch.ones(SEQUENCES, 1)
        self.way = {"x": Routing(torch.zeros(SEQUENCES, 1, dtype=torch.long), one, one, one.sum(0))}

    def forward(self, x: Tensor, cursor: int) -> Tensor:
        return mixture({"x": Sequences(x, self.mask)}, self.way, self.pool, cursor)["x"]

    @torch.no_grad()
    def learn(self, stages: int) -> None:
        """Random updates of the stages after the first, cut to rank."""
        for stage in range(1, stages):
            for matrix in (getattr(self.pool, name) for name in NAMES):
                matrix.grow(stage)
                matrix.delta.normal_(std=0.02)
                matrix.commit(by_weight(RANK))

    def as_low_rank(self, expert: Expert) -> LowRankExpert:
        """The same function as published: factors beside a base, summed in every call."""
        factors: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in NAMES}
        for name in NAMES:
            matrix = getattr(self.pool, name)
            for stage in matrix.stages:
                part = matrix.slice(stage)
                assert isinstance(part, LowRank)
                b = part.b[0]
                if name == "conv":
                    b = b.view(-1, KERNEL, WIDTH).transpose(1, 2).flatten(1)
                factors[name].append((part.a[0].clone(), b.clone()))
        return LowRankExpert(copy.deepcopy(expert), factors)


def three() -> tuple[OneExpert, LowRankExpert, StackedExpertMLP, Tensor]:
    """Ours and the published low-rank expert, which compute the same, and the published stack, which does not."""
    torch.manual_seed(0)
    first = _expert()
    ours = OneExpert(first)
    ours.learn(STAGES)
    same = ours.as_low_rank(first)
    stack = StackedExpertMLP([TruncatedExpert(_expert(), RANK) for _ in range(STAGES)])
    x = torch.randn(SEQUENCES, LENGTH, WIDTH)
    for cursor in (0, STAGES // 2, STAGES - 1):
        ours.eval()
        same.eval()
        insist_equal(f"one expert at stage {cursor}", ours(x, cursor), same(x, cursor))
    return ours, same, stack, x


def infer(settings: Settings) -> Iterator[Measured]:
    ours, same, stack, x = three()
    sides = [nn.Module.eval(side) for side in (ours, same, stack)]

    def call(side: nn.Module):
        def run() -> Tensor:
            with torch.inference_mode():
                return side(x, STAGES - 1)

        return run

    mine, low, whole = (call(side) for side in sides)
    yield faster("cl-infer-T16/stack", alternate(mine, whole, settings.rounds), 12.0, "another function")
    yield faster("cl-infer-T16/reconstruct", alternate(mine, low, settings.rounds), 1.8, "the same function")


def train(settings: Settings) -> Iterator[Measured]:
    """Stage 17 on top of 16: ours a dense update, the baseline a pair of factors, the published stack a new expert."""
    ours, same, stack, x = three()
    for part in growables(ours):
        part[1].grow(STAGES)
    for name in NAMES:
        base = getattr(same.base, name).weight
        out, width = base.flatten(1).shape
        pair = (torch.zeros(out, RANK), torch.randn(RANK, width) * width**-0.5)
        same.factors[name].extend(nn.Parameter(f) for f in pair)
    stack.components.append(_expert())
    last = stack.components[-1].fc2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)

    def call(side: nn.Module):
        side.train()
        held = [p for p in side.parameters() if p.requires_grad]

        def run() -> None:
            for p in held:
                p.grad = None
            side(x, STAGES).square().mean().backward()

        return run

    mine, low, whole = (call(side) for side in (ours, same, stack))
    yield faster("cl-train-T16/stack", alternate(mine, whole, settings.rounds), 10.0, "another function")
    yield faster("cl-train-T16/reconstruct", alternate(mine, low, settings.rounds), 1.2, "the same function")


def mixed(settings: Settings) -> Iterator[Measured]:
    """An expert after 16 stages, 512 tokens of 16 cursors in one pass, against one cursor after the other, each with
    its weights rebuilt."""
    ours, same, _, _ = three()
    parts = torch.randn(512, 1, WIDTH).split(512 // STAGES)
    asked = []
    for cursor, x in enumerate(parts):
        one = torch.ones(len(x), 1)
        way = Routing(torch.zeros(len(x), 1, dtype=torch.long), one, one, one.sum(0))
        asked.append(({"x": Sequences(x, torch.ones(len(x), 1, dtype=torch.bool))}, {"x": way}, cursor))

    def mine() -> list[Tensor]:
        return [said["x"] for said in mixtures(asked, ours.pool)]

    def theirs() -> list[Tensor]:
        return [same(x, cursor) for cursor, x in enumerate(parts)]

    ours.eval()
    same.eval()
    with torch.inference_mode():
        insist_equal("mixed cursors", torch.cat(mine()), torch.cat(theirs()))
        yield faster("cl-mixed-cursors", alternate(mine, theirs, settings.rounds), 6.0)


def forget_zero(settings: Settings) -> Iterator[Measured]:
    """Logits of every stage's cursor, before and after all later stages: how many numbers differ in a bit."""
    net, part = models.model(), models.batch()
    net.eval()
    found: dict[int, Tensor] = {}
    changed = 0
    with torch.inference_mode():
        for stage in range(STAGES):
            if stage:
                with torch.inference_mode(False):
                    models.grow(net, stage)
                    for _, weight in net.growables(models.TASK.modalities):
                        weight.commit(by_weight(RANK) if isinstance(weight, StackedMatrix) else None)
            found[stage] = net(part, stage).logits.clone()
            changed += sum(int((net(part, s).logits != logits).sum()) for s, logits in found.items())
    apart = len({tuple(logits.flatten().tolist()) for logits in found.values()})
    note = f"{apart} different outputs of {STAGES} stages"
    yield Measured("cl-forget-zero", "numbers", changed, None, changed, 0.0, most=True, note=note)


def free(settings: Settings) -> Iterator[Measured]:
    """Inference and training step of the whole model after 1, 4 and 16 stages, against one that never had a stage."""
    part = models.batch()
    for stages in (1, 4, STAGES):
        net, plain = models.model(), models.model()
        models.learn(net, stages)
        sides = alternate(models.inference(net, part, stages - 1), models.inference(plain, part, 0), settings.rounds)
        yield no_slower(f"stages-infer/{stages}", sides, 1.05)
        models.begin(net, stages)
        ours, theirs = models.training_step(net, part, stages), models.training_step(plain, part, 0)
        yield no_slower(f"stages-train/{stages}", alternate(ours, theirs, settings.rounds), 1.05)
        if stages == STAGES:
            weights = [m for m in net.modules() if isinstance(m, StackedMatrix)]
            live = sum(4 * m.shape.numel() for m in weights) / 2**20
            note = "dense weights of one cursor in use"
            yield Measured("stages-memory", "MB", live, None, live, None, note=note)


ROWS: dict[str, Row] = {
    "cl-infer-T16": infer,
    "cl-train-T16": train,
    "cl-mixed-cursors": mixed,
    "cl-forget-zero": forget_zero,
    "stages": free,
}
