"""Which ranks hold what was learned: what of the first task comes back when some of them are put back.

    python -m flame_moe.experiments.mllm.ranks STREAM OUT [--seeds 3] [--order a]

The premise of PASs-MoE's stabilisation (arXiv 2601.13020) is that a rank's importance, E[pi_e (a_ek^T h)^2] over the
inputs h of a task, says how much the task needs it. Here a mixture of LoRA experts learns the first task and then all
others with nothing that holds it (`pass-rw`), and forgets. Then, in every layer, a share of the ranks gets back the row
of A and the column of B that it had after the first task: those that were most important to it, those that were least,
or drawn ones. Where importance is right, the first come back with more of the answers than the drawn ones. Nothing is
trained or chosen for it. The table is OUT/ranks.md and OUT/ranks.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flame_moe.experiments.mllm.cells import Place
from flame_moe.experiments.mllm.seeds import Found, cell, per_seed
from flame_moe.mllm.methods.mixture import PassReweighting
from flame_moe.mllm.run import settings_for
from flame_moe.mllm.stream.score import exact
from flame_moe.mllm.stream.tiers import Stream
from flame_moe.training.seeding import generator

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
FIRSTS = ("most important", "drawn", "least important")
"""Which ranks are put back first."""


class Pathways(NamedTuple):
    """The mixture of one layer.

    Attributes:
        a: (E r, n).
        b: (out, E r).
    """

    a: Tensor
    b: Tensor


def ranks(stream: Stream, place: Place, seed: int) -> Found:
    """Which ranks first -> share that is put back -> exact match on the first task's test samples.

    Beside them, under "held by the most important", the part of a layer's importance that such a share of its ranks
    has, mean over layers.
    """
    first, *others = stream.tasks
    learner = PassReweighting(stream.model(), settings_for(stream, dict(place.changes)), seed, stream.sample)
    layers = _layers(learner)
    learner.learn([first], lambda text, share: None)
    then = {name: _kept(layer) for name, layer in layers.items()}
    weights = {name: layer.lora_memory["mixture"].importance.flatten().clone() for name, layer in layers.items()}
    for task in others:
        learner.learn([task], lambda text, share: None)
    now = {name: _kept(layer) for name, layer in layers.items()}
    rng = generator(seed, "ranks")
    orders = {name: _orders(weight, torch.from_numpy(rng.permutation(len(weight)))) for name, weight in weights.items()}

    def right(who: str, share: float) -> float:
        for name, layer in layers.items():
            order = orders[name][who]
            _put(layer, now[name], then[name], order[: round(share * len(order))])
        answers = exact(lambda batch: learner.logits(batch, first.name), first.test, learner.embedding)
        return float(answers.double().mean())

    found = {who: {f"{share:g}": right(who, share) for share in SHARES} for who in FIRSTS}
    found["held by the most important"] = {f"{share:g}": _held(weights, share) for share in SHARES}
    return found


def _layers(learner: PassReweighting) -> dict[str, Any]:
    tuner: Any = learner.model.base_model
    return dict(tuner.layers())


def _weights(layer: Any) -> Pathways:
    return Pathways(layer.lora_A["mixture"].weight, layer.lora_B["mixture"].weight)


def _kept(layer: Any) -> Pathways:
    return Pathways(*(part.detach().clone() for part in _weights(layer)))


def _orders(importance: Tensor, drawn: Tensor) -> Mapping[str, Tensor]:
    down = importance.argsort(descending=True, stable=True)
    return dict(zip(FIRSTS, (down, drawn, down.flip(0)), strict=True))


@torch.no_grad()
def _put(layer: Any, now: Pathways, then: Pathways, back: Tensor) -> None:
    """Set a layer to what it is now, but for some ranks as they were then."""
    a, b = _weights(layer)
    a.copy_(now.a)
    b.copy_(now.b)
    a[back] = then.a[back]
    b[:, back] = then.b[:, back]


def _held(weights: Mapping[str, Tensor], share: float) -> float:
    parts = [w.sort(descending=True).values[: round(share * len(w))].sum() / w.sum() for w in weights.values()]
    return float(torch.stack(parts).mean())


def table(found: Sequence[Found]) -> str:
    """Mean over seeds, and in brackets the lowest and highest where seeds make a difference."""
    lines = [f"| put back first | {' | '.join(f'{share:.0%}' for share in SHARES)} |", "|" + "---|" * (1 + len(SHARES))]
    for who in found[0]:
        cells = [cell([seed[who][share] for seed in found], 2) for share in found[0][who]]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 2 for what the user can mend."""
    return per_seed("ranks", __doc__, ranks, table, arguments)


if __name__ == "__main__":
    sys.exit(main())
