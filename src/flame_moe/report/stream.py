"""A stream of stages in the report: the task x stage matrix of every method, and the measures taken of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from flame_moe.measures import AVERAGE, DRIFT, FORMULAS, FORWARD, SEPARATE, measures
from flame_moe.progression import Progression, progression
from flame_moe.report.svg import INK, Picture, diverging, panels, picture, shorten
from flame_moe.report.tables import Cell, Table, change, metric_title, number
from flame_moe.results import LOWER_IS_BETTER, PRIMARY, Drift, Evaluation, Results

FULL = 0.1
"""Change at which the colour is deepest."""


def measured(results: Results) -> Table | None:
    """Average, transfer, forgetting and drift of every method; the formula of each stands in its head."""
    if results.last_stage == 0:
        return None
    kinds = {task.name: task.kind for task in results.tasks}
    rows = []
    for metric in dict.fromkeys(PRIMARY[kinds[task]] for stage in results.stages for task in stage.tasks):
        tables = {n: progression(results, metric, evaluations=evaluations) for n, evaluations, _ in _methods(results)}
        alone = _when_learned(tables.get(SEPARATE))
        for name, _, drift in _methods(results):
            found = {m.name: m.value for m in measures(tables[name], alone=alone, drift=drift)}
            rows.append((name, metric_title(metric), [Cell(_said(m, found.get(m)), derived=True) for m in FORMULAS]))
    head = ("Method", *(f"{name.capitalize()}: {formula}" for name, formula in FORMULAS.items()))
    notes = ["R[i, s]: metric of task i on the test split after stage s; t_i: the stage that learned it; T: the last."]
    if SEPARATE not in {name for name, *_ in _methods(results)}:
        notes.append(f"{FORWARD.capitalize()} needs '{SEPARATE}' among the compared methods.")
    return Table("Measures of continual learning", head, rows, notes)


def _methods(results: Results) -> list[tuple[str, Sequence[Evaluation], Sequence[Drift]]]:
    own = (results.method, results.evaluations, results.drift)
    return [own, *((c.name, c.evaluations, c.drift) for c in results.comparison)]


def _when_learned(table: Progression | None) -> Mapping[str, float] | None:
    """R[i, t_i] of each task."""
    if table is None:
        return None
    return {task: float(table.values[i, table.learned[i]]) for i, task in enumerate(table.tasks)}


def _said(name: str, value: float | None) -> str:
    if value is None:
        return "\u2013"
    return number(value) if name == AVERAGE else f"{value:.3g}" if name == DRIFT else change(value)


def matrix(results: Results) -> Picture | None:
    """R[i, s] of the primary metric of each task, one panel per method."""
    if results.last_stage == 0:
        return None
    sources = _methods(results)
    figure, axes = panels(len(sources), header=0.1, row=1.0 + 0.3 * sum(len(s.tasks) for s in results.stages))
    for i, (ax, (name, rows, _)) in enumerate(zip(axes, sources, strict=True)):
        kinds = {task.name: PRIMARY[task.kind] for task in results.tasks}
        tables = {m: progression(results, m, evaluations=rows) for m in dict.fromkeys(kinds.values())}
        _panel(ax, [(kinds[task], tables[kinds[task]], task) for s in results.stages for task in s.tasks], names=i == 0)
        ax.set_title(shorten(name))
    return picture(
        figure,
        "matrix",
        alt=f"Task by stage matrix of {len(sources)} methods; the values are in the results file.",
        caption="Rows are tasks with their metric, columns the stage after which it was measured, on the same test "
        f"samples. Colour is the change since the stage that learned the task, orange for worse, deepest at {FULL}; "
        "white is no change." + _scratch([name for name, *_ in sources]),
    )


def _scratch(names: list[str]) -> str:
    return f" '{SEPARATE}' gives every later task a network of its own." if SEPARATE in names else ""


def _panel(ax: Axes, rows: list[tuple[str, Progression, str]], *, names: bool) -> None:
    values = np.stack([table.values[table.tasks.index(task)] for _, table, task in rows])
    change = np.full_like(values, np.nan)
    for i, (metric, table, task) in enumerate(rows):
        start = table.learned[table.tasks.index(task)]
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        change[i, start:] = sign * (values[i, start:] - values[i, start])
    ax.imshow(change, cmap=diverging(), vmin=-FULL, vmax=FULL, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            shown = f"{value:.3f}".replace("-", "\u2212")
            ax.text(x, y, shown, ha="center", va="center", fontsize=8, color=INK)
    ax.set_xticks(range(values.shape[1]), [str(s) for s in range(values.shape[1])])
    ax.set_xlabel("after stage")
    ax.set_yticks(
        range(len(rows)), [f"{shorten(t, 22)} {m.upper()}" for m, _, t in rows] if names else [""] * len(rows)
    )
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
