"""The look of every figure, and its way into the page: one accessible inline SVG without outside references."""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, MUTED, RULE = "#1c2733", "#5c6b7a", "#d5dce3"
OWN = "#0072b2"
RIVALS = ("#d55e00", "#cc79a7", "#e69f00", "#009e73")
"""Okabe and Ito 2008: told apart under every common form of colour blindness; line style and marker differ as well."""
PARTS = {
    "encoders": "#56b4e9",
    "experts": "#0072b2",
    "attention": "#009e73",
    "routers": "#e69f00",
    "heads": "#cc79a7",
    "memory": "#8b97a3",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flame-moe",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#eef1f4",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH = 9.6
"""Inches that every figure is wide; the page scales it down on a narrow screen."""


class Picture(NamedTuple):
    """A figure ready for the page.

    Attributes:
        key: short unique name; prefix of every id inside, as ids must be unique in a page.
        svg: the inline SVG element.
        caption: how to read it.
    """

    key: str
    svg: str
    caption: str


def canvas(height: float) -> Figure:
    """An empty figure of full width. Call inside `matplotlib.rc_context(STYLE)`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def panels(count: int, *, header: float = 0.5, row: float | None = None) -> tuple[Figure, list[Axes]]:
    """Small multiples: `count` axes, three or four in a row (whichever leaves fewer holes), under a legend.

    Args:
        count: how many.
        header: inches above them.
        row: inches of a row of axes; by default what suits their width.
    """
    columns = min((4, 3), key=lambda wide: -count % wide)
    rows = -(-count // columns)
    figure = canvas(rows * (row or (2.1 if columns == 4 else 2.35)) + header)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def picture(figure: Figure, key: str, *, alt: str, caption: str) -> Picture:
    """Draw a figure as inline SVG.

    Drops the XML head and the metadata (which names outside addresses), makes ids unique in the page, removes the
    fixed size so that the page's width rules, and says in words what is to be seen.

    Args:
        alt: what a reader who cannot see the figure should know.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" {box.group() if box else ""} role="img" '
    return Picture(key, f'{opened}aria-label="{escape(alt, quote=True)}">{body}', caption)


def shorten(name: str, width: int = 26) -> str:
    """A name that fits above a panel; the tables carry it in full."""
    return name if len(name) <= width else f"{name[: width - 8]}...{name[-5:]}"


def ramp() -> LinearSegmentedColormap:
    """Light to dark of one hue, for shares between 0 and 1; white text on it is legible above 0.58, dark text below."""
    return LinearSegmentedColormap.from_list("ramp", ["#f4f8fb", "#8fc1de", OWN, "#00334f"])


def diverging() -> LinearSegmentedColormap:
    """Orange for worse, white for unchanged, blue for better; dark text is legible on all, to the colour-blind too."""
    return LinearSegmentedColormap.from_list("change", [RIVALS[0], "#ffffff", PARTS["encoders"]])
