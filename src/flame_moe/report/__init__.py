"""The reports: one self-contained HTML page of a run (from results.json alone) or of a store, and a terminal table."""

from __future__ import annotations

from flame_moe.report.page import write_report
from flame_moe.report.store_page import write_store_report
from flame_moe.report.tables import summary_table

__all__ = ["summary_table", "write_report", "write_store_report"]
