"""results.json keeps what it was given, refuses what it cannot trust, and is never half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from flame_moe import files
from flame_moe.environment import environment
from flame_moe.errors import DataError, RecipeError
from flame_moe.files import write_text
from flame_moe.progression import progression
from flame_moe.results import Evaluation, Results
from tests.example_results import example, nine_tasks, with_gaps


def edited(tmp_path: Path, **changes: object) -> Path:
    path = example().save(tmp_path / "results.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize("results", [example(), with_gaps(), example(nine_tasks(), comparison=False, data=False)])
def test_what_was_saved_is_what_is_loaded(results: Results, tmp_path: Path) -> None:
    path = results.save(tmp_path / "new" / "results.json")
    again = Results.load(path)
    assert again.model_dump_json() == results.model_dump_json()


def test_numbers_survive_in_full_precision(tmp_path: Path) -> None:
    results = example()
    again = Results.load(results.save(tmp_path / "results.json"))
    assert again.evaluations[0].metrics == results.evaluations[0].metrics


def test_a_metric_that_does_not_exist_is_null_in_the_file_and_nan_in_memory(tmp_path: Path) -> None:
    path = with_gaps().save(tmp_path / "results.json")
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text())["evaluations"][0]["metrics"]["auroc"] is None
    assert math.isnan(Results.load(path).evaluations[0].metrics["auroc"])


def test_infinity_is_refused() -> None:
    with pytest.raises(ValidationError, match="infinity is not a result"):
        Evaluation(after_stage=0, task="mortality", split="test", n=3, metrics={"auroc": math.inf})


def test_a_truncated_file_is_told_as_damaged(tmp_path: Path) -> None:
    path = example().save(tmp_path / "results.json")
    path.write_text(path.read_text()[:500])
    with pytest.raises(DataError, match=r"not valid JSON.*damaged or incomplete"):
        Results.load(path)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"version 2.*reads version 1"):
        Results.load(edited(tmp_path, version=2))


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold flame-moe results"):
        Results.load(edited(tmp_path, format="something"))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no such results"):
        Results.load(tmp_path / "none.json")


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'evaluation'.*Did you mean 'evaluations'"):
        Results.load(edited(tmp_path, evaluation=[]))


def test_results_of_a_task_nobody_described_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="task 'length_of_stay' has results but is not described"):
        Results.load(edited(tmp_path, tasks=[t.plain() for t in example().tasks if t.name != "length_of_stay"]))


def test_stages_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="listed in order"):
        Results.load(edited(tmp_path, stages=[s.plain() for s in reversed(example().stages)]))


def test_a_failed_save_leaves_the_old_file_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "results.json", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_progression_starts_where_a_task_is_learned() -> None:
    table = progression(example(), "auroc")
    assert table.tasks == ("mortality", "length_of_stay", "shock", "phenotyping")
    assert table.learned == (0, 0, 1, 2)
    assert np.isnan(table.values[2]).tolist() == [True, False, False]
    assert np.isnan(table.values[1]).all()  # a regression task has no auroc


def test_full_rank_evaluations_are_not_mixed_into_the_progression() -> None:
    results = example(comparison=False)
    wrong = [e.model_copy(update={"phase": "full_rank", "metrics": {"auroc": 0.0}}) for e in results.evaluations]
    mixed = results.model_copy(update={"evaluations": (*results.evaluations, *wrong)})
    assert np.array_equal(progression(mixed, "auroc").values, progression(results, "auroc").values, equal_nan=True)


def test_the_environment_says_what_ran() -> None:
    found = environment()
    assert found.torch
    assert found.cpu
    assert found.threads >= 1
    assert found.git_commit is None or len(found.git_commit.removesuffix("-dirty")) >= 7


def test_the_documented_format_names_every_key() -> None:
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    missing = [name for name in Results.model_fields if f"`{name}`" not in text]
    assert not missing
