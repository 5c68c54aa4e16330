"""Stages on a small OLMoE, as FLAME's authors show them on OLMoE-1B-7B, and the task metric that they do not show.

A stage trains the dense update of all experts on its task. It is cut by `weight` and by `activation` directions at
every rank, each measured on the task; one of them is kept as the stage's slice, and the next stage goes on from there.
What the model says at a task's own cursor is compared with the day it was learned, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flame_moe.continual.moments import Moment
from flame_moe.continual.spectra import by_inputs, by_singular_values
from flame_moe.continual.truncation import Plan, truncate
from flame_moe.environment import environment
from flame_moe.errors import RecipeError, nearest
from flame_moe.files import replacing_folder
from flame_moe.mllm.olmoe.model import (
    OlmoeSize,
    TextTask,
    accuracy,
    base_model,
    foundation_accuracy,
    task_data,
)
from flame_moe.mllm.olmoe.stages import Stages, expert_weights, gather
from flame_moe.mllm.stream.encode import Encoded, shuffled
from flame_moe.mllm.stream.fitting import Steps
from flame_moe.mllm.stream.llava import Say
from flame_moe.mllm.stream.score import answer_loss
from flame_moe.nn.slices import Slice
from flame_moe.training.seeding import generator

FILES = ("olmoe.json", "table.md")
RANKS = (1, 2, 4, 8)
Directions = Literal["weight", "activation"]
MODES: tuple[Directions, ...] = ("weight", "activation")
_MOMENTS = 1024
"""Training samples from which the second moments of the inputs are taken."""
_PROBES = 32


def learn_stages(
    size: OlmoeSize,
    cache: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    mode: Directions = "activation",
    say: Say = lambda text, share: None,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Learn the stream; plain data of everything that was measured.

    Args:
        size: of model and stream.
        cache: of the base model.
        seed: of the order of samples in each stage.
        rank: that a stage keeps.
        mode: in which directions.
        say: told of progress.
        show: given one line per stage.
    """
    torch.set_num_threads(1)
    model = base_model(size, cache, say)
    stages, tasks = Stages(model), [task_data(name, size) for name in size.tasks]
    before = {task.name: accuracy(model, task.test) for task in tasks}
    found: dict[str, Any] = {"size": size.plain(), "seed": seed, "kept": {"rank": rank, "mode": mode}}
    found |= {"environment": environment().plain(), "before": before, "stages": []}
    found["foundation_before"] = foundation_accuracy(model, size, "test")
    probes: list[Tensor] = []
    show(f"{'stage':<10}{'before':>8}{'full':>8}" + "".join(f"{f'{m[:6]} {r}':>11}" for m in MODES for r in RANKS))
    for i, task in enumerate(tasks):
        _train(model, stages, task, size, seed, say)
        delta = stages.update()
        rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:_MOMENTS]
        moments = gather(model, task.train, rows.split(size.batch))
        stage: dict[str, Any] = {"task": task.name, "before": before[task.name], "full": accuracy(model, task.test)}
        stage["energy"] = _energies(delta, moments)
        stage["cut"] = {
            f"{m} {r}": _accuracy_cut(model, stages, task, _cut(delta, moments, m, r)) for m in MODES for r in RANKS
        }
        stages.slices.append(_cut(delta, moments, mode, rank))
        stages.read(i)
        probes.append(_logits(model, task.test))
        stage |= _after(model, stages, tasks[: i + 1], probes, size)
        stage["stored"] = stages.stored()
        found["stages"].append(stage)
        cuts = "".join(f"{value:>11.3f}" for value in stage["cut"].values())
        show(f"{task.name:<10}{stage['before']:>8.3f}{stage['full']:>8.3f}{cuts}")
    return found


def _cut(delta: Mapping[str, Tensor], moments: Mapping[str, Moment], mode: Directions, rank: int) -> dict[str, Slice]:
    return {name: t.part for name, t in truncate(delta, Plan(mode=mode, rank=rank), moments).items()}


def _accuracy_cut(model: Any, stages: Stages, task: TextTask, parts: dict[str, Slice]) -> float:
    """Exact match on the task's test set if the stage kept these parts; it does not keep them."""
    stages.slices.append(parts)
    stages.read(len(stages.slices) - 1)
    found = accuracy(model, task.test)
    stages.slices.pop()
    return found


def chosen_mode(name: str) -> Directions:
    """A mode by its name.

    Raises:
        RecipeError: if there is no such mode.
    """
    for mode in MODES:
        if mode == name:
            return mode
    raise RecipeError(f"there is no mode '{name}'", mend=nearest(name, MODES))


def write_stages(found: Mapping[str, Any], out: Path) -> None:
    """Write `FILES`, both or neither."""
    with replacing_folder(out) as work:
        (work / FILES[0]).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (work / FILES[1]).write_text(table(found), encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """The tables as Markdown: the task metric at every rank, the energy kept, and what became of earlier tasks."""
    cuts = [f"{m} {r}" for m in MODES for r in RANKS]
    head = ["task", "before", "full update", *cuts]
    lines = ["Exact match on the test set, before the stage and after its update was cut.", "", *_head(head)]
    for stage in found["stages"]:
        values = [stage["before"], stage["full"], *(stage["cut"][c] for c in cuts)]
        lines.append(_row(stage["task"], values))
    lines += ["", "Share of the update's energy that a rank keeps, median over experts and layers.", ""]
    lines += _head(["task", *cuts])
    lines += [_row(stage["task"], [stage["energy"][c] for c in cuts]) for stage in found["stages"]]
    last = found["stages"][-1]
    names = [stage["task"] for stage in found["stages"]]
    lines += ["", "After the last stage.", "", *_head(["read at", *names, "foundation"])]
    lines.append(_row("its own cursor", [*(last["cursor"][n] for n in names), found["foundation_before"]]))
    lines.append(_row("the newest cursor", [*(last["newest"][n] for n in names), last["foundation_newest"]]))
    same = all(stage["bitwise_equal"] for stage in found["stages"])
    stored, dense = last["stored"], last["dense"]
    lines += ["", f"- Earlier outputs at their own cursor: {'bitwise equal' if same else 'NOT equal'}."]
    lines += [f"- Slices of all stages hold {stored:,} numbers, dense updates would {dense:,}."]
    return "\n".join(lines) + "\n"


def _train(model: Any, stages: Stages, task: TextTask, size: OlmoeSize, seed: int, say: Say) -> None:
    weights = expert_weights(model)
    for p in weights.values():
        p.requires_grad_(True)
    step = Steps(list(weights.values()), size.stage_lr, size.stage_steps, task.name, weight_decay=0.0)
    model.train()
    for which in shuffled(len(task.train), size.batch, size.stage_steps, generator(seed, "order", task.name)):
        batch = task.train.batch(which, model.get_input_embeddings())
        step(answer_loss(model(inputs_embeds=batch.embeds, attention_mask=batch.mask).logits, batch.labels))
        say(task.name, step.share)
    model.requires_grad_(False).eval()


def _energies(delta: Mapping[str, Tensor], moments: Mapping[str, Moment]) -> dict[str, float]:
    """Share of the energy that each rank keeps, of weight or function; median over experts that saw input."""
    shares: dict[str, list[float]] = {f"{m} {r}": [] for m in MODES for r in RANKS}
    for name, stack in delta.items():
        moment = moments[name]
        for e, d in enumerate(stack):
            if not moment.seen[e] or not bool(d.any()):
                continue
            spectra = (by_singular_values(d), by_inputs(d, moment.mean[e], moment.second[e]))
            for m, spectrum in zip(MODES, spectra, strict=True):
                for r in RANKS:
                    lost = spectrum.error[min(r, len(spectrum.error) - 1)]
                    shares[f"{m} {r}"].append(1.0 - float(lost) / spectrum.energy)
    return {key: float(np.median(values)) for key, values in shares.items()}


@torch.no_grad()
def _logits(model: Any, data: Encoded) -> Tensor:
    batch = data.batch(torch.arange(min(_PROBES, len(data))), model.get_input_embeddings())
    return model(inputs_embeds=batch.embeds, attention_mask=batch.mask).logits[batch.mask.bool()].clone()


def _after(model: Any, stages: Stages, known: list[TextTask], probes: list[Tensor], size: OlmoeSize) -> dict[str, Any]:
    """Every task learned so far at the newest cursor, and at its own."""
    newest = {task.name: accuracy(model, task.test) for task in known}
    foundation = foundation_accuracy(model, size, "test")
    own, equal = {}, True
    for cursor, task in enumerate(known):
        stages.read(cursor)
        own[task.name] = accuracy(model, task.test)
        equal = equal and torch.equal(_logits(model, task.test), probes[cursor])
    stages.read(len(known) - 1)
    dense = len(known) * sum(base.numel() for base in stages.base.values())
    return {
        "newest": newest, "cursor": own, "bitwise_equal": equal, "foundation_newest": foundation, "dense": dense
    }  # fmt: skip


def _head(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _row(name: str, values: list[float]) -> str:
    return "| " + " | ".join([name, *(f"{v:.3f}" for v in values)]) + " |"
