"""Quality against size: where every method of a stream ends, and what it forgot on the way."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flame_moe.experiments.streams.table import Row
from flame_moe.measures import AVERAGE, FORGETTING
from flame_moe.report.svg import INK, MUTED, STYLE, diverging


def picture(found: Sequence[Row], title: str, metric: str = "auroc") -> bytes:
    """A PNG: the final average of a metric against the numbers stored, forgetting as colour.

    Args:
        found: rows of the table.
        title: above it.
        metric: on the vertical axis.
    """
    drawn = [row for row in found if metric in row.get("metrics", {})]
    with mpl.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(9.6, max(4.2, 1.6 + 0.22 * len(drawn))), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        sizes = [row["sizes"]["stored_parameters"] / 1e3 for row in drawn]
        values = [row["metrics"][metric][AVERAGE] for row in drawn]
        lost = [row["metrics"][metric].get(FORGETTING, [0.0])[0] or 0.0 for row in drawn]
        for x, (_, low, high) in zip(sizes, values, strict=True):
            if low is not None and high is not None:
                ax.vlines(x, low, high, color=MUTED, lw=1, alpha=0.35, zorder=1)
        limit = max(0.01, *(abs(v) for v in lost)) if lost else 0.01
        points = ax.scatter(
            sizes,
            [v[0] for v in values],
            c=lost,
            cmap=diverging().reversed(),
            vmin=-limit,
            vmax=limit,
            s=190,
            edgecolor=INK,
            linewidth=0.8,
            zorder=2,
        )
        for number, (x, v) in enumerate(zip(sizes, values, strict=True), start=1):
            ax.annotate(str(number), (x, v[0]), ha="center", va="center", fontsize=7.5, color=INK, zorder=3)
        figure.colorbar(points, ax=ax, label=f"forgetting, {metric.upper()}", shrink=0.8, pad=0.01)
        ax.set_xlabel("thousand numbers stored")
        ax.set_ylabel(f"{metric.upper()} after the last stage, mean over tasks")
        ax.set_title(title)
        ax.set_xlim(left=0)
        names = "\n".join(f"{number:>2}  {row['label']}" for number, row in enumerate(drawn, start=1))
        figure.text(1.01, 0.95, names, fontsize=8.5, va="top", color=INK, transform=figure.transFigure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
