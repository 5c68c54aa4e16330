"""What bad input gets: one clear sentence with place and mend, and nothing half-written."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_moe.batch import Observation, Sample, collate
from flame_moe.continual import Learner
from flame_moe.data.prepare import prepare
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, FlameError, RecipeError, StoreError, nearest
from flame_moe.files import sha256
from flame_moe.nn.stacked import growables
from flame_moe.runs import Run, run
from flame_moe.schema import Recipe, Stage
from flame_moe.training import checkpoint
from tests.example_stores import random_samples, write
from tests.test_sources_physionet2012 import raw_folder, record_text
from tests.tiny import recipe

RECIPE = """
name = "mine"
[data]
source = "clinic"
store = "stores/clinic"
[[stages]]
tasks = ["death"]
[[stages]]
tasks = ["days"]
[model]
width = 8
heads = 2
"""


def is_one_clear_sentence(error: FlameError) -> None:
    """What is wrong, where or how to mend it; no traceback of a library, no line break."""
    text = str(error)
    assert isinstance(error, FlameError)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    assert error.what
    assert error.where or error.mend, text
    assert not re.search(r"Traceback|object at 0x|\bNoneType\b", text)


def refused(call: Callable[[], Any], message: str, kind: type[FlameError] = FlameError) -> FlameError:
    with pytest.raises(kind, match=message) as caught:
        call()
    is_one_clear_sentence(caught.value)
    return caught.value


# Recipes

RECIPES = {
    "unknown key": ("name", "nmae", r"unknown key 'nmae'.*Did you mean 'name'"),
    "unknown nested key": ("width", "widht", r"unknown key 'widht' \[.*model\.widht\].*Did you mean 'width'"),
    "unknown key of a stage": (
        'tasks = ["days"]',
        'task = ["days"]\ntasks = ["days"]',
        r"unknown key 'task' \[.*stages\.1\.task\].*Did you mean 'tasks'",
    ),
    "unknown key of a task": (
        "[model]",
        "[tasks.days]\nwieght = 2\n[model]",
        r"unknown key 'wieght' \[.*tasks\.days\.wieght\].*Did you mean 'weight'",
    ),
    "unknown value": ("width = 8", 'preset = "residul"', r"unknown value 'residul'.*Did you mean 'residual'"),
    "missing key": ('source = "clinic"', "", r"the key 'source' is missing.*Add 'source'"),
    "text for a number": ("width = 8", 'width = "wide"', r"model\.width"),
    "number too small": ("width = 8", "width = 1", r"greater than or equal to 4, not 1"),
    "top-k above the pool": ("width = 8", "experts = 2\ntop_k = 3", r"top_k 3 is above the pool of 2 experts"),
    "heads do not divide": ("heads = 2", "heads = 3", r"width 8 is not a multiple of heads 3"),
    "even kernel": ("width = 8", "kernel = 4", r"kernel 4 is even"),
    "task in two stages": ('["days"]', '["death"]', r"task 'death' is in two stages"),
    "no stage": ("[[stages]]", "[[steps]]", r"'stages' is missing|unknown key 'steps'"),
    "NaN": ("width = 8", "dropout = nan", r"model\.dropout"),
    "not TOML": ('name = "mine"', "name = ", r"not valid TOML"),
}


@pytest.mark.parametrize("case", list(RECIPES))
def test_a_wrong_recipe_is_told_with_its_place(tmp_path: Path, case: str) -> None:
    old, new, message = RECIPES[case]
    assert old in RECIPE
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new))
    error = refused(lambda: Recipe.load(path), message, RecipeError)
    assert str(path) in str(error.where)


def test_the_recipe_without_a_mistake_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert Recipe.load(tmp_path / "recipe.toml").model.width == 8


def test_a_missing_binary_or_unreadable_recipe_is_told(tmp_path: Path) -> None:
    refused(lambda: Recipe.load(tmp_path / "none.toml"), "there is no such recipe", RecipeError)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: Recipe.load(tmp_path / "binary.toml"), "not valid TOML", RecipeError)
    refused(lambda: Recipe.load(tmp_path), "the recipe cannot be read", RecipeError)


def test_unknown_tasks_modalities_and_sources_are_told_with_the_nearest(tiny_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for plan, message in (
        (recipe((("deaht",),)), r"unknown task 'deaht'.*Did you mean 'death'"),
        (recipe((("death",),), tasks={"death": {"modalities": ["vital"]}}), r"'vital'.*Did you mean 'vitals'"),
        (recipe((("death",),), method={"name": "flam"}), r"unknown method 'flam'.*Did you mean 'flame'"),
    ):
        refused(lambda plan=plan: run(plan, out, store=tiny_store), message, RecipeError)
    refused(
        lambda: prepare("physionet_2012", None, out), r"unknown source 'physionet_2012'.*Did you mean 'physionet2012'"
    )
    refused(lambda: run(recipe(), out), "the recipe names no store", RecipeError)
    assert list(tmp_path.iterdir()) == []


def test_nearest_names_what_is_known() -> None:
    assert nearest("mortalty", ["mortality", "los"]) == "Did you mean 'mortality'? Known: los, mortality."
    assert nearest("x", []) == "Known: none."


# Samples and raw files


def one(modality: str, **changes: Any) -> Sample:
    parts = {
        "vitals": Observation(
            np.ones((2, 3), np.float32), np.array([0.1, 0.2], np.float32), np.ones((2, 3), dtype=bool)
        ),
        "notes": Observation(np.ones((2, 4), np.float32), np.array([0.1, 0.2], np.float32)),
        "image": Observation(np.ones((2, 2), np.float32)),
        "static": Observation(np.ones((1, 2), np.float32), None, np.ones((1, 2), dtype=bool)),
    }
    return Sample("bad", "p0", {modality: parts[modality]._replace(**changes)}, {})


SAMPLES: dict[str, tuple[Sample, str]] = {
    "NaN value": (one("image", values=np.array([[1, math.nan]], np.float32)), "value nan at step 0, feature 1"),
    "infinite value": (one("notes", values=np.full((2, 4), math.inf, np.float32)), "value inf at step 0"),
    "text": (one("image", values=np.array([["a", "b"]])), "are not numbers"),
    "unsorted times": (one("vitals", times=np.array([0.2, 0.1], np.float32)), "times go back at step 1"),
    "negative time": (one("vitals", times=np.array([-0.1, 0.1], np.float32)), "time -0.1 is negative"),
    "NaN time": (one("notes", times=np.array([0.1, math.nan], np.float32)), "time nan"),
    "no times": (one("vitals", times=None), "needs times"),
    "no steps": (one("image", values=np.zeros((0, 2), np.float32)), "without a step"),
    "nothing observed": (one("static", observed=np.zeros((1, 2), dtype=bool)), "no cell of the modality is observed"),
    "wrong width": (one("image", values=np.ones((2, 5), np.float32)), r"shape \(2, 5\)"),
    "empty sample": (Sample("bad", "p0", {}, {}), "a sample has no modality"),
    "unknown modality": (
        Sample("bad", "p0", {"vital": one("vitals").modalities["vitals"]}, {}),
        r"unknown modality 'vital'.*Did you mean 'vitals'",
    ),
    "unknown task": (one("image")._replace(targets={"deaht": np.ones(1, np.float32)}), "Did you mean 'death'"),
    "NaN label": (one("image")._replace(targets={"death": np.array([math.nan], np.float32)}), "a label is nan"),
    "infinite label": (one("image")._replace(targets={"days": np.array([math.inf], np.float32)}), "a label is inf"),
    "label of no class": (one("image")._replace(targets={"stage": np.array([3.0], np.float32)}), "not one of 3"),
    "half a label": (one("image")._replace(targets={"death": np.array([0.5], np.float32)}), "neither 0 nor 1"),
}


@pytest.mark.parametrize("case", list(SAMPLES))
def test_a_bad_sample_stops_the_preparation_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    sample, message = SAMPLES[case]
    error = refused(lambda: write(tmp_path / "store", [*random_samples(4), sample]), message, DataError)
    assert "bad" in str(error.where)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_without_anything_to_read_is_told() -> None:
    refused(lambda: collate([], "death", ("vitals",), 1), "at least one sample", DataError)
    refused(lambda: collate([one("image")], "death", ("vitals",), 1), "sample 'bad' has none of the modalities")


def test_raw_records_that_cannot_be_read_leave_no_store(tmp_path: Path) -> None:
    for i, (lines, message) in enumerate((("01:00,HR,fast\n", "fast"), ("soon,HR,90\n", "soon"), ("01:00,HR\n", "HR"))):
        raw = raw_folder(tmp_path / f"raw{i}", {1: record_text(lines)}, "1,1,1,5,-1,0\n")
        options = {"sets": ["a"]}
        refused(lambda raw=raw, o=options: prepare("physionet2012", raw, tmp_path / "s", options=o), message, DataError)
    refused(lambda: prepare("physionet2012", tmp_path / "nowhere", tmp_path / "s"), "there are no raw data", DataError)
    refused(lambda: prepare("physionet2012", None, tmp_path / "s"), "needs raw data", DataError)
    refused(lambda: prepare("clinic", None, tmp_path / "s", options={"sampels": 5}), "Did you mean 'samples'")
    assert not [f for f in tmp_path.iterdir() if not f.name.startswith("raw")]


def test_a_store_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    store = write(tmp_path / "store", random_samples(60))
    manifest = json.loads((store.path / "manifest.json").read_text())
    for change, message in (
        ({"version": 99}, "version 99, this program reads version"),
        ({"format": "other"}, "not a sample store"),
        ({"statistics": {"modalities": 5}}, "statistics cannot be read"),
        ({"modalities": [{"name": "X"}]}, "manifest is damaged"),
    ):
        (store.path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        plan = recipe((("death",),))
        refused(lambda p=plan: run(p, tmp_path / "run", store=store.path), message, StoreError)
        assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "model").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (store.path / "manifest.json").write_text(json.dumps(manifest)[:200])
    refused(lambda: Store.open(store.path), "not valid JSON", StoreError)
    refused(lambda: Store.open(tmp_path / "nowhere"), "there is no sample store", StoreError)


# Checkpoints


@pytest.fixture(scope="module")
def model(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = recipe((("death",), ("days",)), train={"epochs": 1})
    learner = Learner(plan)
    for stage in plan.stages:
        learner.learn(tiny_store, stage)
    return learner.save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **manifest: Any) -> None:
    """Change a checkpoint as somebody would who takes care of the hashes."""
    if tensors is not None:
        safetensors.torch.save_file(tensors, folder / checkpoint.TENSORS)
    document = json.loads((folder / checkpoint.MANIFEST).read_text())
    document |= manifest
    document["tensors"]["sha256"] = sha256(folder / checkpoint.TENSORS)
    document.pop("digest")
    document["digest"] = checkpoint._digest(document)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST])
def test_a_checkpoint_truncated_anywhere_is_refused(damaged: Path, name: str) -> None:
    whole = (damaged / name).read_bytes()
    for part in range(50):
        (damaged / name).write_bytes(whole[: len(whole) * part // 50])
        refused(lambda: Learner.load(damaged), "truncated|valid JSON", CheckpointError)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.booleans())
def test_a_single_flipped_bit_is_refused(model: Path, tmp_path: Path, place: float, bit: int, which: bool) -> None:
    folder = tmp_path / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    file = folder / (checkpoint.TENSORS if which else checkpoint.MANIFEST)
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    content[at] ^= 1 << bit
    file.write_bytes(bytes(content))
    if not which and _same_json(bytes(content), (model / checkpoint.MANIFEST).read_bytes()):
        return
    with pytest.raises(CheckpointError) as caught:
        Learner.load(folder)
    is_one_clear_sentence(caught.value)


def _same_json(one: bytes, two: bytes) -> bool:
    """White space may change without changing what the manifest says."""
    try:
        return bool(json.loads(one) == json.loads(two))
    except ValueError:
        return False


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "missing": (lambda t, n: t.pop(n), "is missing"),
    "extra": (lambda t, n: t.update(extra=torch.zeros(1)), "'extra' is not part of this model"),
    "renamed": (lambda t, n: t.update({n + "x": t.pop(n)}), "is missing"),
    "reshaped": (lambda t, n: t.update({n: t[n].flatten()[:-1].clone()}), "the model needs"),
    "another type": (lambda t, n: t.update({n: t[n].double()}), "float64, the model needs"),
}


@pytest.mark.parametrize("case", list(TENSORS))
def test_tensors_that_do_not_fit_are_named(damaged: Path, case: str) -> None:
    change, message = TENSORS[case]
    tensors = safetensors.torch.load_file(damaged / checkpoint.TENSORS)
    change(tensors, "blocks.0.pool.conv.base")
    rewrite(damaged, tensors)
    refused(lambda: Learner.load(damaged), message, CheckpointError)


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_pickle_is_refused_and_never_run(damaged: Path, tmp_path: Path) -> None:
    (damaged / checkpoint.TENSORS).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    refused(lambda: Learner.load(damaged), "do not match the manifest", CheckpointError)
    rewrite(damaged)
    refused(lambda: Learner.load(damaged), "the tensors cannot be read", CheckpointError)
    (damaged / checkpoint.MANIFEST).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    refused(lambda: Learner.load(damaged), "not valid JSON", CheckpointError)
    assert not (tmp_path / "executed").exists()


MANIFESTS: dict[str, dict[str, Any]] = {
    "another kind": {"format": "other"},
    "another version": {"version": 2},
    "no stages": {"stages": 5},
    "a stage without fields": {"stages": [{}]},
    "a task of another width": {"tasks": []},
    "an unknown method": {"recipe": {**recipe().plain(), "method": {"name": "flam", "rank": 2}}},
    "an invalid recipe": {"recipe": {"name": "x"}},
    "no structure": {"structure": {}},
    "no statistics": {"preprocessor": {}},
    "nothing": {"modalities": None},
}


@pytest.mark.parametrize("case", list(MANIFESTS))
def test_a_manifest_that_does_not_describe_the_model_is_refused(damaged: Path, case: str) -> None:
    rewrite(damaged, **MANIFESTS[case])
    refused(lambda: Learner.load(damaged), "manifest|version|not a|the model needs", CheckpointError)


def test_a_structure_that_cannot_be_is_refused(damaged: Path) -> None:
    learner = Learner.load(damaged)
    good = {name: part.structure() for name, part in growables(learner.model)}
    for slices in ({"1": -3}, {"1": "many"}, {"one": 2}, {"1": 5}):
        broken = {**good, "blocks.0.pool.conv": {**good["blocks.0.pool.conv"], "slices": slices}}
        rewrite(damaged, structure=broken)
        refused(lambda: Learner.load(damaged), "manifest|version|not a|the model needs", CheckpointError)


def test_nested_json_without_end_is_refused(damaged: Path) -> None:
    (damaged / checkpoint.MANIFEST).write_text("[" * 100_000)
    refused(lambda: Learner.load(damaged), "not valid JSON", CheckpointError)


def test_missing_parts_of_a_checkpoint_are_named(damaged: Path, tmp_path: Path) -> None:
    (damaged / checkpoint.TENSORS).unlink()
    refused(lambda: Learner.load(damaged), "tensors of the checkpoint are missing", CheckpointError)
    refused(lambda: Learner.load(tmp_path / "nowhere"), "there is no checkpoint", CheckpointError)
    refused(lambda: Run.open(tmp_path / "nowhere"), "there is no such run", DataError)
    (tmp_path / "empty").mkdir()
    refused(lambda: Run.open(tmp_path / "empty"), "there is no checkpoint", CheckpointError)


def test_a_failed_save_leaves_the_old_checkpoint(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner.load(model)
    saved = learner.save(tmp_path / "model")
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    for place in ("safetensors.torch.save_file", "flame_moe.training.checkpoint.sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *args: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                learner.save(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_metric_that_does_not_exist_does_not_stop_a_save(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation may hold one class only; its AUROC is NaN, which JSON does not have."""
    monkeypatch.setattr("flame_moe.training.engine.validate", lambda *args: {"auroc": math.nan})
    learner = Learner(recipe((("death",),)))
    learner.learn(tiny_store, Stage(tasks=("death",)), state_folder=tmp_path / "resume")
    again = Learner.load(learner.save(tmp_path / "model"))
    assert again.stages[0].history[0]["val"] == {"death": {"auroc": None}}
