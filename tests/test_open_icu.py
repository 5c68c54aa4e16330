"""The recipe over three hospitals' formats, from the raw folders of the open data to the results: a long proof."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.recipes import load_recipe
from flame_moe.runs import run
from flame_moe.scoring import predict

RAW = {
    "mimic": "mimic-iv-demo",
    "eicu": "eicu-demo",
    "p2012": "physionet2012",
    "p2019": "physionet2019",
    "cxr": "pneumoniamnist",
}


@pytest.mark.slow
def test_open_icu_runs_from_raw_folders_and_no_later_stage_changes_an_earlier_task(
    shared_data: Path, tmp_path: Path
) -> None:
    parts = [f"data.options.parts.{name}.raw='{shared_data / folder}'" for name, folder in RAW.items()]
    parts += [f"data.options.parts.{name}.store='{tmp_path / 'stores' / name}'" for name in RAW]
    parts.append(f"data.options.parts.eicu.options.yaib='{shared_data / 'yaib-demo'}'")
    short = ["train.epochs=1", "stages.1.epochs=1", "stages.2.epochs=1", "train.threads=1", "train.bootstrap=20"]
    plan = load_recipe("open_icu", [*parts, *short, f"data.store='{tmp_path / 'stores' / 'all'}'"])
    done = run(plan, tmp_path / "run")
    named = [task for stage in plan.stages for task in stage.tasks]
    assert len(named) == 10
    last = len(plan.stages) - 1
    tested = {row.task for row in done.results.evaluations if row.after_stage == last and row.split == "test"}
    assert tested == set(named)
    shown = {(row.after_stage, row.task) for row in done.results.drift}
    learned = [(i, task) for i, stage in enumerate(plan.stages) for task in stage.tasks]
    assert shown >= {(after, task) for i, task in learned for after in range(i + 1, last + 1)}
    assert all(row.bitwise_equal and row.max_abs_logit_change == 0.0 for row in done.results.drift)
    assert all(row.n > 0 for row in done.results.drift)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(task in report for task in named)
    scored = predict(tmp_path / "run", tmp_path / "stores" / "all", tasks=["mimic_ihm"], split="test")
    assert np.isfinite(scored["probability"].to_numpy()).all()
