"""The page of a store: one HTML file that opens offline, with every number taken from its profile."""

from __future__ import annotations

import math
from pathlib import Path

from flame_moe.files import write_text
from flame_moe.profile import ChannelRange, ModalityProfile, StoreProfile
from flame_moe.report import store_figures
from flame_moe.report.html import environment, inline, style
from flame_moe.report.tables import Cell, Table
from flame_moe.schema import SPLITS

FOLD = 14
"""A table of channels, defects or files longer than this is folded."""


def write_store_report(profile: StoreProfile, path: str | Path) -> Path:
    """Write the page atomically and return its path."""
    return write_text(path, render_store(profile))


def render_store(profile: StoreProfile) -> str:
    """The page as text. Everything that comes from the store is escaped."""
    return (
        environment()
        .get_template("store.html")
        .render(
            style=style(),
            profile=profile,
            fold=FOLD,
            sentence=_sentence(profile),
            figures=inline(store_figures.draw(profile)),
            counts=_counts(profile),
            splits=_splits(profile),
            labels=_labels(profile),
            presence=_presence(profile),
            modalities=_modalities(profile),
            events=[t for m in profile.modalities if m.events for t in [_events(m)]],
            channels=[_channels(m) for m in profile.modalities if m.channels],
            inputs=_inputs(profile),
        )
    )


def _sentence(profile: StoreProfile) -> str:
    counts = (
        (profile.samples, "sample", ""),
        (profile.subjects, "subject", " of "),
        (len(profile.modalities), "modality", ", "),
        (len(profile.tasks), "task", ", "),
    )
    return "".join(f"{before}{_many(n, noun)}" for n, noun, before in counts)


def _many(n: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def _counts(profile: StoreProfile) -> Table | None:
    rows = [(text, "", [Cell(f"{n:,}")]) for text, n in profile.funnel.counts.items()]
    return Table("Handled without leaving a sample out", ("What", "Times"), rows, []) if rows else None


def _splits(profile: StoreProfile) -> Table:
    rows = [(s.name, "", [Cell(f"{s.samples:,}"), Cell(f"{s.subjects:,}")]) for s in profile.splits]
    return Table("Splits", ("Split", "Samples", "Subjects"), rows, [profile.split])


def _labels(profile: StoreProfile) -> list[Table]:
    """One table per task: a row per class or value, a column per split."""
    tables = []
    for task in profile.tasks:
        found = {row.split: row for row in task.labels}
        names = list(dict.fromkeys(name for row in task.labels for name in (*row.share, *row.mean)))
        rows = []
        for name in names:
            cells = []
            for split in SPLITS:
                row = found.get(split)
                if row is not None and name in row.share:
                    cells.append(Cell(percent(row.share[name])))
                elif row is not None and name in row.mean:
                    cells.append(Cell(measure(row.mean[name]), f"mean; deviation {measure(row.std[name])}"))
                else:
                    cells.append(Cell("\u2013"))
            rows.append((name, "", cells))
        sizes = [Cell(f"{found[s].labelled:,}" if s in found else "0", strong=True) for s in SPLITS]
        notes = [text for text in (task.description, task.caveat) if text]
        notes.append(f"Reads {', '.join(task.modalities)}.")
        head = ("Class" if task.kind != "regression" else "Value", *SPLITS)
        tables.append(Table(f"{task.name} ({task.kind})", head, [("labelled samples", "", sizes), *rows], notes))
    return tables


def _presence(profile: StoreProfile) -> Table | None:
    rows = []
    for task in profile.tasks:
        for p in task.presence:
            with_it = Cell(percent(p.with_share), f"of {p.with_n:,}")
            without = Cell(percent(p.without_share), f"of {p.without_n:,}")
            rows.append((task.name, "", [Cell(p.label), Cell(p.modality), with_it, without]))
    head = ("Task", "Class", "Modality", "Share with it", "Share without it")
    caption = "Labels with and without a modality, training split"
    return Table(caption, head, rows, []) if rows else None


def _modalities(profile: StoreProfile) -> Table:
    rows = []
    for m in profile.modalities:
        cells = [Cell(m.kind), Cell(f"{m.features:,}")]
        cells += [Cell(percent(m.present[s]) if s in m.present else "\u2013") for s in SPLITS]
        cells.append(Cell("\u2013" if m.observed is None else percent(m.observed)))
        rows.append((m.name, m.description, cells))
    head = ("Modality", "Kind", "Features", *(f"In {s}" for s in SPLITS), "Cells observed")
    note = "Share of the samples of a split that have the modality; of its cells in training, the share observed."
    return Table("Modalities", head, rows, [note])


def _events(modality: ModalityProfile) -> Table:
    rows = [(name, "", [Cell(f"{n:,}")]) for name, n in modality.events.items()]
    return Table(f"Events of {modality.name} by type", ("Type", "Events"), rows, [])


def _channels(modality: ModalityProfile) -> Table:
    rows = []
    for channel in modality.channels:
        cells = [Cell(percent(channel.observed)), *(Cell(text) for text in _quantiles(channel))]
        rows.append((channel.name, channel.unit, cells))
    head = ("Channel, unit", "Observed", "Smallest", "5 %", "25 %", "Median", "75 %", "95 %", "Largest")
    notes = []
    if modality.read < modality.of:
        notes.append(f"From {modality.read:,} evenly spaced of {modality.of:,} training samples.")
    return Table(f"{modality.name}: {len(modality.channels)} channels, training split", head, rows, notes)


def _quantiles(channel: ChannelRange) -> list[str]:
    return [measure(value) for value in channel.quantiles] or ["\u2013"] * 7


def _inputs(profile: StoreProfile) -> Table | None:
    rows = [(file.name, "", [Cell(f"{file.bytes:,}"), Cell(file.sha256)]) for file in profile.inputs]
    return Table("Files read", ("File", "Bytes", "SHA-256"), rows, []) if rows else None


def percent(share: float) -> str:
    """A share as a percentage.

    Example:
        >>> percent(0.1234)
        '12.3 %'
    """
    return "n/a" if math.isnan(share) else f"{100 * share:.1f} %"


def measure(value: float) -> str:
    """A measured value to four digits, without an exponent where it can be avoided.

    Example:
        >>> measure(1234.567), measure(0.012345), measure(-3.0)
        ('1,235', '0.01235', '\\u22123')
    """
    if math.isnan(value):
        return "n/a"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "\u2212")
