"""The figures of a store: each reads plain data and gives a `Picture`, or None where there is nothing to draw."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from flame_moe.profile import FunnelStep, Histogram, Pattern, StoreProfile
from flame_moe.report.svg import INK, MUTED, OWN, RULE, STYLE, Picture, canvas, panels, picture, ramp, shorten

SPLIT_LOOKS = {"train": (OWN, "o"), "val": ("#e69f00", "s"), "test": ("#009e73", "D")}
ROWS = 60
"""Rows of the figure of labels at most; the table has all."""


def funnel(steps: Sequence[FunnelStep]) -> Picture | None:
    """Samples that stand after each rule."""
    if not steps:
        return None
    figure = canvas(0.35 + 0.62 * len(steps))
    ax = figure.add_subplot()
    places = np.arange(len(steps))
    top = max(1, *(step.before for step in steps))
    ax.barh(places, [step.before for step in steps], 0.34, color="#dbe7f0")
    ax.barh(places, [step.after for step in steps], 0.34, color=OWN)
    for place, step in zip(places, steps, strict=True):
        text = textwrap.shorten(step.text, 110, placeholder=" ...")
        ax.annotate(text, (0, place - 0.2), (0, 3), textcoords="offset points", fontsize=9, va="bottom")
        lost = f"  (\u2212{step.dropped:,})" if step.dropped else ""
        ax.annotate(
            f"{step.after:,}{lost}", (step.before, place), (6, 0), textcoords="offset points", va="center", fontsize=9
        )
    ax.set_xlim(0, top * 1.16)
    ax.set_ylim(len(steps) - 0.6, -0.75)
    _bare(ax)
    return picture(
        figure,
        "funnel",
        alt="Samples after each rule: " + "; ".join(f"{step.text}: {step.after:,}" for step in steps),
        caption="Dark: what stands after the rule. Light: what the rule left out, in brackets how many.",
    )


def labels(profile: StoreProfile) -> Picture | None:
    """Share of each class per split, one row per class."""
    rows = []
    for task in profile.tasks:
        classes = list(next((found.share for found in task.labels if found.share), {}))
        for name in classes[1:] if task.kind == "binary" else classes:
            rows.append((task.name, name, {f.split: f.share[name] for f in task.labels if name in f.share}))
    if not rows:
        return None
    shown = rows[:ROWS]
    figure = canvas(0.9 + 0.27 * len(shown))
    ax = figure.add_subplot()
    for split, (color, marker) in SPLIT_LOOKS.items():
        at = [(shares[split], i) for i, (_, _, shares) in enumerate(shown) if split in shares]
        if at:
            x, y = zip(*at, strict=True)
            ax.plot(x, y, linestyle="none", marker=marker, color=color, markersize=6.5, alpha=0.85, label=split)
    ax.set_yticks(range(len(shown)), [f"{shorten(task, 26)} \u00b7 {shorten(name, 34)}" for task, name, _ in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlim(0, max(max(shares.values()) for _, _, shares in shown) * 1.06 + 0.01)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    ax.grid(visible=True, axis="both")
    for i in range(1, len(shown)):
        if shown[i][0] != shown[i - 1][0]:
            ax.axhline(i - 0.5, color=RULE, lw=1)
    ax.set_xlabel("share of the labelled samples of the split")
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.6, borderpad=0.5)
    more = f" The first {ROWS} of {len(rows)} classes are drawn." if len(rows) > ROWS else ""
    return picture(
        figure,
        "labels",
        alt=f"Share of {len(shown)} classes in each split; the table below has the numbers.",
        caption="Of a task with two classes the positive one. Marks far apart: the splits differ, by chance where a "
        f"class is rare.{more}",
    )


def patterns(found: Sequence[Pattern], names: Sequence[str], samples: int) -> Picture | None:
    """Sets of modalities that samples have, one row each, with how many have it."""
    if len(names) < 2 or not found:
        return None
    figure = canvas(1.25 + 0.27 * len(found))
    left, right = figure.subplots(1, 2, width_ratios=[max(2, 0.42 * len(names)), 3])
    there = np.array([[name in pattern.modalities for name in names] for pattern in found])
    for mark, color in ((there, OWN), (~there, "#e6ebf0")):
        y, x = np.nonzero(mark)
        left.scatter(x, y, s=88, marker="s", color=color, linewidth=0)
    _heads(left, names)
    left.set_xlim(-0.6, len(names) - 0.4)
    left.set_yticks([])
    counts = [pattern.samples for pattern in found]
    right.barh(range(len(found)), counts, 0.62, color=OWN)
    for i, count in enumerate(counts):
        text = f"{count:,}  ({100 * count / max(samples, 1):.1f} %)"
        right.annotate(text, (count, i), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    right.set_xlim(0, max(counts) * 1.25)
    for ax in (left, right):
        ax.set_ylim(len(found) - 0.4, -0.6)
    left.spines[:].set_visible(False)
    left.tick_params(length=0)
    left.grid(visible=False)
    _bare(right)
    listed = sum(counts)
    rest = "" if listed == samples else f" The rows shown are {listed:,} of {samples:,} samples."
    return picture(
        figure,
        "patterns",
        alt=f"The {len(found)} most frequent sets of modalities; most frequent: {', '.join(found[0].modalities)}.",
        caption=f"Each row is a set of modalities: dark is there, light is absent. The bar says how many samples have "
        f"exactly this set.{rest}",
    )


def together(profile: StoreProfile) -> Picture | None:
    """Of the samples with the row's modality, the share that has the column's too."""
    names = [modality.name for modality in profile.modalities]
    counts = np.array(profile.together, dtype=float)
    if len(names) < 2 or (counts == counts.max()).all():
        return None
    with np.errstate(invalid="ignore"):
        share = counts / np.diag(counts)[:, None]
    figure = canvas(1.4 + 0.36 * len(names))
    ax = figure.add_subplot()
    ax.imshow(share, cmap=ramp(), vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(share):
        text = "\u2013" if np.isnan(value) else f"{100 * value:.0f} %"
        ax.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if value > 0.58 else INK)
    _heads(ax, names)
    sizes = np.diag(counts).astype(int)
    ax.set_yticks(range(len(names)), [f"{shorten(n, 26)} ({k:,})" for n, k in zip(names, sizes, strict=True)])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return picture(
        figure,
        "together",
        alt=f"Heat map over {len(names)} modalities: share of samples with one that also have the other.",
        caption="Of the samples that have the modality of the row (how many, in brackets), the share that has that of "
        "the column too.",
    )


def lengths(profile: StoreProfile) -> Picture | None:
    """Steps per sample of each modality that is a sequence."""
    drawn = {m.name: m.lengths for m in profile.modalities if m.lengths is not None}
    return _histograms(
        drawn,
        "lengths",
        "steps",
        alt=f"Histograms of the number of steps of {len(drawn)} modalities.",
        caption="How many steps a sample has, over the samples that have the modality. Bins grow where numbers are "
        "large, and the axis with them.",
    )


def times(profile: StoreProfile) -> Picture | None:
    """When steps are, as a part of the window."""
    drawn = {m.name: m.times for m in profile.modalities if m.times is not None}
    return _histograms(
        drawn,
        "times",
        "part of the window",
        alt=f"Histograms of the times of {len(drawn)} modalities, from 0 to the end of the window.",
        caption="When the steps are: 0 is the sample's origin, 1 the end of its window. A peak at 1 can be a leak: "
        "what is written when the stay ends.",
    )


def _histograms(drawn: dict[str, Histogram], key: str, label: str, *, alt: str, caption: str) -> Picture | None:
    if not drawn:
        return None
    figure, axes = panels(len(drawn), header=0.1)
    for ax, (name, found) in zip(axes, drawn.items(), strict=True):
        edges, counts = np.array(found.edges), np.array(found.counts)
        width = np.diff(edges)
        ax.bar(edges[:-1], counts, width, align="edge", color=OWN, edgecolor="white", linewidth=0.4)
        if len(width) > 1 and width[-1] > 1.5 * width[0] and edges[0] > 0:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            ax.xaxis.set_minor_formatter(lambda *_: "")
        elif key == "lengths":
            middle = edges[:-1] + 0.5
            keep = slice(None, None, -(-len(middle) // 6))
            ax.set_xticks(middle[keep], [f"{int(edge)}" for edge in edges[:-1][keep]])
        ax.set_title(shorten(name))
        ax.set_xlabel(label)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0].set_ylabel("samples" if key == "lengths" else "steps")
    return picture(figure, key, alt=alt, caption=caption)


def _heads(ax: Axes, names: Sequence[str]) -> None:
    """Names above the columns, slanted so that long ones fit."""
    texts = [shorten(name, 22) for name in names]
    ax.set_xticks(range(len(names)), texts, rotation=35, ha="left", rotation_mode="anchor")
    ax.xaxis.tick_top()


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(colors=MUTED)


def draw(profile: StoreProfile) -> dict[str, Picture | None]:
    """Every figure of a store's page, by name."""
    names = [modality.name for modality in profile.modalities]
    with mpl.rc_context(STYLE):
        return {
            "funnel": funnel(profile.funnel.steps),
            "labels": labels(profile),
            "patterns": patterns(profile.patterns, names, profile.samples),
            "together": together(profile),
            "lengths": lengths(profile),
            "times": times(profile),
        }
