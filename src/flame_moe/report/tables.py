"""The tables of the report, as plain rows of formatted cells, and the summary for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table as RichTable
from rich.text import Text

from flame_moe.measures import backward_transfer
from flame_moe.progression import progression
from flame_moe.results import PRIMARY, AnswerTask, Drift, Evaluation, Results
from flame_moe.schema import Task

GROUPS = (
    ("Classification", ("auroc", "auprc", "f1", "accuracy", "brier", "ece")),
    ("Regression", ("r2", "rmse", "mae")),
)
ABSENT = "n/a"


class Cell(NamedTuple):
    """One cell: its text, a smaller second line, and whether it is computed from other numbers of the results."""

    text: str
    below: str = ""
    derived: bool = False
    strong: bool = False


class Table(NamedTuple):
    """A table with a caption, column heads, rows of (name, smaller line, cells) and footnotes."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, str, list[Cell]]]
    notes: list[str]


def number(value: float) -> str:
    """Three decimals below 100, one above; a value that does not exist is said so.

    Example:
        >>> number(0.84249), number(1234.56), number(float("nan"))
        ('0.842', '1,234.6', 'n/a')
    """
    if math.isnan(value):
        return ABSENT
    text = f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return text.replace("-", "\u2212")


def change(value: float) -> str:
    """A signed difference, so that zero reads as zero."""
    return ABSENT if math.isnan(value) else f"{value:+.3f}".replace("-", "\u2212") if value else "0"


def logit_change(row: Drift) -> Cell:
    """Zero is written as zero only where every bit is the same."""
    if row.bitwise_equal:
        return Cell("0", "bitwise equal", strong=True)
    return Cell(f"{row.max_abs_logit_change:.3g}" if row.max_abs_logit_change else "0", "not bitwise equal")


def interval(evaluation: Evaluation, metric: str) -> str:
    """The 95 % interval of a metric, or empty where there is none."""
    low, high = evaluation.ci.get(metric, (math.nan, math.nan))
    return "" if math.isnan(low) else f"{number(low)} to {number(high)}"


def performance(results: Results) -> list[Table]:
    """Final test metrics with intervals, one table for classification and one for regression."""
    tables = []
    for title, metrics in GROUPS:
        rows, notes = [], []
        for task in _in_order(results):
            final = results.final(task.name)
            if final is None or not any(metric in final.metrics for metric in metrics):
                continue
            cells = [Cell(task.kind), Cell(str(results.learned_in(task.name))), Cell(f"{final.n:,}")]
            cells += [
                Cell(number(final.metrics.get(m, math.nan)), interval(final, m), strong=m == PRIMARY[task.kind])
                for m in metrics
            ]
            rows.append((task.name, task.description, cells))
            notes += [f"{task.name}: {said}" for said in (final.note, task.caveat) if said]
        if rows:
            head = ("Task", "Kind", "Stage", "n", *(metric_title(m) for m in metrics))
            tables.append(Table(f"{title}: test split after stage {results.last_stage}", head, rows, notes))
    return tables


def transfer(results: Results) -> Table | None:
    """Primary metric of each earlier task when it was learned and now, for every method."""
    earlier = [task for task in _in_order(results) if results.learned_in(task.name) < results.last_stage]
    if not earlier:
        return None
    sources = [(results.method, results.evaluations), *((c.name, c.evaluations) for c in results.comparison)]
    rows = []
    for task in earlier:
        cells = [Cell(metric_title(PRIMARY[task.kind]))]
        for _, evaluations in sources:
            table = progression(results, PRIMARY[task.kind], evaluations=evaluations)
            i = table.tasks.index(task.name)
            first, last = table.values[i, table.learned[i]], table.values[i, -1]
            moved = backward_transfer(table)[task.name]
            cells += [Cell(number(first)), Cell(number(last)), Cell(change(moved), derived=True, strong=True)]
        rows.append((task.name, "", cells))
    head = [f"{name}: {what}" for name, _ in sources for what in ("when learned", "now", "change")]
    return Table("Earlier tasks then and now", ("Task", "Metric", *head), rows, [])


def answers(results: Results) -> list[Table]:
    """Of a stream of a language model: what the base could do, what each stage cost and kept, and the measures."""
    found = results.answers
    if found is None:
        return []
    routed = {(row.after_stage, row.task): row for row in found.routing}
    before = [("before", "", [Cell(number(found.before[name]), strong=True) for name in found.before])]
    rows = []
    for stage, record in zip(found.stages, results.stages, strict=True):
        own = [routed[stage.after_stage, t.name].own for t in results.tasks if (stage.after_stage, t.name) in routed]
        kept = "\u2013" if stage.foundation is None else number(stage.foundation)
        share = "\u2013" if not own else number(sum(own) / len(own))
        lost = "\u2013" if stage.foundation_nats is None else number(stage.foundation_nats)
        said = (f"{stage.samples:,}", f"{stage.steps:,}", number(stage.seconds), kept, lost)
        rows.append((", ".join(record.tasks), "", [*map(Cell, said), Cell(share, derived=bool(own))]))
    values = [(name, "", [Cell(number(value))]) for name, value in found.measures.items()]
    head = ("Stage", "Samples shown", "Steps", "Seconds of training", "Foundation", "in nats per token", "Own expert")
    nats = found.foundation_nats
    notes = ["Own expert: share of the routing weight on the expert of the sample's task."]
    notes += [] if nats is None else [f"Foundation before: {number(nats)} nats per token of the answers."]
    return [
        Table("Exact match of the base model, before any stage", ("", *found.before), before, [found.licence]),
        Table("What each stage cost, and what it left of the base model's skills", head, rows, notes),
        Table("Measures of continual instruction tuning", ("Measure", "Value"), values, []),
    ]


def drift(results: Results) -> Table | None:
    """Largest logit change of each task after each later stage, for every method."""
    if not results.drift:
        return None
    stages = sorted({row.after_stage for row in results.drift})
    sources = [(results.method, results.drift), *((c.name, c.drift) for c in results.comparison if c.drift)]
    rows = []
    for task in _in_order(results):
        if not any(row.task == task.name for row in results.drift):
            continue
        cells = []
        for _, measured in sources:
            found = {row.after_stage: row for row in measured if row.task == task.name}
            cells += [logit_change(found[s]) if s in found else Cell("\u2013") for s in stages]
        rows.append((task.name, "", cells))
    head = [f"{name}: after stage {s}" for name, _ in sources for s in stages]
    return Table("Largest absolute change of any logit since the task was learned", ("Task", *head), rows, [])


def footprint(results: Results) -> Table | None:
    """Parameters and bytes per stage and part."""
    if not results.footprint:
        return None
    rows = []
    for f in results.footprint:
        sizes = (
            (f.live_parameters, f.live_bytes),
            (f.inference_parameters, f.inference_bytes),
            (f.method_parameters, f.method_bytes),
            (f.stored_parameters, f.stored_bytes),
        )
        cells = [Cell(_count(numbers), _bytes(space)) for numbers, space in sizes]
        rows.append((str(f.part), "", [Cell(str(f.after_stage)), *cells, Cell(_count(f.trainable_parameters))]))
    head = ("Part", "After stage", "Live", "A: to predict every task", "B: of the method", "Stored", "Trained")
    notes = [
        "Live: what predicting at the newest cursor reads. A: what predicting any task learned so far reads. B: of A, "
        "the weights that a stage may change, with all that stages left in them; no heads or routers. Stored: the file."
    ]
    return Table("Parameters and bytes by part", head, rows, notes)


def _count(value: int | None) -> str:
    return "\u2013" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value:,} bytes"


def stages(results: Results) -> Table:
    """What each stage learned, from what, for how long, and in how much memory, by every method."""
    rows = []
    for method, learned in [("", results.stages), *((c.name, c.stages) for c in results.comparison)]:
        for stage in learned:
            names = [", ".join(stage.tasks), ", ".join(stage.new_modalities) or "none"]
            figures = [str(stage.epochs_run), str(stage.best_epoch), number(stage.seconds), _count(stage.peak_bytes)]
            rows.append((f"Stage {stage.index}", method, [Cell(text) for text in (*names, *figures)]))
    head = ("Stage", "Tasks", "New modalities", "Epochs", "Best epoch", "Seconds", "Peak memory in bytes")
    return Table("Stages", head, rows, [])


def commits(results: Results) -> Table | None:
    """What truncation to a low rank left out, per stage: the matrix that lost most."""
    if not results.commits:
        return None
    rows = []
    for index in sorted({c.stage for c in results.commits}):
        of_stage = [c for c in results.commits if c.stage == index]
        worst = max(of_stage, key=lambda c: -1.0 if math.isnan(c.relative_error) else c.relative_error)
        rank = "dense" if worst.rank is None else str(worst.rank)
        dense = sum(c.rank is None for c in of_stage)
        kept = None if any(c.parameters is None for c in of_stage) else sum(c.parameters or 0 for c in of_stage)
        sums = (str(len(of_stage)), str(dense), "\u2013" if kept is None else f"{kept:,}")
        function = "\u2013" if worst.functional_error is None else number(worst.functional_error)
        cells = [Cell(rank), Cell(number(worst.relative_error)), Cell(function), Cell(worst.matrix)]
        rows.append((f"Stage {index}", "", [*(Cell(text, derived=True) for text in sums), *cells]))
    head = ("Stage", "Matrices", "Dense", "Numbers kept", "Rank of the worst", "Its error", "Of its function", "Which")
    return Table("Truncation of the stage's update to low rank", head, rows, [])


def truncation(results: Results) -> Table | None:
    """Metrics of a stage's tasks just before and just after its updates were cut, on validation."""
    rows = []
    for row in results.truncations:
        names = [name for name in (PRIMARY[_task(results, row.task).kind], "f1", "ece") if name in row.before]
        for name in names:
            said = (str(row.stage), row.split, metric_title(name), number(row.before[name]), number(row.after[name]))
            rows.append((row.task, "", [Cell(text) for text in said]))
    head = ("Task", "Stage", "Split", "Metric", "Before", "After")
    return Table("Cost of truncation: metrics before and after", head, rows, []) if rows else None


def funnel(results: Results) -> Table | None:
    """How raw records became samples."""
    if results.data is None or not results.data.funnel.steps:
        return None
    rows = [
        (step.text, "", [Cell(f"{count:,}") for count in (step.before, step.dropped, step.after)])
        for step in results.data.funnel.steps
    ]
    notes = [f"{text}: {count:,}" for text, count in results.data.funnel.counts.items()]
    return Table("Cohort", ("Rule", "Before", "Left out", "After"), rows, notes)


def prevalence(results: Results) -> Table | None:
    """Labelled samples per learned task and split, and the share of each class."""
    if results.data is None:
        return None
    kinds = {task.name: task.kind for task in results.tasks}
    rows = []
    for row in (row for row in results.data.prevalence if row.task in kinds):
        share = row.share
        if kinds[row.task] == "binary" and len(share) == 2:
            share = dict(list(share.items())[1:])
        said = ", ".join(f"{name} {number(value)}" for name, value in share.items())
        if len(share) > 6:
            said = f"{number(min(share.values()))} to {number(max(share.values()))} over all labels"
        rows.append((row.task, "", [Cell(row.split), Cell(f"{row.n:,}"), Cell(said)]))
    return Table("Labels", ("Task", "Split", "n", "Share of samples"), rows, []) if rows else None


def missingness(results: Results) -> Table | None:
    """How many samples have each modality, and how densely it is observed."""
    if results.data is None or not results.data.missingness:
        return None
    rows = [
        (m.modality, "", [Cell(number(m.present)), Cell("\u2013" if m.observed is None else number(m.observed))])
        for m in results.data.missingness
    ]
    return Table("Modalities", ("Modality", "Share of samples with it", "Share of its cells observed"), rows, [])


def summary_table(results: Results) -> RichTable:
    """The run in a terminal: one line per task with its final test metric and its largest logit change.

    Example:
        >>> rich.print(summary_table(Results.load("results.json")))  # doctest: +SKIP
    """
    table = RichTable(title=Text(f"{results.name}: test split after stage {results.last_stage}"))
    for head in ("task", "stage", "n", "metric", "value", "95 % interval", "largest logit change"):
        table.add_column(head, justify="left" if head in ("task", "metric") else "right")
    for task in _in_order(results):
        final = results.final(task.name)
        metric = PRIMARY[task.kind]
        value = ABSENT if final is None else number(final.metrics.get(metric, math.nan))
        between = "" if final is None else interval(final, metric)
        size = "" if final is None else f"{final.n:,}"
        cells = (task.name, str(results.learned_in(task.name)), size, metric_title(metric), value, between)
        table.add_row(*(Text(cell) for cell in (*cells, _worst(results, task.name))))
    return table


def _worst(results: Results, task: str) -> str:
    rows = [row for row in results.drift if row.task == task]
    if not rows:
        return "no later stage"
    if all(row.bitwise_equal for row in rows):
        return "0 (bitwise equal)"
    return f"{max(row.max_abs_logit_change for row in rows):.3g}"


def _in_order(results: Results) -> Sequence[Task | AnswerTask]:
    """Tasks as they were learned."""
    return [_task(results, name) for stage in results.stages for name in stage.tasks]


def _task(results: Results, name: str) -> Task | AnswerTask:
    return next(task for task in results.tasks if task.name == name)


def metric_title(metric: str) -> str:
    """How a metric is written."""
    return {"f1": "F1", "accuracy": "Accuracy", "brier": "Brier", "r2": "R2"}.get(metric, metric.upper())
