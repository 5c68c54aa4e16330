"""Runs: what is written is whole, adds up, and can be gone on with and predicted from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch

from flame_moe.batch import collate
from flame_moe.data.prepare import prepare
from flame_moe.data.store import Store
from flame_moe.errors import DataError, FlameError, RecipeError
from flame_moe.nn import products
from flame_moe.recorder import Recorder
from flame_moe.results import Results
from flame_moe.runs import MODEL, REPORT, RESULTS, Run, extend, run
from flame_moe.schema import Recipe
from flame_moe.scoring import evaluate, predict
from flame_moe.training.monitor import Monitor
from tests.test_sources_physionet2012 import raw_folder, record_text
from tests.test_training import Crash, CutOff
from tests.tiny import recipe

TWO = (("death",), ("days", "codes"))
THREE = (*TWO, ("stage",))


def clean(results: Results) -> dict[str, Any]:
    """Results as plain data without what a clock or a path may change."""
    data: dict[str, Any] = json.loads(results.model_dump_json())
    for key in ("created", "timings", "environment"):
        del data[key]
    for stage in [*data["stages"], *(stage for other in data["comparison"] for stage in other["stages"])]:
        del stage["seconds"], stage["processor_seconds"], stage["peak_bytes"]
    return data


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    tensors = safetensors.torch.load_file(folder / MODEL / "tensors.safetensors")
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


@pytest.fixture(scope="module")
def finished(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = recipe(THREE, compare=["finetune"])
    return run(plan, tmp_path_factory.mktemp("runs") / "run", store=tiny_store)


def test_a_run_leaves_exactly_its_files(finished: Run) -> None:
    assert sorted(f.name for f in finished.path.iterdir()) == [
        "model",
        "recipe.json",
        "reference",
        "report.html",
        "results.json",
    ]
    assert [f.name for f in finished.path.parent.iterdir()] == ["run"]


def test_results_are_valid_and_say_what_was_measured(finished: Run) -> None:
    found = Results.load(finished.path / RESULTS)
    assert clean(found) == clean(finished.results)
    assert clean(Run.open(finished.path).results) == clean(found)
    committed = {(e.after_stage, e.task, e.split) for e in found.evaluations if e.phase == "committed"}
    cursor = {"death": 0, "days": 1, "codes": 1, "stage": 2}
    assert committed == {(s, t, p) for t, own in cursor.items() for s in range(own, 3) for p in ("val", "test")}
    full = {(e.after_stage, e.task) for e in found.evaluations if e.phase == "full_rank"}
    assert full == {(1, "days"), (1, "codes"), (2, "stage")}
    assert all(e.selection for e in found.evaluations)
    assert Recipe.parse(found.recipe, where="results") == finished.learner.recipe


def test_drift_has_a_row_per_old_task_and_stage_and_is_zero(finished: Run) -> None:
    rows = {(d.after_stage, d.task): d for d in finished.results.drift}
    assert set(rows) >= {(1, "death"), (2, "death"), (2, "days"), (2, "codes")}
    assert all(d.bitwise_equal and d.max_abs_logit_change == 0.0 for d in rows.values())


def test_the_comparison_shows_that_drift_can_be_seen(finished: Run) -> None:
    (other,) = finished.results.comparison
    assert other.name == "finetune"
    assert [s.tasks for s in other.stages] == [s.tasks for s in finished.results.stages]
    assert all(s.seconds > 0 for s in other.stages)
    late = {d.task: d for d in other.drift if d.after_stage == 2}
    assert late["death"].max_abs_logit_change > 1e-4
    assert not late["death"].bitwise_equal


def test_the_footprint_adds_up_to_the_file(finished: Run) -> None:
    tensors = safetensors.torch.load_file(finished.path / MODEL / "tensors.safetensors")
    last = [f for f in finished.results.footprint if f.after_stage == 2]
    assert sum(f.stored_parameters for f in last) == sum(t.numel() for t in tensors.values())
    assert sum(f.stored_bytes for f in last) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert all(f.live_parameters <= f.stored_parameters for f in last)
    by_stage = [sum(f.stored_parameters for f in finished.results.footprint if f.after_stage == s) for s in range(3)]
    assert by_stage == sorted(by_stage)


def test_the_report_is_made(finished: Run) -> None:
    assert "<html" in (finished.path / REPORT).read_text(encoding="utf-8")


def test_evaluating_a_run_gives_the_numbers_of_its_results(finished: Run) -> None:
    rows = {e.task: e for e in finished.results.evaluations if e.after_stage == 2 and e.split == "test"}
    for row in evaluate(finished.path):
        expected = rows[row.task].model_dump_json(exclude={"selection"})
        assert row.model_dump_json(exclude={"selection"}) == expected


def test_extending_a_saved_run_is_learning_in_one_go(tiny_store: Store, finished: Run, tmp_path: Path) -> None:
    run(recipe(TWO), tmp_path / "run", store=tiny_store)
    longer = extend(tmp_path / "run", ["stage"])
    assert weights(tmp_path / "run") == weights(finished.path)
    one, two = clean(longer.results), clean(finished.results)
    for key in ("evaluations", "drift", "footprint", "routing", "calibration", "commits", "tasks", "stages"):
        assert one[key] == two[key], key


@pytest.mark.parametrize("step", [3, 12])
def test_a_run_that_was_cut_off_resumes_to_the_same_results(
    tiny_store: Store, finished: Run, tmp_path: Path, step: int
) -> None:
    plan, out = recipe(THREE, compare=["finetune"]), tmp_path / "run"
    with pytest.raises(CutOff):
        run(plan, out, store=tiny_store, monitor=Crash(step=step))
    resumed = run(plan, out, store=tiny_store, resume=True)
    assert weights(out) == weights(finished.path)
    assert clean(resumed.results) == clean(finished.results)
    assert sorted(tree(out)) == sorted(tree(finished.path))


def test_what_goes_on_multiplies_as_it_did(tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of speed may decide otherwise in a later process; bits must not depend on it."""
    seen: list[str] = []

    class Watch(Monitor):
        def step(self) -> None:
            seen.append(products.in_use())

    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(products, "exact", lambda: True)
    monkeypatch.setattr(products, "_default", lambda: "onednn")
    plan, out = recipe(TWO), tmp_path / "run"
    with pytest.raises(CutOff):
        run(plan, out, store=tiny_store, monitor=Crash(step=6))
    assert (out / "resume").is_dir()
    assert not (out / RESULTS).exists(), "only the training state knows"
    monkeypatch.setattr(products, "_default", lambda: "default")
    resumed = run(plan, out, store=tiny_store, resume=True, monitor=Watch())
    assert set(seen) == {"onednn"}
    assert resumed.results.environment.products == "onednn"
    seen.clear()
    extend(out, ["stage"], monitor=Watch())
    assert set(seen) == {"onednn"}
    seen.clear()
    monkeypatch.setenv(products.VARIABLE, "default")
    run(plan, tmp_path / "other", store=tiny_store, monitor=Watch())
    assert set(seen) == {"default"}


def test_a_run_cut_off_while_comparing_resumes_to_the_same_results(
    tiny_store: Store, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = recipe(THREE, compare=["finetune"]), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("flame_moe.runs._compare", lambda *args: (_ for _ in ()).throw(CutOff))
        with pytest.raises(CutOff):
            run(plan, out, store=tiny_store)
    assert clean(run(plan, out, store=tiny_store, resume=True).results) == clean(finished.results)


def test_a_crash_while_writing_leaves_the_last_stage_whole(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(TWO), tmp_path / "run", store=tiny_store)
    before = tree(tmp_path / "run")
    for place in ("flame_moe.report.write_report", "flame_moe.runs.save_checkpoint"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *args, **options: (_ for _ in ()).throw(CutOff))
            with pytest.raises(CutOff):
                extend(tmp_path / "run", ["stage"])
        after = tree(tmp_path / "run")
        assert {k: v for k, v in after.items() if not k.startswith("resume/")} == before
        assert [f.name for f in tmp_path.iterdir()] == ["run"]
        assert set(Run.open(tmp_path / "run").learner.tasks) == {"death", "days", "codes"}
    extend(tmp_path / "run", ["stage"])
    assert not (tmp_path / "run" / "resume").exists()


@pytest.fixture
def small(tiny_store: Store, tmp_path: Path) -> Path:
    return run(recipe((("death",),), train={"epochs": 1}), tmp_path / "run", store=tiny_store).path


def test_an_extension_that_does_not_fit_leaves_the_run_untouched(small: Path) -> None:
    before = tree(small)
    for tasks, message in ((["death"], "was learned in stage 0"), (["stagee"], "Did you mean 'stage'")):
        with pytest.raises(FlameError, match=message):
            extend(small, tasks)
    assert tree(small) == before


def test_a_run_is_not_overwritten_unless_asked(small: Path, tiny_store: Store) -> None:
    before = tree(small)
    with pytest.raises(DataError, match="there is already something"):
        run(recipe((("death",),)), small, store=tiny_store)
    assert tree(small) == before
    again = run(recipe((("death",),), train={"epochs": 1}, seed=5), small, store=tiny_store, overwrite=True)
    assert again.results.seed == 5


def test_resuming_with_another_recipe_is_refused(small: Path, tiny_store: Store) -> None:
    before = tree(small)
    with pytest.raises(RecipeError, match=r"begun with another recipe \(seed differ\)"):
        run(recipe((("death",),), train={"epochs": 1}, seed=5), small, store=tiny_store, resume=True)
    assert tree(small) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
def test_a_folder_that_is_no_run_is_never_touched(tiny_store: Store, tmp_path: Path, options: dict[str, bool]) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError):
        run(recipe((("death",),), train={"epochs": 1}), out, store=tiny_store, **options)
    assert tree(out) == {"thesis.txt": b"years of work"}


def test_what_others_put_into_a_run_folder_is_never_lost(small: Path, tiny_store: Store) -> None:
    (small / "predictions.csv").write_text("id\n1\n")
    (small / "notes").mkdir()
    (small / "notes" / "monday.txt").write_text("looks good")
    extend(small, ["days"], epochs=1)
    assert (small / "predictions.csv").read_text() == "id\n1\n"
    assert (small / "notes" / "monday.txt").read_text() == "looks good"
    with pytest.raises(DataError, match="holds 'notes', which is no part of the run"):
        run(recipe((("death",),), train={"epochs": 1}), small, store=tiny_store, overwrite=True)
    assert (small / "notes" / "monday.txt").read_text() == "looks good"


def test_an_empty_folder_is_as_good_as_none(tiny_store: Store, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run(recipe((("death",),), train={"epochs": 1}), tmp_path / "run", store=tiny_store).path.is_dir()


def test_a_wrong_recipe_writes_nothing(tiny_store: Store, tmp_path: Path) -> None:
    for plan, message in (
        (recipe((("deth",),)), "Did you mean 'death'"),
        (recipe((("death",),), tasks={"days": {"weight": 2.0}}), "changes task 'days' but learns it in no stage"),
        (recipe((("death",),), tasks={"death": {"modalities": ["vitalz"]}}), "Did you mean 'vitals'"),
        (recipe((("death",),), compare=["finetun"]), "Did you mean 'finetune'"),
        (recipe(TWO, method={"warmup": 0.5}, train={"epochs": 1}), "1 epochs cannot be divided"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(plan, tmp_path / "run", store=tiny_store)
        assert list(tmp_path.iterdir()) == []


def test_a_monitor_hears_of_every_stage(tiny_store: Store, tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listen(Monitor):
        def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
            heard.append((tasks, epochs, done))

    run(recipe(TWO, train={"epochs": 1}), tmp_path / "run", store=tiny_store, monitor=Listen())
    assert heard == [(["death"], 1, 0), (["days", "codes"], 1, 0)]


def test_per_task_selection_keeps_a_checkpoint_per_task(tiny_store: Store, tmp_path: Path) -> None:
    done = run(recipe((("death", "days"),), train={"select": "per_task"}), tmp_path / "run", store=tiny_store)
    assert sorted(f.name for f in (done.path / "selected").iterdir()) == ["days", "death"]
    assert {e.task for e in done.results.evaluations if "alone" in e.selection} == {"death", "days"}


# Prediction


def test_prediction_on_a_store_is_one_row_per_sample_and_output(finished: Run, tiny_store: Store) -> None:
    table = predict(finished.path, tiny_store.path)
    assert table.columns == ["id", "task", "output", "probability", "value"]
    for name, task in finished.learner.tasks.items():
        rows = table.filter(pl.col("task") == name)
        indices = tiny_store.indices(modalities=task.modalities)
        outputs = ["yes"] if name == "death" else list(task.classes)
        assert rows["id"].to_list() == [i for i in tiny_store.ids(indices) for _ in outputs]
        assert rows["output"].to_list() == outputs * len(indices)
        got = finished.learner.predict(tiny_store, name, indices)
        column = "value" if name == "days" else "probability"
        assert rows[column].to_numpy().tolist() == got.values.ravel().tolist()
        assert rows["probability" if name == "days" else "value"].null_count() == len(rows)


def test_prediction_of_one_split_and_some_tasks(finished: Run, tiny_store: Store) -> None:
    table = predict(finished.path, tiny_store.path, tasks=["death"], split="test")
    task = tiny_store.tasks["death"]
    assert table["id"].to_list() == list(tiny_store.ids(tiny_store.indices(None, "test", modalities=task.modalities)))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predictions_are_written_as_a_file(finished: Run, tiny_store: Store, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"p.{ending}"
    table = predict(finished.path, tiny_store.path, out=out)
    read = pl.read_csv(out, schema=table.schema) if ending == "csv" else pl.read_parquet(out)
    assert read.equals(table)
    assert [f.name for f in tmp_path.iterdir()] == [out.name]


def test_wrong_requests_for_predictions_write_nothing(finished: Run, tiny_store: Store, tmp_path: Path) -> None:
    for options, message in (
        ({"out": tmp_path / "p.xlsx"}, "cannot write '.xlsx'"),
        ({"out": tmp_path / "p.csv", "tasks": ["deaths"]}, "Did you mean 'death'"),
    ):
        with pytest.raises(FlameError, match=message):
            predict(finished.path, tiny_store.path, **options)
    with pytest.raises(FlameError):
        predict(finished.path, tmp_path / "nowhere", out=tmp_path / "p.csv")
    assert list(tmp_path.iterdir()) == []


def test_predicting_leaves_the_run_untouched(finished: Run, tiny_store: Store) -> None:
    before = tree(finished.path)
    predict(finished.path, tiny_store.path)
    evaluate(finished.path)
    assert tree(finished.path) == before


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on sixty records in the original layout."""
    root, generator = tmp_path_factory.mktemp("hospital"), np.random.default_rng(0)
    records, outcomes = {}, ""
    for id in range(1, 61):
        lines = "".join(f"{h:02d}:30,HR,{generator.integers(50, 130)}\n" for h in range(0, 40, 8))
        lines += f"{generator.integers(1, 47):02d}:10,Creatinine,{generator.uniform(0.5, 4):.1f}\n"
        lines += "02:00,Urine,100\n"
        records[id] = record_text("".join(sorted(lines.splitlines(keepends=True))), id)
        outcomes += f"{id},{generator.integers(1, 20)},{generator.integers(0, 9)},{3 + id % 9},-1,{id % 2}\n"
    store = prepare(
        "physionet2012", raw_folder(root / "raw", records, outcomes), root / "store", options={"sets": ["a"]}
    )
    data = {"source": "physionet2012", "options": {"sets": ["a"]}}
    run(recipe((("mortality",), ("los",)), train={"epochs": 1}, data=data), root / "run", store=store)
    return root


def test_new_records_in_the_original_layout_are_scored(hospital: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "new"
    fresh.mkdir()
    new = {901: "01:00,HR,90\n", 902: "05:00,Urine,50\n", 903: "00:30,HR,70\n09:00,Creatinine,2.2\n", 904: ""}
    for id, lines in new.items():
        (fresh / f"{id}.txt").write_text(record_text(lines, id))
    before, said = tree(tmp_path), list[str]()
    table = predict(hospital / "run", fresh, say=said.append)
    assert tree(tmp_path) == before
    assert len(said) == 1
    assert said[0].startswith("1 of 4 records are not scored, by the rule: has at least one plausible measurement")
    assert sorted(set(table["id"])) == ["901", "902", "903"]
    deaths, days = (table.filter(pl.col("task") == t) for t in ("mortality", "los"))
    assert deaths["output"].to_list() == ["died"] * 3
    assert deaths["probability"].is_between(0, 1).all()
    assert days["value"].is_finite().all()


def test_a_record_scores_the_same_raw_and_from_the_store(hospital: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.mkdir()
    for id in (1, 7, 30):
        shutil.copy(hospital / "raw" / "set-a" / f"{id}.txt", known)
    raw = predict(hospital / "run", known).sort("task", "id")
    stored = (
        predict(hospital / "run", hospital / "store").filter(pl.col("id").is_in(["1", "7", "30"])).sort("task", "id")
    )
    assert raw["id"].to_list() == stored["id"].to_list()
    for column in ("probability", "value"):
        assert np.allclose(raw[column].to_numpy(), stored[column].to_numpy(), atol=1e-5, equal_nan=True)


def test_a_scored_sample_does_not_need_the_store_it_was_learned_on(
    tiny_store: Store, small: Path, tmp_path: Path
) -> None:
    """The statistics travel with the model, so its own store may be gone."""
    learner = Run.open(small).learner
    indices = tiny_store.indices("death", "test", modalities=tiny_store.tasks["death"].modalities)
    fitted = learner.preprocessor.plain()
    assert set(fitted["modalities"]) == {"vitals", "static"}
    samples = [tiny_store.sample(int(i)) for i in indices]
    assert collate(samples, "death", ("vitals", "static"), 1).ids == tiny_store.ids(indices)


def test_a_recorder_resumes_with_every_row(finished: Run) -> None:
    again = Recorder.resume(finished.results, {})
    assert clean(again.results())["evaluations"] == clean(finished.results)["evaluations"]


def test_a_run_that_fails_before_its_first_stage_does_not_cost_the_old_one(tiny_store: Store, tmp_path: Path) -> None:
    class Stop(Monitor):
        def step(self) -> None:
            raise KeyboardInterrupt

    plan = recipe((("death",),), train={"epochs": 1})
    run(plan, tmp_path / "run", store=tiny_store)
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "run", store=tiny_store, overwrite=True, monitor=Stop())
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    run(plan, tmp_path / "run", store=tiny_store, overwrite=True)
    assert (tmp_path / "run" / "results.json").read_bytes() != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
