"""Methods on a stream: one first stage for all, settings by validation, nothing redone, a table of kept numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.continual.methods import METHODS, Setting, make_method
from flame_moe.data.store import Store
from flame_moe.errors import NonFiniteError, RecipeError
from flame_moe.experiments import work
from flame_moe.experiments.streams import __main__ as command
from flame_moe.experiments.streams.bootstrap import Resampling, interval
from flame_moe.experiments.streams.cells import Cell, FirstStage, best
from flame_moe.experiments.streams.entries import Entry, choose_entries, digest, every_entry
from flame_moe.experiments.streams.picture import picture
from flame_moe.experiments.streams.plan import compare
from flame_moe.experiments.streams.table import markdown, rows
from flame_moe.recipes import load_recipe, recipe_names
from flame_moe.schema import Recipe
from flame_moe.training.metrics import evaluate_predictions
from tests.tiny import SHAPE

RESAMPLES = 30
LINES = [
    *('name = "tiny"', "[data]", 'source = "mine"', "[[stages]]", 'tasks = ["death"]', "[[stages]]"),
    *('tasks = ["days", "codes"]', "[[stages]]", 'tasks = ["stage"]', "[model]"),
    *(f"{key} = {value}" for key, value in SHAPE.items()),
    *("[train]", "epochs = 1", "batch_size = 32", "lr = 1e-2", "[method]", "rank = 2"),
]
Done = tuple[Recipe, Path, Path]


def finished(done: Done, store: Store, methods: tuple[str, ...] = ("flame", "finetune")) -> str:
    stream, _, out = done
    return compare(stream, str(store.path), str(out), choose_entries(methods, 1), workers=0, resamples=RESAMPLES)


@pytest.fixture(scope="module")
def done(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("streams")
    (folder / "tiny.toml").write_text("\n".join(LINES))
    found = load_recipe(folder / "tiny.toml"), folder / "tiny.toml", folder / "out"
    finished(found, tiny_store)
    return found


@pytest.fixture
def document(done: Done) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((done[2] / "table.json").read_text())
    return found


def cells(done: Done, store: Store, name: str) -> list[Cell]:
    """Those of seed 0, one per setting."""
    (entry,) = choose_entries([name], 1)
    return [Cell(entry, s, FirstStage(done[0], str(store.path), str(done[2]), 0)) for s in entry.settings()]


def tree(folder: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.name != "table.json"}


def auroc(store: Store, task: str, values: np.ndarray) -> float:
    described, rows_of = store.tasks[task], store.indices(task, "test", modalities=store.tasks[task].modalities)
    target = store.target(task, rows_of)
    target = target if described.kind == "multilabel" else target[:, 0]
    scores = evaluate_predictions(described.kind, target, values, classes=described.classes, bootstrap=0)
    return scores.metrics["auroc"]


def test_every_number_of_the_table_is_that_of_the_kept_predictions(
    done: Done, document: dict[str, Any], tiny_store: Store
) -> None:
    by_name = {row["name"]: row for row in document["rows"]}
    average = {}
    for name in ("flame", "finetune"):
        kept = best(cells(done, tiny_store, name)).predictions()
        death = [auroc(tiny_store, "death", kept[s, "death"]) for s in range(3)]
        codes = [auroc(tiny_store, "codes", kept[s, "codes"]) for s in (1, 2)]
        stage = auroc(tiny_store, "stage", kept[2, "stage"])
        found = by_name[name]["metrics"]["auroc"]
        average[name] = (death[2] + codes[1] + stage) / 3
        assert found["average"][0] == pytest.approx(average[name])
        assert found["forgetting"][0] == pytest.approx((max(death[:2]) - death[2] + codes[0] - codes[1]) / 2)
        assert found["backward transfer"][0] == pytest.approx((death[2] - death[0] + codes[1] - codes[0]) / 2)
        assert found["matrix"][0] == pytest.approx(death)
        assert found["matrix"][3] == [None, None, pytest.approx(stage)]
        assert f"{average[name]:.3f} (" in (done[2] / "table.md").read_text()
    gap = by_name["finetune"]["metrics"]["auroc"]["difference"]
    assert gap[0] == pytest.approx(average["flame"] - average["finetune"])
    assert gap[1] <= gap[0] <= gap[2]
    assert by_name["flame"]["metrics"]["auroc"]["difference"] is None


def test_flame_forgets_nothing_and_fine_tuning_does(document: dict[str, Any]) -> None:
    flame, finetune = document["rows"]
    assert (flame["drift"], flame["bitwise_equal"]) == (0.0, True)
    assert flame["metrics"]["auroc"]["forgetting"] == [0.0, 0.0, 0.0]
    assert finetune["drift"] > 1e-4
    assert not finetune["bitwise_equal"]


def test_what_is_done_is_not_done_again(done: Done, tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(done[2] / "cells") | tree(done[2] / "stage0")
    table = (done[2] / "table.md").read_text()
    monkeypatch.setattr(Cell, "work", lambda self: pytest.fail(f"{self.folder.name} is done"))
    assert finished(done, tiny_store) == table
    assert tree(done[2] / "cells") | tree(done[2] / "stage0") == before
    grids = [len(METHODS[name].grid) for name in ("flame", "finetune")]
    assert len(list((done[2] / "cells").iterdir())) == sum(grids)


def test_what_was_interrupted_goes_on_at_the_cell_and_ends_the_same(done: Done, tiny_store: Store) -> None:
    table, lost = (done[2] / "table.md").read_text(), best(cells(done, tiny_store, "finetune"))
    before, predictions = tree(done[2] / "cells"), lost.predictions()
    shutil.rmtree(lost.folder)
    again = finished(done, tiny_store)
    after = lost.predictions()
    assert all(np.array_equal(after[place], values) for place, values in predictions.items())
    assert {f for f, t in tree(done[2] / "cells").items() if before.get(f) != t} == {
        f for f in before if lost.folder.name in f
    }
    assert _without_seconds(again) == _without_seconds(table)


def _without_seconds(table: str) -> list[list[str]]:
    head, *lines = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    place = head.index(" seconds ")
    return [cell[:place] + cell[place + 1 :] for cell in lines]


def test_all_methods_start_from_the_same_first_stage(done: Done, tiny_store: Store) -> None:
    found = [cell.predictions()[0, "death"] for name in ("flame", "finetune") for cell in cells(done, tiny_store, name)]
    assert all(np.array_equal(found[0], other) for other in found[1:])
    rows_of = tiny_store.indices("death", "test", modalities=tiny_store.tasks["death"].modalities)
    learner = FirstStage(done[0], str(tiny_store.path), str(done[2]), 0).learner()
    assert np.array_equal(learner.predict(tiny_store, "death", rows_of).values, found[0])


def test_the_setting_is_the_one_with_the_best_validation_whatever_the_test_split_says(
    done: Done, tiny_store: Store, tmp_path: Path
) -> None:
    tried = cells(done, tiny_store, "finetune")
    scores = []
    for cell in tried:
        final = [e for e in cell.results().evaluations if (e.after_stage, e.split, e.phase) == (2, "val", "committed")]
        scores.append(np.mean([e.metrics["r2" if e.task == "days" else "auroc"] for e in final]))
        assert len(final) == 4
    assert [cell.validation() for cell in tried] == pytest.approx(scores)
    assert best(tried) == tried[int(np.argmax(scores))]
    shutil.copytree(done[2], tmp_path / "out")
    moved = [
        Cell(c.entry, c.setting, FirstStage(done[0], str(tiny_store.path), str(tmp_path / "out"), 0)) for c in tried
    ]
    for cell in moved:
        results = cell.results()
        test = 1.0 - cell.validation()
        turned = [
            e if e.split == "val" else e.model_copy(update={"metrics": dict.fromkeys(e.metrics, test)})
            for e in results.evaluations
        ]
        results.model_copy(update={"evaluations": tuple(turned)}).save(cell.folder / "results.json")
    assert best(moved).setting == best(tried).setting


def test_a_setting_changes_the_later_stages_and_not_the_first(done: Done) -> None:
    entry = Entry("x", "x", {"name": "flame", "rank": 3})
    stream = done[0]
    changed = entry.recipe(stream, Setting({"rank": 8}, 0.5), 4)
    assert (changed.seed, changed.method.name, changed.method.rank) == (4, "flame", 3)
    assert changed.stages[0] == stream.stages[0]
    assert [stage.lr for stage in changed.stages[1:]] == [0.005, 0.005]


def test_intervals_are_those_of_a_loop_over_resampled_subjects(done: Done, tiny_store: Store) -> None:
    draw = Resampling(tiny_store, done[0], resamples=8)
    kept = best(cells(done, tiny_store, "finetune")).predictions()
    found = draw.matrices(kept)
    for i, task in enumerate(draw.tasks):
        described = tiny_store.tasks[task]
        indices, place = draw._samples[task]
        metric = "r2" if described.kind == "regression" else "auroc"
        for r in (1, 5):
            repeated = np.repeat(np.arange(len(indices)), draw._counts[r][place].astype(int))
            target = tiny_store.target(task, indices)[repeated]
            target = target if described.kind in ("regression", "multilabel") else target[:, 0]
            values = kept[2, task][repeated]
            scores = evaluate_predictions(described.kind, target, values, classes=described.classes, bootstrap=0)
            assert found[metric][i, 2, r] == pytest.approx(scores.metrics[metric])
    low, high = interval(np.array([9.0, *range(101), np.nan]))
    assert (low, high) == (2.5, 97.5)


def test_over_seeds_the_estimate_is_the_mean_and_a_resample_draws_seeds_too(done: Done, tiny_store: Store) -> None:
    draw = Resampling(tiny_store, done[0], resamples=200)
    mean = draw.over_seeds([np.full(201, value) for value in (1.0, 2.0, 6.0)])
    assert mean[0] == pytest.approx(3.0)
    assert set(np.round(mean[1:] * 3).astype(int)) <= {
        a + b + c for a in (1, 2, 6) for b in (1, 2, 6) for c in (1, 2, 6)
    }
    assert len(set(mean[1:])) > 5


def test_a_training_that_ends_in_no_number_is_a_cell_that_says_so(
    done: Done, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = choose_entries(["finetune"], 1)
    shutil.copytree(done[2] / "stage0", tmp_path / "stage0")
    first = FirstStage(done[0], str(tiny_store.path), str(tmp_path), 0)
    tried = [Cell(entry, setting, first) for setting in entry.settings()]

    def breaks(*_: object, **__: object) -> None:
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr("flame_moe.recorder.Recorder.learn", breaks)
    for cell in tried:
        cell.work()
    assert all(cell.done and cell.failure is not None for cell in tried)
    (row,) = rows({entry: tried}, {entry: [best(tried)]}, Resampling(tiny_store, done[0], 5))
    assert row["seeds"] == []
    assert "| failed |" in markdown([row])
    assert "the loss is nan" in markdown([row])
    assert markdown([row]).splitlines()[2].endswith(f"| {row['setting']} |")
    assert picture([row], "nothing").startswith(b"\x89PNG")


def test_no_two_settings_of_an_entry_share_a_cell() -> None:
    for entry in every_entry():
        assert len({digest(entry, setting) for setting in entry.settings()}) == len(entry.settings()) == 3, entry.name


def test_a_folder_of_another_stream_is_refused_and_stays(done: Done, tiny_store: Store) -> None:
    before = tree(done[2])
    other = done[0].model_copy(update={"train": done[0].train.model_copy(update={"epochs": 2})})
    with pytest.raises(RecipeError, match=r"begun with another stream or store \(train differ\)"):
        compare(other, str(tiny_store.path), str(done[2]), choose_entries(["flame"], 1), workers=0)
    assert tree(done[2]) == before


def test_the_command_prints_the_table_and_nothing_else_in_a_pipe(
    done: Done, tiny_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(done[1]), str(tiny_store.path), str(done[2]), "--methods", "finetune", "flame", "--seeds", "1"]
    assert command.main([*given, "--workers", "0", "--resamples", str(RESAMPLES)]) == 0
    said = capsys.readouterr()
    assert said.out == (done[2] / "table.md").read_text()
    assert said.err == ""
    assert command.main([*given[:3], "--methods", "flam"]) == 2
    assert "Did you mean 'flame'" in capsys.readouterr().err


def test_progress_counts_down_to_nothing_left(done: Done, tiny_store: Store) -> None:
    told: list[tuple[int, int]] = []
    compare(
        done[0],
        str(tiny_store.path),
        str(done[2]),
        choose_entries(["flame"], 1),
        workers=0,
        resamples=RESAMPLES,
        tell=lambda done, left: told.append((done, left)),
    )
    assert told[-1] == (0, 0)
    assert work.said(2, 10, 180.0) == "about 0:15 h left"
    assert work.said(0, 10, 5.0) == "", "nothing was done yet to judge by"


def test_every_method_is_a_row_with_its_seeds_and_grids_of_equal_size() -> None:
    entries = {entry.name: entry for entry in every_entry()}
    assert set(METHODS) <= set(entries)
    assert next(iter(entries)) == "flame"
    assert all(entry.seeds >= 3 for entry in entries.values())
    assert entries["flame"].seeds == entries["finetune"].seeds == 5
    assert len({len(METHODS[name].grid) for name in METHODS}) == 1


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("stream_")])
def test_streams_have_several_stages_and_one_thread(name: str) -> None:
    stream = load_recipe(name)
    assert len(stream.stages) >= 3
    assert stream.train.threads == 1
    assert stream.train.select == "joint", "the epoch is chosen on validation before the commit"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("stream_")])
def test_every_setting_of_every_entry_fits_every_stream(name: str) -> None:
    stream = load_recipe(name)
    for entry in every_entry():
        for setting in entry.settings():
            recipe = entry.recipe(stream, setting, 0)
            method = make_method(recipe.method)
            for index, stage in enumerate(recipe.stages):
                assert method.rounds(index, stage.settings(recipe.train).epochs), entry.name
        assert len(entry.settings()) == 3, f"{entry.name} may try as many settings as the others"


def test_there_are_four_streams() -> None:
    assert {name for name in recipe_names() if name.startswith("stream_")} == {
        "stream_tasks",
        "stream_units",
        "stream_hospitals",
        "stream_mnist",
    }
