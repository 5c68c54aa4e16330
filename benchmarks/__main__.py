"""Measure every row of the table and say whether it passes its gate; see docs/performance.md.

    python -m benchmarks [--only NAME ...] [--rounds N] [--before COMMIT] [--out FILE]

Prints a line per row as it goes. Ends with 1 if a gate was missed, with 0 if all were met.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Measured, Settings, Unavailable, seconds
from benchmarks.rows import ROWS
from flame_moe.environment import environment
from flame_moe.files import write_text


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    about = environment()
    x = torch.randn(2048, 2048)
    product = 2 * 2048**3 / min(seconds(lambda: x @ x) for _ in range(5)) / 1e9
    return {
        "cpu": about.cpu,
        "cores": os.cpu_count(),
        "float32 product": f"{product:.0f} GFLOP/s on one thread",
        "load": round(os.getloadavg()[0], 1),
        "python": about.python,
        "torch": about.torch,
        "commit": about.git_commit,
        "gpu": about.gpu or "none: not measured",
    }


def line(m: Measured) -> str:
    theirs = "" if m.theirs is None else short(m.theirs)
    gate = "" if m.gate is None else f"{'<=' if m.most else '>='} {m.gate:g}"
    verdict = {True: "PASS", False: "FAIL", None: "-"}[m.passed]
    said = f"{m.name:36} {short(m.ours):>9} {theirs:>9} {m.unit:8} {short(m.value):>9} {gate:9} {verdict}"
    return f"{said}  {m.note}" if m.note else said


def short(x: float) -> str:
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def measure(names: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Every row, printed as it is done."""
    found: list[dict[str, Any]] = []
    for name in names:
        start = time.perf_counter()
        try:
            for measured in ROWS[name](settings):
                print(line(measured), flush=True)
                found.append(measured.plain())
        except Unavailable as why:
            print(f"{name:36} not measured: {why}", flush=True)
            found.append({"name": name, "passed": None, "note": f"not measured: {why}"})
        found[-1]["wall"] = round(time.perf_counter() - start, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="turns that two sides take")
    parser.add_argument("--before", default=Settings.before, metavar="COMMIT", help="against which epochs are measured")
    parser.add_argument("--raw", type=Path, default=Settings.raw, help="folder of the open data sets, by name")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    chosen = parser.parse_args()
    names = [n for n in ROWS if chosen.only is None or any(n.startswith(o) for o in chosen.only)]
    if not names:
        parser.error(f"no row is called so; there are: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'row':36} {'ours':>9} {'theirs':>9} {'unit':8} {'value':>9} {'gate':9}", flush=True)
    start = time.perf_counter()
    found = measure(names, Settings(chosen.rounds, chosen.before, chosen.raw))
    missed = [row["name"] for row in found if row["passed"] is False]
    about["load at the end"] = round(os.getloadavg()[0], 1)
    print(f"{len(found)} figures in {time.perf_counter() - start:.0f} s, {len(missed)} missed: {', '.join(missed)}")
    if chosen.out is not None:
        write_text(chosen.out, json.dumps({"machine": about, "rounds": chosen.rounds, "rows": found}, indent=1) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
