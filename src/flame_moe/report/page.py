"""The report page: one HTML file that opens offline, with every number taken from `Results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from flame_moe.files import write_text
from flame_moe.measures import BACKWARD, measures
from flame_moe.progression import Progression, progression
from flame_moe.report import figures, stream, tables
from flame_moe.report.glossary import GLOSSARY
from flame_moe.report.html import environment, inline, style
from flame_moe.report.tables import change
from flame_moe.results import PRIMARY, Results


class Tile(NamedTuple):
    """One number of the headline: the value, what it is, and what it means."""

    value: str
    label: str
    note: str
    good: bool = False


def write_report(results: Results, path: str | Path) -> Path:
    """Write the report atomically and return its path.

    Example:
        >>> write_report(Results.load("results.json"), "report.html")  # doctest: +SKIP
    """
    return write_text(path, render(results))


def render(results: Results) -> str:
    """The page as text. Everything that comes from the results is escaped."""
    template = environment().get_template("template.html")
    return template.render(
        style=style(),
        results=results,
        sentence=_sentence(results),
        tiles=_tiles(results),
        figures=inline(figures.draw(results)),
        performance=tables.performance(results),
        transfer=tables.transfer(results),
        measures=stream.measured(results),
        answers=tables.answers(results),
        drift=tables.drift(results),
        footprint=tables.footprint(results),
        stages=tables.stages(results),
        commits=[t for t in (tables.commits(results), tables.truncation(results)) if t],
        cohort=[t for t in (tables.funnel(results), tables.missingness(results), tables.prevalence(results)) if t],
        measured=_measured(results),
        recipe=json.dumps(results.recipe, indent=2, ensure_ascii=False),
        glossary=GLOSSARY,
    )


def _sentence(results: Results) -> str:
    """The run in one sentence."""
    count, stages = sum(len(stage.tasks) for stage in results.stages), len(results.stages)
    learned = f"{_many(count, 'task')} learned in {_many(stages, 'stage')}"
    if not results.drift:
        return f"{learned}."
    if all(row.bitwise_equal for row in results.drift):
        return f"{learned}. Not one earlier prediction changed."
    return f"{learned}. Earlier predictions changed."


def _tiles(results: Results) -> list[Tile]:
    tiles = [_stability(results)]
    if results.last_stage > 0:
        metric = _headline_metric(results)
        own = _moved(progression(results, metric))
        label = f"mean change of {metric.upper()} on earlier tasks"
        tiles.append(Tile(change(own), f"{results.method}: {label}", "test split, since learned", good=own >= 0))
        for other in results.comparison:
            moved = _moved(progression(results, metric, evaluations=other.evaluations))
            tiles.append(Tile(change(moved), f"{other.name}: {label}", "the same stream and test split"))
    if results.footprint:
        last = [row for row in results.footprint if row.after_stage == results.last_stage]
        trained, live = sum(r.trainable_parameters for r in last), sum(r.live_parameters for r in last)
        note = f"of {live:,} that are live while predicting"
        tiles.append(Tile(f"{trained / 1e3:,.0f} k", "parameters trained in the last stage", note))
    return tiles


def _moved(table: Progression) -> float:
    """Mean backward transfer."""
    return next(m.value for m in measures(table) if m.name == BACKWARD)


def _stability(results: Results) -> Tile:
    """The promise of the method, or the honest number."""
    label = "largest change of any earlier prediction"
    if not results.drift:
        why = "one stage: there is no earlier task yet" if results.last_stage == 0 else "not measured in this run"
        return Tile("\u2013", label, why)
    if all(row.bitwise_equal for row in results.drift):
        return Tile("0", label, "bitwise equal: every logit of every earlier task is the same number", good=True)
    worst = max(results.drift, key=lambda row: row.max_abs_logit_change)
    size = f"{worst.max_abs_logit_change:.3g}"
    return Tile(size, label, f"in logits, of '{worst.task}' after stage {worst.after_stage}; not bitwise equal")


def _headline_metric(results: Results) -> str:
    """AUROC where any earlier task has it, else the primary metric of the first one."""
    kinds = {task.name: task.kind for task in results.tasks}
    earlier = [PRIMARY[kinds[name]] for stage in results.stages[:-1] for name in stage.tasks]
    return "auroc" if "auroc" in earlier else earlier[0]


def _measured(results: Results) -> list[tuple[str, str]]:
    """How the numbers came about, as (name, value)."""
    e = results.environment
    train = results.recipe.get("train", {})
    resamples = train.get("bootstrap") if isinstance(train, dict) else None
    rows = [
        ("Run", f"{results.name}, {results.created}"),
        ("Method", results.method),
        ("Seed", str(results.seed)),
        ("Selection", "; ".join(sorted({row.selection for row in results.evaluations if row.selection}))),
        ("Intervals", "95 % percentile bootstrap" + (f", {resamples} resamples" if resamples else "")),
        ("Software", f"flame-moe {e.package}, torch {e.torch}, numpy {e.numpy}, Python {e.python}"),
        ("Commit", e.git_commit or ""),
        ("Machine", ", ".join(part for part in (e.cpu, e.gpu, e.platform) if part)),
        ("Threads", str(e.threads)),
        ("Matrix products", e.products),
        *_certified(results),
        *((f"Seconds of {name}", tables.number(value)) for name, value in results.timings.items()),
    ]
    return [(name, value) for name, value in rows if value]


def _certified(results: Results) -> list[tuple[str, str]]:
    """Which tasks are certified since when, and the digest to compare with the one that was noted."""
    if results.certificate is None:
        return []
    found = {row.task: row.issued for row in results.certificate.tasks}
    without = [task.name for task in results.tasks if task.name not in found]
    said = [", ".join(f"{task} since {issued}" for task, issued in found.items())]
    said += [f"without a certificate: {', '.join(without)}"] if without else []
    return [("Certified", "; ".join(said)), ("Digest of the certificate", results.certificate.digest)]


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
