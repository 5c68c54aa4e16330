"""Tables for the terminal: what a store holds, what a run found, how methods compare."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence

import polars as pl
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flame_moe.certification import Verification
from flame_moe.continual.certificate import TOLERANCE, Verdict
from flame_moe.continual.identity_cost import IdentityCost
from flame_moe.data.store import Store
from flame_moe.data.summary import describe_store
from flame_moe.mllm.measures import ANSWER_FORMULAS
from flame_moe.report.tables import interval, number, summary_table, transfer
from flame_moe.results import Evaluation, Results
from flame_moe.schema import SPLITS, Task

PIPE_WIDTH = 120
HEAD = 10


def output() -> Console:
    """The console of results: as wide as the terminal, or wide enough not to break tables in a pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def show_store(console: Console, store: Store) -> None:
    """Cohort, handled defects, labels per split and missing modalities of a store."""
    plain = describe_store(store)
    steps = [(s["text"], f"{s['before']:,}", f"{s['dropped']:,}", f"{s['after']:,}") for s in plain["funnel"]["steps"]]
    console.print(_table("Cohort", ("rule", "before", "left out", "after"), steps))
    if counts := plain["funnel"]["counts"]:
        rows = [(text, f"{n:,}") for text, n in counts.items()]
        console.print(_table("Handled without leaving a sample out", ("what", "times"), rows))
    sizes = [(s, f"{c['samples']:,}", f"{c['subjects']:,}") for s, c in plain["counts"].items()]
    console.print(_table("Splits, by subject", ("split", "samples", "subjects"), sizes))
    labels = [
        (name, store.tasks[name].kind, *(_label(store.tasks[name], by_split.get(s, {})) for s in SPLITS))
        for name, by_split in plain["labels"].items()
    ]
    console.print(_table("Labels: number, and share or mean", ("task", "kind", *SPLITS), labels))
    missing = [
        (name, store.modalities[name].kind, *(_percent(by_split.get(s)) for s in SPLITS))
        for name, by_split in plain["missing"].items()
    ]
    console.print(_table("Samples without the modality", ("modality", "kind", *SPLITS), missing))


def show_answers(results: Results, echo: Callable[[str], None]) -> None:
    """The measures of a run on a stream of a language model, each with its formula."""
    if results.answers is None:
        return
    for name, value in results.answers.measures.items():
        echo(f"{name:<18}{number(value):>8}  {ANSWER_FORMULAS[name]}")


def show_results(console: Console, results: Results) -> None:
    """The summary of a run and, where it has earlier tasks, what became of them under each method."""
    console.print(summary_table(results))
    moved = transfer(results)
    if moved is not None:
        rows = [(name, *(cell.text for cell in cells)) for name, _, cells in moved.rows]
        console.print(_table(moved.caption, [head.lower() for head in moved.head], rows))


def show_evaluations(console: Console, rows: Iterable[Evaluation]) -> None:
    """Metrics with intervals, one line per task, split and metric."""
    table = [
        (row.task, row.split, f"{row.n:,}", metric, number(value), interval(row, metric))
        for row in rows
        for metric, value in row.metrics.items()
    ]
    console.print(_table("Evaluation", ("task", "split", "n", "metric", "value", "95 % interval"), table))


def show_identity(console: Console, found: IdentityCost) -> None:
    """How often each task's group was chosen, and its metric with and without being told."""
    rows = [
        (
            t.task,
            f"{t.n:,}",
            _percent(t.accuracy),
            t.metric,
            number(t.known),
            number(t.chosen),
            number(t.known - t.chosen),
        )
        for t in found.tasks
    ]
    head = ("task", "n", "group chosen", "metric", "task known", "task chosen", "cost")
    console.print(_table(f"Without task identity: {found.split} split", head, rows))
    console.print(Text(found.sentence))


def as_json_text(rows: Iterable[Evaluation]) -> str:
    """Evaluations as a JSON list in the form of results.json."""
    return json.dumps([json.loads(row.model_dump_json()) for row in rows], indent=1)


def verification_lines(found: Verification) -> list[str]:
    """What was compared for each task and how, what differs first, and what the certificate does not speak of."""
    lines = [_verdict(verdict) for verdict in found.verdicts]
    lines += [f"{name}: not certified, it was learned later" for name in found.uncertified]
    changed = sorted({said for verdict in found.verdicts for said in verdict.environment})
    if changed:
        lines.append(f"Not the environment of the certificate ({'; '.join(changed)}):")
        lines.append(f"tensors were compared bit for bit, logits to {TOLERANCE:g} (relative above 1).")
    failed = [verdict.task for verdict in found.verdicts if not verdict.holds]
    said = f"does not hold for {', '.join(failed)}" if failed else f"holds for all {len(found.verdicts)} tasks of it"
    return [*lines, f"Certificate {found.digest}: {said}."]


def _verdict(verdict: Verdict) -> str:
    if not verdict.holds:
        part, name, said = verdict.differences[0]
        more = len(verdict.differences) - 1
        rest = f" (and {more} more differences)" if more else ""
        moved = f"; largest difference of a logit {verdict.largest:.3g}" if part != "logit" and verdict.probes else ""
        return f"{verdict.task}: DIFFERS, {part} {name} {said}{rest}{moved}"
    logits = "equal" if verdict.bitwise else f"within {TOLERANCE:g} (largest difference {verdict.largest:.3g})"
    compared = f"{verdict.tensors} tensors and the statistics equal bit for bit, logits of {verdict.probes} probes"
    return f"{verdict.task}: {compared} {logits + ' bit for bit' if verdict.bitwise else logits}"


def show_predictions(console: Console, table: pl.DataFrame) -> None:
    """The first rows of a table of predictions, and how many there are."""
    head = table.head(HEAD)
    rows = [["" if v is None else number(v) if isinstance(v, float) else str(v) for v in row] for row in head.rows()]
    console.print(_table(f"First {len(head)} of {len(table):,} rows", table.columns, rows))


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> RichTable:
    table = RichTable(title=Text(title), title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i and name not in ("kind", "metric", "split") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _label(task: Task, found: dict[str, object]) -> str:
    """Labelled samples of a split, with the share of the positive class, the range of shares, or the mean."""
    n = found.get("labelled", 0)
    share, mean = found.get("prevalence"), found.get("mean")
    if not n:
        return "0"
    if isinstance(share, dict):
        values = [float(v) for v in share.values()]
        if task.kind == "binary":
            return f"{n:,}, {_percent(values[-1])}"
        return f"{n:,}, {_percent(min(values))} to {_percent(max(values))}"
    if isinstance(mean, dict):
        return f"{n:,}, mean {', '.join(number(float(v)) for v in mean.values())}"
    return f"{n:,}"


def _percent(share: float | None) -> str:
    return "n/a" if share is None or math.isnan(share) else f"{100 * share:.1f} %"
