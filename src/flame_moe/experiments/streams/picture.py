"""Quality beside size: where every method of a stream ends, what it forgot on the way, and what it stores."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flame_moe.experiments.streams.table import Row
from flame_moe.measures import AVERAGE, FORGETTING
from flame_moe.report.svg import INK, MUTED, OWN, RULE, STYLE, diverging


def picture(found: Sequence[Row], title: str, metric: str = "auroc") -> bytes:
    """A PNG: per row the final average of a metric with its interval, forgetting as colour, and the numbers stored.

    Args:
        found: rows of the table.
        title: above it.
        metric: on the horizontal axis.
    """
    drawn = [row for row in found if metric in row.get("metrics", {})]
    places = range(len(drawn))
    with mpl.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white", "axes.grid.axis": "both"}):
        figure = Figure(figsize=(10.5, 1.3 + 0.27 * len(drawn)), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        quality, size = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        values = [row["metrics"][metric][AVERAGE] for row in drawn]
        lost = [(row["metrics"][metric].get(FORGETTING) or [0.0])[0] or 0.0 for row in drawn]
        for place, (_, low, high) in zip(places, values, strict=True):
            if low is not None and high is not None:
                quality.hlines(place, low, high, color=MUTED, lw=1.4, alpha=0.6, zorder=1)
        limit = max(0.01, *(abs(v) for v in lost)) if lost else 0.01
        points = quality.scatter(
            [v[0] for v in values],
            places,
            c=lost,
            cmap=diverging().reversed(),
            vmin=-limit,
            vmax=limit,
            s=60,
            edgecolor=INK,
            linewidth=0.8,
            zorder=2,
        )
        if drawn:
            quality.axvline(values[0][0], color=RULE, lw=1, zorder=0)
        quality.set_yticks(places, [row["label"] for row in drawn])
        quality.set_ylim(len(drawn) - 0.4, -0.6)
        quality.set_xlabel(f"{metric.upper()} after the last stage, mean over tasks")
        quality.set_title(title)
        size.barh(places, [row["sizes"]["stored_parameters"] / 1e3 for row in drawn], color=OWN, height=0.55)
        size.set_xlabel("thousand numbers stored")
        figure.colorbar(points, ax=size, label=f"forgetting, {metric.upper()}", pad=0.03)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
