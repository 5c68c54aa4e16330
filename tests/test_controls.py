"""The table of controls holds what was predicted, is not redone, and marks what was averaged over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flame_moe.data.folds import judging_fold
from flame_moe.data.store import Store
from flame_moe.experiments import controls, folded
from flame_moe.training.checkpoint import load_checkpoint
from flame_moe.training.metrics import evaluate_predictions
from tests.tiny import SHAPE

VARIANTS = (
    controls.Variant("joint", "together", seeds=2, arrange="joint"),
    controls.Variant("no_moe", "no experts", seeds=1, changes=("model.preset=no_moe",)),
    controls.Variant("alone", "alone", seeds=1, arrange="alone"),
    controls.Variant("logistic", "linear", seeds=1, baseline="logistic"),
)


@pytest.fixture(scope="module")
def done(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("controls")
    lines = ['name = "tiny"', "[data]", 'source = "mine"', "[[stages]]", 'tasks = ["death"]', "[[stages]]"]
    lines += ['tasks = ["days"]', "[model]"]
    lines += [f"{key} = {value}" for key, value in SHAPE.items()]
    lines += ["[train]", "epochs = 1", "batch_size = 16"]
    (folder / "tiny.toml").write_text("\n".join(lines))
    controls.run(str(folder / "tiny.toml"), str(tiny_store.path), str(folder / "out"), variants=VARIANTS)
    return folder / "tiny.toml", folder / "out"


def test_every_number_of_the_table_is_that_of_the_kept_predictions(done: tuple[Path, Path], tiny_store: Store) -> None:
    _, out = done
    rows = {row["name"]: row for row in json.loads((out / "controls.json").read_text())["rows"]}
    target = tiny_store.target("death", tiny_store.indices("death", "test"))[:, 0]
    kept = [
        load_checkpoint(out / "predictions" / f"joint-{seed}", kind="flame-moe-test-predictions", version=1)[0]["death"]
        for seed in (0, 1)
    ]
    auroc = [
        evaluate_predictions("binary", target, p.numpy(), classes=("no", "yes"), bootstrap=0).metrics["auroc"]
        for p in kept
    ]
    found = rows["joint"]["tasks"]["death"]
    assert found["mean"] == pytest.approx(np.mean(auroc))
    assert found["sd"] == pytest.approx(np.std(auroc, ddof=1))
    averaged = (kept[0].numpy() + kept[1].numpy()) / 2
    scores = evaluate_predictions("binary", target, averaged, classes=("no", "yes"), bootstrap=0)
    assert found["averaged"]["metrics"]["auroc"] == pytest.approx(scores.metrics["auroc"])
    assert rows["alone"]["tasks"]["death"]["difference"][0] == pytest.approx(
        scores.metrics["auroc"] - rows["alone"]["tasks"]["death"]["mean"]
    )
    text = (out / "controls.md").read_text()
    assert f"{found['mean']:.3f} +- {found['sd']:.3f}" in text


def test_what_is_done_is_not_done_again(done: tuple[Path, Path], tiny_store: Store) -> None:
    recipe, out = done
    before = {p: p.stat().st_mtime_ns for p in (out / "predictions").rglob("*.safetensors")}
    controls.run(str(recipe), str(tiny_store.path), str(out), variants=VARIANTS)
    assert {p: p.stat().st_mtime_ns for p in (out / "predictions").rglob("*.safetensors")} == before
    assert len(before) == 5


def test_the_published_comparison_has_five_seeds_of_the_default_and_three_of_the_rest() -> None:
    seeds = {v.name: v.seeds for v in controls.VARIANTS}
    assert seeds[controls.VARIANTS[0].name] == 5
    assert {"joint", "alone", "no_moe", "dense", "shared_router", "logistic", "boosting"} <= seeds.keys()
    assert all(n >= 3 for name, n in seeds.items() if name != "logistic"), "the linear models have no randomness"


def test_folded_differences_are_those_of_the_kept_predictions(done: tuple[Path, Path], tiny_store: Store) -> None:
    recipe, out = done
    variants = [v for v in folded.FOLDED if v.name in ("stream", "no_moe", "logistic", "stream-0.5", "encoders-0.5")]
    folded.run(str(recipe), str(tiny_store.path), str(out), folds=2, variants=variants)
    named = {v.label: v.name for v in variants}
    found = json.loads((out / "folded.json").read_text())["rows"]
    rows = {named[row["label"]]: row["tasks"] for row in found}
    assert all(set(tasks) == {"death"} for tasks in rows.values()), "the first stage alone is learned"
    areas: dict[str, list[float]] = {"stream": [], "logistic": []}
    for name, values in areas.items():
        for k in range(2):
            view = judging_fold(tiny_store, k, 2)
            target = view.target("death", view.indices("death", "test"))[:, 0]
            folder = out / "predictions" / f"{name}-{k}-fold{k}of2"
            p = load_checkpoint(folder, kind="flame-moe-test-predictions", version=1)[0]["death"].numpy()
            scores = evaluate_predictions("binary", target, p, classes=("no", "yes"), bootstrap=0)
            values.append(scores.metrics["auroc"])
        assert rows[name]["death"]["folds"] == pytest.approx(values)
    gap = rows["logistic"]["death"]["difference"]
    assert gap[0] == pytest.approx(np.mean(areas["stream"]) - np.mean(areas["logistic"]))
    assert gap[1] < gap[0] < gap[2]
    assert rows["stream"]["death"]["difference"] is None
    assert rows["stream-0.5"]["death"]["difference"] is None, "a row with less data is compared with its equals"
    assert rows["stream-0.5"]["death"]["folds"] != rows["stream"]["death"]["folds"]
    less = np.array(rows["stream-0.5"]["death"]["folds"]) - np.array(rows["encoders-0.5"]["death"]["folds"])
    assert rows["encoders-0.5"]["death"]["difference"][0] == pytest.approx(less.mean())
    assert f"{rows['no_moe']['death']['mean']:.4f}" in (out / "folded.md").read_text()
