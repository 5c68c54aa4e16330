"""Which routing vectors know whose prompt they see: each layer alone, and all layers together.

    python -m flame_moe.experiments.mllm.votes STREAM OUT [--seeds 3] [--order a]

Experts and gates are learned as by the method `routed` (experts that are in OUT are taken from there). Then the base
alone reads test prompts, and every layer's mean input over a prompt is scored by every task's vector: trained gates,
mean inputs, and discriminants from backgrounds of several sizes with several ridges. Nothing is chosen here. The table
is OUT/votes.md and OUT/votes.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flame_moe.experiments.mllm.cells import Place
from flame_moe.experiments.mllm.seeds import Found, cell, per_seed
from flame_moe.mllm.methods.routed import RoutedDiscriminant, RoutedSequence
from flame_moe.mllm.run import settings_for
from flame_moe.mllm.stream.tiers import Stream

Scores = dict[str, Tensor]
"""Task, or the foundation, whose samples they are -> (layers, samples, tasks)."""
FOUNDATION = "the foundation"
RIDGES = (0.01, 0.1, 1.0)
TESTED = 200
"""Test samples of each task."""


def votes(stream: Stream, place: Place, seed: int) -> Found:
    """Kind of vector -> what is measured of it.

    layer: share of samples that a layer finds the task of, mean over layers and tasks. together: the same of the mean
    score over layers. With the background as one more choice, for discriminants alone: own, the share of samples that
    find their task, and left, the share of foundation samples that find none.
    """
    from flame_moe.mllm.adapters.gates import prompt_means
    from flame_moe.mllm.adapters.scores import discriminant, scores

    told = [task.name for task in stream.tasks]
    learner = RoutedSequence(stream.model(), settings_for(stream, {}), seed, stream.sample)
    learner.shelf = place.shelf
    for task in stream.tasks:
        learner.learn([task], lambda text, share: None)
    prompts = learner.prompts
    tuner: Any = learner.model.base_model
    parts = {task.name: (task.test, min(TESTED, len(task.test))) for task in stream.tasks}
    parts[FOUNDATION] = stream.foundation, len(stream.foundation)
    trained = {name: torch.stack([layer.lora_gate[t].data for t in told]) for name, layer in tuner.layers()}
    tuner.eval()
    with torch.no_grad(), tuner.without_experts():
        seen = {n: prompt_means(tuner, prompts(d, torch.arange(k)), n) for n, (d, k) in parts.items()}
        around = prompt_means(tuner, prompts(stream.sample, torch.arange(len(stream.sample))), "sample")
        rows = torch.arange(RoutedDiscriminant.PROMPTS_OF)
        own = {t.name: prompt_means(tuner, prompts(t.train, rows), t.name) for t in stream.tasks}
    means = {layer: torch.stack([own[t][layer].mean(0) for t in told]) for layer in trained}
    found = {}
    for kind, vectors in (("trained gates", trained), ("mean inputs", means)):
        each = {n: torch.stack([scores(x[k], v, "standardized") for k, v in vectors.items()]) for n, x in seen.items()}
        found[kind] = _shares(each, told)
    sizes = sorted({min(size, len(stream.sample)) for size in (75, 150, 300, len(stream.sample))})
    for size, ridge in [(len(stream.sample), r) for r in RIDGES] + [(s, 0.1) for s in sizes[:-1]]:
        fitted = {layer: [discriminant(own[t][layer], around[layer][:size], ridge) for t in told] for layer in trained}
        each = {
            name: torch.stack([torch.stack([x[k].double() @ v + b for v, b in fitted[k]], -1) for k in fitted])
            for name, x in seen.items()
        }
        found[f"discriminants, background of {size}, ridge {ridge:g}"] = _shares(each, told, null=True)
    return found


def _shares(each: Scores, told: Sequence[str], *, null: bool = False) -> dict[str, float]:
    def right(score: Tensor, place: int) -> float:
        return float((score.argmax(-1) == place).double().mean())

    def mean(shares: Sequence[float]) -> float:
        return float(np.mean(shares))

    said = {
        "layer": mean([right(each[t], i) for i, t in enumerate(told)]),
        "together": mean([right(each[t].mean(0), i) for i, t in enumerate(told)]),
    }
    if null:
        wide = {n: torch.nn.functional.pad(s.mean(0), (0, 1)) for n, s in each.items()}
        said["own"] = mean([right(wide[t], i) for i, t in enumerate(told)])
        said["left"] = right(wide[FOUNDATION], len(told))
    return said


def table(found: Sequence[Found]) -> str:
    """Mean over seeds, and in brackets the lowest and highest where seeds make a difference."""
    columns = {
        "layer": "a layer alone",
        "together": "all layers together",
        "own": "the same, with none as a choice",
        "left": "foundation left to the base",
    }
    lines = [f"| vectors | {' | '.join(columns.values())} |", "|" + "---|" * (1 + len(columns))]
    for kind in found[0]:
        each = [[seed[kind][column] for seed in found if column in seed[kind]] for column in columns]
        cells = [cell(of, 3) if of else "" for of in each]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 2 for what the user can mend."""
    return per_seed("votes", __doc__, votes, table, arguments)


if __name__ == "__main__":
    sys.exit(main())
