"""One table per order from kept cells alone: plain data and Markdown, with intervals over test samples and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe.experiments.mllm.cells import Cell, Right
from flame_moe.measures import AVERAGE, BACKWARD, FORGETTING
from flame_moe.mllm.measures import ANSWER_FORMULAS, FINE_TUNE, MEAN_AVERAGE, answer_measures
from flame_moe.mllm.methods import METHODS
from flame_moe.progression import Progression
from flame_moe.results import Results

Array = NDArray[np.float64]
Row = dict[str, Any]
UPPER_BOUND = "identity"
"""The method whose average is 1 in the column that says how much of it another reaches."""


def rows(
    tried: Mapping[str, Sequence[Cell]], chosen: Mapping[str, Sequence[Cell]], order: str, resamples: int
) -> list[Row]:
    """One row per method.

    Args:
        tried: method -> cells of order a and seed 0, one per setting.
        chosen: method -> cells of this order, one per seed.
        order: of the tasks.
        resamples: behind each interval; the same for every row.
    """
    found = []
    for method, cells in chosen.items():
        good = [cell for cell in cells if cell.failure is None]
        row: Row = {
            "method": method,
            "label": METHODS[method].label,
            "order": order,
            "setting": cells[0].choice,
            "validation": {c.choice: None if c.failure else c.validation() for c in tried[method]},
            "seeds": [cell.seed for cell in good],
            "failed": {str(cell.seed): cell.failure for cell in cells if cell.failure is not None},
        }
        if good:
            row |= _measured([(cell.results(), cell.right()) for cell in good], resamples)
        found.append(row)
    bound = next((row["measures"][AVERAGE][0] for row in found if row["method"] == UPPER_BOUND and row["seeds"]), None)
    for row in found:
        row["of_upper_bound"] = row["measures"][AVERAGE][0] / bound if bound and row["seeds"] else None
    return found


def _measured(cells: Sequence[tuple[Results, Right]], resamples: int) -> Row:
    sampled = [_sampled(results, right, resamples) for results, right in cells]
    draws = np.random.default_rng(1).integers(0, len(cells), (resamples, len(cells)))
    measured = {}
    for name in sampled[0]:
        each = np.stack([one[name] for one in sampled], axis=1)
        spread = np.take_along_axis(each[1:], draws, axis=1).mean(axis=1)
        measured[name] = [_plain(x) for x in (each[0].mean(), *np.percentile(spread, [2.5, 97.5]))]
    first = cells[0][0]
    last = [row for row in first.footprint if row.after_stage == first.last_stage]
    answers = [results.answers for results, _ in cells if results.answers is not None]
    kept = [a.stages[-1].foundation for a in answers if a.stages[-1].foundation is not None]
    nats = [a.stages[-1].foundation_nats for a in answers if a.stages[-1].foundation_nats is not None]
    own = [r.own for a in answers for r in a.routing if r.after_stage == first.last_stage and not np.isnan(r.own)]
    return {
        "measures": measured,
        "matrix": _matrix(cells),
        "foundation_before": answers[0].before["foundation"],
        "foundation": float(np.mean(kept)) if kept else None,
        "foundation_nats_before": answers[0].foundation_nats,
        "foundation_nats": float(np.mean(nats)) if nats else None,
        "own_expert": float(np.mean(own)) if own else None,
        "trained": sum(row.trainable_parameters for row in last),
        "stored": sum(row.stored_parameters for row in last),
        "samples_per_task": [stage.samples for stage in answers[0].stages],
        "seconds_per_task": [float(np.mean([a.stages[s].seconds for a in answers])) for s in range(len(first.stages))],
        "bitwise_equal": bool(first.drift) and all(d.bitwise_equal for results, _ in cells for d in results.drift),
    }


def _sampled(results: Results, right: Right, resamples: int) -> dict[str, Array]:
    """Measure -> (1 + resamples,): of the test samples as they are, then of resamples of them."""
    tasks = tuple(task for stage in results.stages for task in stage.tasks)
    learned = tuple(results.learned_in(task) for task in tasks)
    table = np.full((1 + resamples, len(tasks), len(results.stages)), np.nan)
    for i, task in enumerate(tasks):
        n = len(right[results.last_stage, task])
        rng = np.random.default_rng(sum(task.encode()))
        counts = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), resamples)]) / n
        for stage in range(learned[i], len(results.stages)):
            table[:, i, stage] = counts @ right[stage, task]
    each = [answer_measures(Progression("accuracy", tasks, learned, m, m, m)) for m in table]
    return {name: np.array([one[name] for one in each]) for name in ANSWER_FORMULAS}


def _matrix(cells: Sequence[tuple[Results, Right]]) -> dict[str, list[float | None]]:
    """Task -> exact match after each stage, mean over seeds."""
    results = cells[0][0]
    return {
        task.name: [
            float(np.mean([right[s, task.name].mean() for _, right in cells]))
            if (s, task.name) in cells[0][1]
            else None
            for s in range(len(results.stages))
        ]
        for task in results.tasks
    }


def markdown(found: Sequence[Row]) -> str:
    """The table of one order, and what its columns are."""
    head = ["method", "AP", "MFT", "MAA", "BWT", "forgetting", "of the upper bound", "foundation", "nats", "own expert"]
    head += ["trained", "stored", "samples per task", "seconds per task", "earlier answers"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        if not row["seeds"]:
            lines.append("| " + " | ".join([row["label"], "failed", *[""] * (len(head) - 2)]) + " |")
            continue
        of = row["measures"]
        cells = [row["label"], *(_cell(of[m]) for m in (AVERAGE, FINE_TUNE, MEAN_AVERAGE))]
        cells += [_cell(of[m], "+") for m in (BACKWARD, FORGETTING)]
        cells += [_number(row["of_upper_bound"]), _number(row["foundation"])]
        cells += [_number(row["foundation_nats"]), _number(row["own_expert"])]
        cells += [f"{row['trained']:,}", f"{row['stored']:,}"]
        cells += [_range(row["samples_per_task"], "{:,.0f}"), _range(row["seconds_per_task"], "{:.0f}")]
        cells += ["bitwise equal" if row["bitwise_equal"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    good = next((row for row in found if row["seeds"]), None)
    notes = [f"{name}: {formula}." for name, formula in ANSWER_FORMULAS.items()]
    notes += ["In brackets 95 % bootstrap intervals over test samples and seeds."]
    if good is not None:
        nats = _number(good["foundation_nats_before"]) or "not measured"
        notes += [f"Foundation: exact match on the base model's skills, {good['foundation_before']:.3f} before."]
        notes += [f"Nats: cross-entropy of the foundation's answers per token, {nats} before."]
    notes += ["Own expert: share of the routing weight on the expert of the sample's task, after the last stage."]
    notes += [f"{row['label']}: {row['setting']}, seeds {row['seeds']}." for row in found]
    notes += [f"{row['label']}: seed {s} failed: {why}" for row in found for s, why in row["failed"].items()]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _cell(values: Sequence[float | None], sign: str = "") -> str:
    if values[0] is None:
        return ""
    shown = ["n/a" if v is None else format(v, f"{sign}.3f") for v in values]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
