"""The figures of `python -m benchmarks --out FILE` as the table of docs/performance.md.

python -m benchmarks.table FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.__main__ import short

VERDICT = {True: "pass", False: "**fail**", None: "-"}


def markdown(found: dict[str, Any]) -> str:
    """A line per figure."""
    lines = ["| row | ours | theirs | value | gate | |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        if "value" not in row:
            lines.append(f"| `{row['name']}` | | | {row['note']} | | - |")
            continue
        sides = (None if row[side] is None else f"{short(row[side])} {row['unit']}" for side in ("ours", "theirs"))
        gate = "" if row["gate"] is None else f"{'at most' if row['most'] else 'at least'} {row['gate']:g}"
        cells = [f"`{row['name']}`", *(side or "" for side in sides), short(row["value"]), gate, VERDICT[row["passed"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
