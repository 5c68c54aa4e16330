"""The report: one self-contained HTML page and a terminal table, made from results.json alone."""

from __future__ import annotations

from flame_moe.report.page import write_report
from flame_moe.report.tables import summary_table

__all__ = ["summary_table", "write_report"]
