"""What a method learned, what it still knows at the end, and what it left of the base: all methods of one order."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flame_moe.experiments.mllm.table import UPPER_BOUND, Row
from flame_moe.measures import AVERAGE
from flame_moe.mllm.measures import FINE_TUNE
from flame_moe.report.svg import INK, MUTED, OWN, RULE, STYLE


def picture(found: Sequence[Row], title: str) -> bytes:
    """A PNG, methods from the best final average down: that average with its interval, as a hollow point the mean of
    each task when it was learned, and beside them the foundation after the last task.

    Args:
        found: rows of the table.
        title: above it.
    """
    drawn = sorted((row for row in found if row["seeds"]), key=lambda row: -row["measures"][AVERAGE][0])
    places = range(len(drawn))
    with mpl.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white", "axes.grid.axis": "x"}):
        figure = Figure(figsize=(10.5, 1.5 + 0.27 * len(drawn)), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        answers, base = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        for place, row in zip(places, drawn, strict=True):
            average, low, high = row["measures"][AVERAGE]
            learned = row["measures"][FINE_TUNE][0]
            answers.hlines(place, average, learned, color=RULE, lw=1.2, zorder=1)
            if low is not None and high is not None:
                answers.hlines(place, low, high, color=OWN, lw=3.5, alpha=0.4, zorder=2)
            told = {"label": "when learned"} if place == 0 else {}
            answers.scatter(
                [learned], [place], s=36, facecolor="white", edgecolor=MUTED, linewidth=1.2, zorder=3, **told
            )
            told = {"label": "after the last task, 95 % interval"} if place == 0 else {}
            answers.scatter([average], [place], s=44, color=OWN, edgecolor=INK, linewidth=0.8, zorder=4, **told)
            if row["method"] == UPPER_BOUND:
                answers.axvline(average, color=MUTED, lw=1, ls="--", zorder=0)
        answers.set_yticks(places, [row["label"] for row in drawn])
        answers.set_ylim(len(drawn) - 0.4, -0.6)
        answers.set_xlim(left=0)
        answers.set_xlabel("exact match, mean over tasks (dashed: identity known)")
        answers.set_title(title)
        if drawn:
            answers.legend(loc="upper left", frameon=True)
            base.axvline(drawn[0]["foundation_before"], color=MUTED, lw=1, ls="--")
        base.barh(places, [row["foundation"] or 0.0 for row in drawn], color=OWN, height=0.55)
        base.set_xlim(0, 1)
        base.set_xlabel("foundation (dashed: before)")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
