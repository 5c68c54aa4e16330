"""One table of all methods on one stream, from kept cells alone: plain data, Markdown, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flame_moe.experiments.streams.bootstrap import Array, Resampling, Sampled, interval
from flame_moe.experiments.streams.cells import Cell
from flame_moe.experiments.streams.entries import FIRST, Entry, written
from flame_moe.measures import AVERAGE, FORGETTING, FORMULAS, FORWARD, SEPARATE, largest_drift
from flame_moe.results import PRIMARY, Results, StageRecord

SHOWN = ("auroc", "auprc", "r2")
"""Metrics of the table, each over the tasks that have it."""
Row = dict[str, Any]


def rows(tried: Mapping[Entry, Sequence[Cell]], chosen: Mapping[Entry, Sequence[Cell]], draw: Resampling) -> list[Row]:
    """One row per entry, with every number that the table and the picture show.

    Args:
        tried: entry -> its cells of seed 0, one per setting.
        chosen: entry -> its cells with the chosen setting, one per seed.
        draw: the resamples.
    """
    matrices = {e: {c.first.seed: draw.matrices(c.predictions()) for c in good(cells)} for e, cells in chosen.items()}
    alone = next((of for entry, of in matrices.items() if entry.name == SEPARATE), {})
    sampled = {entry: _sampled(of, alone, draw) for entry, of in matrices.items()}
    first = next((of for entry, of in sampled.items() if entry.name == FIRST), {})
    found = []
    for entry, cells in chosen.items():
        row = _described(entry, tried[entry], cells)
        if good(cells):
            row["metrics"] = {
                metric: {
                    **_summary(of, draw),
                    "matrix": _matrix(matrices[entry], metric),
                    "difference": None if entry.name == FIRST else _difference(first.get(metric, {}), of, draw),
                }
                for metric, of in sampled[entry].items()
            }
            row |= _costs([cell.results() for cell in good(cells)])
        found.append(row)
    return found


def good(cells: Sequence[Cell]) -> list[Cell]:
    """Those that did not fail."""
    return [cell for cell in cells if cell.failure is None]


def _sampled(
    matrices: Mapping[int, Mapping[str, Array]], alone: Mapping[int, Mapping[str, Array]], draw: Resampling
) -> dict[str, dict[int, Sampled]]:
    """Metric -> seed -> every measure on every resample."""
    metrics = [m for m in SHOWN if all(m in of and not np.isnan(of[m]).all() for of in matrices.values())]
    return {
        m: {seed: draw.measures(of[m], m, alone[seed][m] if seed in alone else None) for seed, of in matrices.items()}
        for m in metrics
    }


def _summary(of: Mapping[int, Sampled], draw: Resampling) -> dict[str, Any]:
    """Measure -> value over seeds with its interval."""
    summary = {}
    for name in FORMULAS:
        each = [sampled[name] for sampled in of.values() if name in sampled]
        if each:
            summary[name] = _with_interval(draw.over_seeds(each))
    return summary


def _difference(
    first: Mapping[int, Sampled], other: Mapping[int, Sampled], draw: Resampling
) -> list[float | None] | None:
    """FLAME minus this entry, of the average, on the same subjects and the seeds that both have."""
    both = [seed for seed in first if seed in other]
    return _with_interval(draw.over_seeds([first[s][AVERAGE] - other[s][AVERAGE] for s in both])) if both else None


def _with_interval(values: Array) -> list[float | None]:
    return [None if math.isnan(x) else float(x) for x in (float(values[0]), *interval(values))]


def _matrix(matrices: Mapping[int, Mapping[str, Array]], metric: str) -> list[list[float | None]]:
    """R averaged over seeds: tasks x stages."""
    mean = np.mean([of[metric][:, :, 0] for of in matrices.values()], axis=0)
    return [[None if math.isnan(x) else float(x) for x in row] for row in mean]


def _described(entry: Entry, tried: Sequence[Cell], cells: Sequence[Cell]) -> Row:
    return {
        "name": entry.name,
        "label": entry.label,
        "method": dict(entry.method),
        "setting": written(cells[0].setting),
        "validation": {written(c.setting): None if c.failure else c.validation() for c in tried},
        "seeds": [cell.first.seed for cell in good(cells)],
        "failed": {str(cell.first.seed): cell.failure for cell in cells if cell.failure is not None},
    }


def _costs(results: Sequence[Results]) -> Row:
    """Drift, sizes, time and memory; sizes are those of the first seed, for they do not depend on it."""
    last = [row for row in results[0].footprint if row.after_stage == results[0].last_stage]
    kinds = ("live", "inference", "method", "stored")
    sizes = {
        f"{k}_{what}": sum(getattr(f, f"{k}_{what}") for f in last) for k in kinds for what in ("parameters", "bytes")
    }
    trained = [
        sum(f.trainable_parameters for f in results[0].footprint if f.after_stage == stage.index)
        for stage in results[0].stages
    ]
    return {
        "drift": max(largest_drift(r.drift) for r in results),
        "bitwise_equal": all(row.bitwise_equal for r in results for row in r.drift),
        "sizes": sizes,
        "trainable": trained,
        "seconds": [float(np.mean([_seconds(r.stages[s]) for r in results])) for s in range(len(results[0].stages))],
        "peak_bytes": [max(r.stages[s].peak_bytes or 0 for r in results) for s in range(len(results[0].stages))],
    }


def _seconds(stage: StageRecord) -> float:
    """Of the processor; of the clock for the first stage, which a cell finds learned."""
    return float(stage.seconds if stage.processor_seconds is None else stage.processor_seconds)


def markdown(found: Sequence[Row]) -> str:
    """The table, and what its columns are."""
    metrics = [m for m in SHOWN if any(m in row.get("metrics", {}) for row in found)]
    primary = [m for m in metrics if m in PRIMARY.values()]
    forward = any(FORWARD in row["metrics"][m] for row in found for m in row.get("metrics", {}))
    head = ["method", "seeds", *(f"{m.upper()}" for m in metrics), *(f"forgetting, {m.upper()}" for m in primary)]
    head += [f"forward transfer, {m.upper()}" for m in primary if forward]
    head += [
        "logit drift",
        "stored",
        "A: to predict",
        "B: of the method",
        "seconds",
        *(f"FLAME minus it, {m.upper()}" for m in metrics),
        "setting",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        cells = [row["label"], str(len(row["seeds"]))]
        if "metrics" in row:
            of = row["metrics"]
            cells += [_cell(of.get(m, {}).get(AVERAGE)) for m in metrics]
            cells += [_cell(of.get(m, {}).get(FORGETTING), sign=True) for m in primary]
            cells += [_cell(of.get(m, {}).get(FORWARD), sign=True) for m in primary if forward]
            sizes = row["sizes"]
            cells += ["0" if row["bitwise_equal"] else f"{row['drift']:.3g}"]
            cells += [f"{sizes[f'{kind}_parameters']:,}" for kind in ("stored", "inference", "method")]
            cells += [f"{sum(row['seconds'][1:]):.0f}"]
            cells += [_cell(of.get(m, {}).get("difference"), sign=True, digits=4) for m in metrics]
        else:
            cells += ["failed"] + [""] * (len(head) - 4)
        cells.append(row["setting"])
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        f"Metrics are the {AVERAGE}: {FORMULAS[AVERAGE]}. Forgetting: {FORMULAS[FORGETTING]}.",
        *([f"Forward transfer: {FORMULAS[FORWARD]}."] if forward else []),
        "In brackets 95 % bootstrap intervals over test subjects and seeds, the same resamples for every row.",
        "Stored: numbers in the checkpoint, with what a method needs to learn on, but for samples it may read again. "
        "A: those that predicting any task reads; B: those of A in weights that stages may change.",
        "Seconds: of one processor, learning all stages after the first.",
        "Setting: what validation chose with seed 0 from the method's grid.",
        *(f"{row['label']}: seed {s} failed: {why}" for row in found for s, why in row["failed"].items()),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _cell(values: Sequence[float | None] | None, *, sign: bool = False, digits: int = 3) -> str:
    if not values or values[0] is None:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    shown = [("n/a" if v is None else format(v, form)) for v in values]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"
