"""The rows of the table, in the order in which they are printed."""

from __future__ import annotations

from benchmarks.harness import Row
from benchmarks.rows import continual, encoders, epochs, moe, start, tables, truncation

ROWS: dict[str, Row] = {
    **moe.ROWS,
    **continual.ROWS,
    **truncation.ROWS,
    **encoders.ROWS,
    **epochs.ROWS,
    **tables.ROWS,
    **start.ROWS,
}
