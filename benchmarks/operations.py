"""How much a small model does, counted instead of timed: the same on every machine.

    python -m benchmarks.operations            # the counts of this source beside the committed ones
    python -m benchmarks.operations --renew    # commits them to tests/operations.json; say why in the commit

Counted are the operations that PyTorch dispatches in a forward pass and in a training step (forward, backward,
clipping, update), the nodes of the step's autograd graph, and the numbers that it keeps for the backward pass, each
memory once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models
from benchmarks.harness import ROOT, saved_bytes
from flame_moe.files import write_text
from flame_moe.nn.losses import task_loss
from flame_moe.nn.model import Flame

COMMITTED = ROOT / "tests" / "operations.json"
MOST = 1.25
"""How many times the committed count may be reached."""
SIZE, STAGES = 16, 4


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> int:
    """Operations of a second call; the first one makes what is made once."""
    torch.manual_seed(0)
    call()
    torch.manual_seed(0)
    with Operations() as count:
        call()
    return count.seen.total()


def nodes(loss: Tensor) -> int:
    """Nodes of the autograd graph below a loss."""
    seen: set[Any] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [below for below, _ in node.next_functions]
    return len(seen)


def counts() -> dict[str, dict[str, int]]:
    """Case -> what is counted -> how many."""
    part = models.batch(SIZE)
    found = {}
    for preset in ("residual", "paper"):
        found[preset] = _of(models.model(preset=preset), part, 0)
    grown = models.model()
    models.learn(grown, STAGES)
    models.begin(grown, STAGES)
    found[f"residual, after {STAGES} stages"] = _of(grown, part, STAGES)
    return found


def _of(net: Flame, part: Any, cursor: int) -> dict[str, int]:
    def loss() -> Tensor:
        torch.manual_seed(0)
        out = net(part, cursor)
        return task_loss(models.TASK, out.logits, part.target).mean() + out.aux

    net.train()
    found = {"graph nodes": nodes(loss()), "numbers saved": saved_bytes(loss, net) // 4}
    found["operations of a training step"] = operations(models.training_step(net, part, cursor))
    return {"operations of a forward pass": operations(models.inference(net, part, cursor)), **found}


def excess(found: dict[str, dict[str, int]], committed: dict[str, dict[str, int]]) -> list[str]:
    """A sentence for every count that is too large."""
    return [
        f"{case}: {value:,} {what}, {value / committed[case][what]:.2f} times the committed {committed[case][what]:,}"
        for case, row in found.items()
        for what, value in row.items()
        if value > MOST * committed[case][what]
    ]


def main() -> None:
    torch.set_num_threads(1)
    found = counts()
    committed = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.exists() else {}
    for case, row in found.items():
        for what, value in row.items():
            print(f"{case:28} {what:32} {value:>9,}  committed {committed.get(case, {}).get(what, 0):>9,}")
    if "--renew" in sys.argv[1:]:
        write_text(COMMITTED, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
