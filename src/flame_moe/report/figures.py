"""The figures of the report: each reads `Results` and gives a `Picture`, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flame_moe.progression import Progression, progression
from flame_moe.report.store_figures import funnel, patterns
from flame_moe.report.stream import matrix
from flame_moe.report.svg import (
    INK,
    MUTED,
    OWN,
    PARTS,
    RIVALS,
    RULE,
    STYLE,
    Picture,
    canvas,
    panels,
    picture,
    ramp,
    shorten,
)
from flame_moe.results import PRIMARY, Drift, Footprint, Results, Routing

MARKERS, DASHES = ("s", "^", "D", "v"), ("--", ":", "-.", (0, (5, 1)))


def trajectories(results: Results) -> Picture | None:
    """Test metric of each task after every stage since it was learned, every method on the same axes."""
    if results.last_stage == 0:
        return None
    kinds = {task.name: task.kind for task in results.tasks}
    order = [task for stage in results.stages for task in stage.tasks]
    sources = [(results.method, results.evaluations), *((c.name, c.evaluations) for c in results.comparison)]
    tables = {
        metric: [(name, progression(results, metric, evaluations=rows)) for name, rows in sources]
        for metric in {PRIMARY[kinds[task]] for task in order}
    }
    figure, axes = panels(len(order))
    for ax, task in zip(axes, order, strict=True):
        metric = PRIMARY[kinds[task]]
        for i, (name, table) in reversed(list(enumerate(tables[metric]))):
            _trajectory(ax, table, task, name, i)
        ax.set_title(shorten(task))
        ax.set_ylabel(metric.upper())
        ax.set_ylim(*_limits([table for _, table in tables[metric]]))
        ax.set_xticks(range(len(results.stages)), [f"stage {s.index}" for s in results.stages])
        ax.set_xlim(-0.25, len(results.stages) - 0.75)
    _legend(figure, axes[0], reverse=True)
    return picture(
        figure,
        "trajectories",
        alt=f"Test metric of {len(order)} tasks after each of {len(results.stages)} stages, for "
        + " and ".join(name for name, _ in sources)
        + ". The values are in the results file; final ones are in the table above.",
        caption="Each task from the stage that learned it onwards, on the same test samples. Bands are 95 % bootstrap "
        "intervals. A flat line is no forgetting; panels with the same metric share their axis.",
    )


def _trajectory(ax: Axes, table: Progression, task: str, name: str, rank: int) -> None:
    row, stages = table.tasks.index(task), np.arange(table.values.shape[1])
    color = OWN if rank == 0 else RIVALS[(rank - 1) % len(RIVALS)]
    line = "-" if rank == 0 else DASHES[(rank - 1) % len(DASHES)]
    marker = "o" if rank == 0 else MARKERS[(rank - 1) % len(MARKERS)]
    known = ~np.isnan(table.low[row])
    ax.fill_between(stages[known], table.low[row][known], table.high[row][known], color=color, alpha=0.13, linewidth=0)
    if known.sum() == 1:
        ax.vlines(stages[known], table.low[row][known], table.high[row][known], color=color, alpha=0.3, linewidth=3)
    ax.plot(stages, table.values[row], color=color, linestyle=line, marker=marker, markersize=4.5, lw=1.8, label=name)


def _limits(tables: list[Progression]) -> tuple[float, float]:
    """One range for all panels of a metric, with some air."""
    every = np.concatenate([np.concatenate([t.values, t.low, t.high]).ravel() for t in tables])
    every = every[~np.isnan(every)]
    if len(every) == 0:
        return 0.0, 1.0
    air = max(0.02, 0.08 * float(np.ptp(every)))
    return float(every.min()) - air, float(every.max()) + air


def drift(results: Results) -> Picture | None:
    """Largest logit change of each earlier task over all later stages, one row per task."""
    sources = [(results.method, results.drift), *((c.name, c.drift) for c in results.comparison)]
    later = {d.task for d in results.drift if d.after_stage > results.learned_in(d.task)}
    order = [task for stage in results.stages for task in stage.tasks if task in later]
    if not order:
        return None
    figure = canvas(0.95 + 0.34 * len(order))
    ax = figure.add_subplot()
    places = np.arange(len(order))
    for i, (name, rows) in enumerate(sources):
        largest = [_largest(rows, task) for task in order]
        color = OWN if i == 0 else RIVALS[(i - 1) % len(RIVALS)]
        marker = "o" if i == 0 else MARKERS[(i - 1) % len(MARKERS)]
        ax.hlines(places, 0, largest, color=color, lw=2.2, alpha=0.35)
        ax.plot(largest, places, linestyle="none", marker=marker, color=color, markersize=8, label=name, clip_on=False)
    ax.set_yticks(places, [shorten(task, 40) for task in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", pad=9)
    ax.set_xlabel("largest absolute change of a logit since the task was learned")
    _legend(figure, ax)
    return picture(
        figure,
        "drift",
        alt="Largest change of any logit per task; "
        + "; ".join(f"{name}: {max(_largest(rows, task) for task in order):.3g} at most" for name, rows in sources),
        caption="A point at zero: the prediction of every test sample is the same number it was on the day the task "
        "was learned.",
    )


def _largest(rows: tuple[Drift, ...], task: str) -> float:
    return max((row.max_abs_logit_change for row in rows if row.task == task), default=float("nan"))


def footprint(results: Results) -> Picture | None:
    """Live, stored and trained parameters per stage, stacked by part of the model."""
    if not results.footprint:
        return None
    quantities: tuple[tuple[str, Callable[[Footprint], int]], ...] = (
        ("Live while predicting", lambda f: f.live_parameters),
        ("Stored in the checkpoint", lambda f: f.stored_parameters),
        ("Trained in the stage", lambda f: f.trainable_parameters),
    )
    figure, axes = panels(3)
    stages = sorted({row.after_stage for row in results.footprint})
    for ax, (title, of) in zip(axes, quantities, strict=True):
        floor = np.zeros(len(stages))
        for part, color in PARTS.items():
            rows = [[of(f) for f in results.footprint if (f.after_stage, f.part) == (s, part)] for s in stages]
            height = np.array([sum(row) for row in rows]) / 1e3
            ax.bar(stages, height, 0.62, bottom=floor, color=color, edgecolor="white", linewidth=0.8, label=part)
            floor = floor + height
        for stage, total in zip(stages, floor, strict=True):
            ax.annotate(
                f"{total:,.0f} k", (stage, total), (0, 3), textcoords="offset points", ha="center", fontsize=8.5
            )
        ax.set_title(title)
        ax.set_xticks(stages, [f"stage {s}" for s in stages])
        ax.set_xlim(stages[0] - 0.7, stages[-1] + 0.7)
    top = max(ax.get_ylim()[1] for ax in axes) * 1.08
    for ax in axes:
        ax.set_ylim(0, top)
    axes[0].set_ylabel("thousand parameters")
    _legend(figure, axes[0])
    return picture(
        figure,
        "footprint",
        alt="Stacked bars of live, stored and trained parameters per stage by part; the table below has the numbers.",
        caption="What serving holds in memory, what the checkpoint stores so that every earlier task can be "
        "reproduced, and what each stage trained.",
    )


def routing(results: Results) -> Picture | None:
    """Heat map of the share of samples that each task and modality sends to each expert, per block."""
    rows = [r for r in results.routing if r.after_stage == max(r.after_stage for r in results.routing)]
    if not rows:
        return None
    blocks = sorted({r.block for r in rows})
    labels = list(dict.fromkeys((r.task, r.modality) for r in rows))
    experts = max(len(r.activation) for r in rows)
    figure = canvas(0.9 + 0.27 * len(labels))
    axes = figure.subplots(1, len(blocks), squeeze=False, sharey=True)[0]
    for ax, block in zip(axes, blocks, strict=True):
        share = np.full((len(labels), experts), np.nan)
        for r in rows:
            if r.block == block:
                share[labels.index((r.task, r.modality)), : len(r.activation)] = r.activation
        ax.imshow(share, cmap=ramp(), vmin=0, vmax=1, aspect="auto")
        if experts * len(blocks) <= 24:
            for (y, x), value in np.ndenumerate(share):
                ax.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.58 else INK
                )
        ax.set_xticks(range(experts), [str(e) for e in range(experts)])
        ax.set_yticks(range(len(labels)), [f"{shorten(task, 30)} \u00b7 {modality}" for task, modality in labels])
        ax.set_xlabel("expert")
        ax.set_title(f"Block {block}")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        for y in range(1, len(labels)):
            ax.axhline(y - 0.5, color="white", lw=3 if labels[y][0] != labels[y - 1][0] else 0.8)
    return picture(
        figure,
        "routing",
        alt=f"Heat map: {len(labels)} task and modality rows by {experts} experts, share of samples routed to each.",
        caption="Share of samples that the router of each modality sends to each expert, per task, after the last "
        "stage. Rows with the same pattern share experts; dark cells are specialists." + _fixed(rows),
    )


def _fixed(rows: Sequence[Routing]) -> str:
    """How many of the routes ignore the sample: a fact that the colours alone do not show."""
    known = [r.usual for r in rows if r.usual is not None]
    fixed = sum(usual >= 0.99 for usual in known)
    if not known:
        return ""
    return (
        f" In {fixed} of {len(known)} rows at least 99 % of the samples take the same experts: there the router "
        "tells modalities apart, not samples."
    )


def calibration(results: Results) -> Picture | None:
    """Observed frequency against predicted probability, per task, after the last stage."""
    curves = [c for c in results.calibration if c.after_stage == results.last_stage and c.split == "test"]
    if not curves:
        return None
    figure, axes = panels(len(curves), header=0.1)
    for ax, curve in zip(axes, curves, strict=True):
        bins = [b for b in curve.bins if b.n]
        size = np.sqrt([b.n for b in bins])
        ax.plot([0, 1], [0, 1], color=MUTED, lw=1, linestyle=(0, (4, 3)))
        ax.plot([b.confidence for b in bins], [b.frequency for b in bins], color=OWN, lw=1.4)
        ax.scatter(
            [b.confidence for b in bins],
            [b.frequency for b in bins],
            s=10 + 60 * size / max(size.max(initial=1), 1),
            color=OWN,
            edgecolor="white",
            linewidth=0.7,
            zorder=3,
        )
        ax.set_title(shorten(curve.task))
        ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        ax.set_xlabel("predicted probability")
    axes[0].set_ylabel("observed frequency")
    return picture(
        figure,
        "calibration",
        alt=f"Calibration curves of {len(curves)} tasks on the test split; points on the diagonal are calibrated.",
        caption="On the dashed diagonal a predicted 30 % happens in 30 % of cases; below it risks are overstated. The "
        "area of a point grows with the number of predictions in the bin.",
    )


def training(results: Results) -> Picture | None:
    """Training and validation loss of each task in the stage that learned it."""
    drawn = [(stage, task) for stage in results.stages if stage.history for task in stage.tasks]
    if not drawn:
        return None
    figure, axes = panels(len(drawn))
    for ax, (stage, task) in zip(axes, drawn, strict=True):
        epochs = [e.epoch for e in stage.history]
        for label, style, color, losses in (
            ("training loss", "-", MUTED, [e.train_loss.get(task, np.nan) for e in stage.history]),
            ("validation loss", "--", OWN, [e.val_loss.get(task, np.nan) for e in stage.history]),
        ):
            if np.isnan(losses).all():
                continue
            single = "o" if len(epochs) == 1 else None
            ax.plot(epochs, losses, color=color, linestyle=style, lw=1.7, marker=single, markersize=4, label=label)
        ax.axvline(stage.best_epoch, color=RULE, lw=5, zorder=0, label="chosen epoch")
        ax.set_title(f"{shorten(task)} (stage {stage.index})" if len(task) < 16 else shorten(task))
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes[0].set_ylabel("loss")
    _legend(figure, axes[0])
    return picture(
        figure,
        "training",
        alt=f"Loss per epoch of {len(drawn)} tasks, with the chosen epoch marked.",
        caption="Loss of each task in the stage that learned it; the grey bar marks the epoch whose weights were kept.",
    )


def cohort(results: Results) -> Picture | None:
    """How raw records became samples."""
    return None if results.data is None else funnel(results.data.funnel.steps)


def missing(results: Results) -> Picture | None:
    """Which modalities samples have together."""
    if results.data is None or results.data.samples is None:
        return None
    names = [row.modality for row in results.data.missingness]
    return patterns(results.data.patterns, names, results.data.samples)


def _legend(figure: Figure, ax: Axes, *, reverse: bool = False) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if reverse:
        handles, labels = handles[::-1], labels[::-1]
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), columnspacing=1.6, borderpad=0.5)


DRAWN: dict[str, Callable[[Results], Picture | None]] = {
    "trajectories": trajectories,
    "matrix": matrix,
    "drift": drift,
    "footprint": footprint,
    "routing": routing,
    "calibration": calibration,
    "training": training,
    "funnel": cohort,
    "patterns": missing,
}


def draw(results: Results) -> dict[str, Picture | None]:
    """Every figure of the report, by name."""
    with mpl.rc_context(STYLE):
        return {name: figure(results) for name, figure in DRAWN.items()}
