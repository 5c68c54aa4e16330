"""The comparison of continual methods of language models: cells, settings by validation, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flame_moe.errors import CheckpointError, RecipeError

pytest.importorskip("peft", reason="the extra mllm is not installed")

from flame_moe.experiments.mllm import ranks, votes
from flame_moe.experiments.mllm.__main__ import compare, main
from flame_moe.experiments.mllm.cells import Cell, Place, grid
from flame_moe.mllm.methods import METHODS
from flame_moe.mllm.methods.base import Method
from flame_moe.mllm.run import learn_stream
from flame_moe.mllm.shelf import Shelf, Taught
from flame_moe.mllm.stream.tiers import Stream
from tests.mllm_stream import small_stream

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
NAMES = ["sequential", "identity"]


@pytest.fixture(scope="module")
def done(mllm_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    small_stream(mllm_cache)
    out = tmp_path_factory.mktemp("compare") / "out"
    place = Place("tiny-ci", str(out), str(mllm_cache), changes=(("steps", 8.0),))
    return place, compare(place, NAMES, orders=["a", "b"], seeds=2, workers=0, resamples=50)


def test_every_setting_is_tried_once_and_one_goes_on(done: tuple[Place, str]) -> None:
    place, text = done
    cells = sorted(folder.name for folder in (Path(place.out) / "cells").iterdir())
    # Two settings with seed 0 on order a, then the chosen one with another seed and on the other order.
    assert len(cells) == len(NAMES) * (2 + 3)
    for order in "ab":
        assert (Path(place.out) / f"table-{order}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((Path(place.out) / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows["a"]] == NAMES
    for row in rows["a"]:
        best = max(row["validation"], key=row["validation"].get)
        assert row["validation"][row["setting"]] == row["validation"][best]
        assert row["seeds"] == [0, 1]
        average, low, high = row["measures"]["average"]
        assert low <= average <= high
        assert len(row["samples_per_task"]) == 2
    assert rows["a"][1]["of_upper_bound"] == 1.0
    assert rows["a"][1]["bitwise_equal"]
    assert not rows["a"][0]["bitwise_equal"]
    assert rows["a"][1]["foundation"] is None
    assert "Order b: math, shapes." in text


def test_the_table_says_what_the_cells_say(done: tuple[Place, str]) -> None:
    place, _ = done
    rows = json.loads((Path(place.out) / "table.json").read_text())["rows"]["b"]
    for row in rows:
        chosen = next(s for s in grid(row["method"]) if all(f"{k} = {v:g}" in row["setting"] for k, v in s))
        found = [Cell(place, row["method"], chosen, "b", seed).results().answers for seed in (0, 1)]
        values = [a.measures["average"] for a in found if a is not None]
        assert row["measures"]["average"][0] == pytest.approx(sum(values) / 2)


def test_nothing_is_done_twice(done: tuple[Place, str], monkeypatch: pytest.MonkeyPatch) -> None:
    place, text = done

    def never(self: Cell) -> None:
        raise AssertionError("a cell was computed again")

    monkeypatch.setattr(Cell, "work", never)
    assert compare(place, NAMES, orders=["a", "b"], seeds=2, workers=0, resamples=50) == text


def test_an_expert_is_trained_once_for_all_cells(done: tuple[Place, str]) -> None:
    place, _ = done
    # Of two tasks: both rates with seed 0, the chosen one with seed 1; the other order and its seeds need no more.
    assert len(list((Path(place.out) / "experts").iterdir())) == 2 * 3


def taught(stream: Stream, name: str, shelf: Shelf | None) -> tuple[Method, list[float]]:
    outcome = learn_stream(stream, name, changes={"steps": 6, "gate_steps": 2}, shelf=shelf)
    return outcome.method, [stage.seconds for stage in outcome.results.stages]


def test_an_expert_from_the_shelf_is_the_one_that_training_gives(
    mllm_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, shelf = small_stream(mllm_cache), Shelf(tmp_path / "experts", "tiny-ci")
    alone, _ = taught(stream, "routed", None)
    _, first = taught(stream, "identity", shelf)
    olora, _ = taught(stream, "olora", shelf)
    assert len(list(shelf.folder.iterdir())) == 2  # O-LoRA's are not trained alone
    trained: list[str] = []
    fit = Method.fit

    def watched(self: Method, *data: Any, what: str, **more: Any) -> None:
        trained.append(what)
        fit(self, *data, what=what, **more)

    monkeypatch.setattr(Method, "fit", watched)
    found, seconds = taught(stream, "routed", shelf)
    assert trained == ["shapes gate", "math gate"]
    ours, theirs = (dict(method.model.named_parameters()) for method in (found, alone))
    assert all((p == theirs[name]).all() for name, p in ours.items())
    assert found.samples == alone.samples
    assert all(now >= 0.5 * then for now, then in zip(seconds, first, strict=True))  # what it took then is counted
    assert olora.spared == 0.0


def test_a_damaged_expert_is_told(mllm_cache: Path, tmp_path: Path) -> None:
    stream, shelf = small_stream(mllm_cache), Shelf(tmp_path / "experts", "tiny-ci")
    taught(stream, "identity", shelf)
    for file in shelf.folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="truncated or was changed"):
        taught(stream, "routed", shelf)


def test_an_expert_of_another_size_is_told(mllm_cache: Path, tmp_path: Path) -> None:
    stream, shelf = small_stream(mllm_cache), Shelf(tmp_path / "experts", "tiny-ci")
    method, _ = taught(stream, "identity", None)
    own = dict(method.model.named_parameters())
    shelf.keep({"task": "shapes"}, {"a": next(iter(own.values()))}, Taught(1, 1.0))
    with pytest.raises(CheckpointError, match="other weights"):
        shelf.take({"task": "shapes"}, own)


def test_mistakes_are_told_before_any_work(
    mllm_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_stream(mllm_cache)
    place = Place("tiny-ci", str(tmp_path / "out"), str(mllm_cache))
    with pytest.raises(RecipeError, match="Did you mean 'routed'"):
        compare(place, ["route"], workers=0)
    with pytest.raises(RecipeError, match="0 seeds"):
        compare(place, ["joint"], seeds=0, workers=0)
    assert main(["tiny-ci", str(tmp_path / "out"), "--cache", str(mllm_cache), "--set", "step=3"]) == 2
    assert "step" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_given_is_not_chosen(done: tuple[Place, str], tmp_path: Path) -> None:
    place = replace(done[0], out=str(tmp_path), changes=(("rate", 1.0), ("steps", 1.0)))
    compare(place, ["identity"], orders=["a"], seeds=1, workers=0, resamples=10)
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]["a"]
    assert row["setting"] == "rate = 1"
    assert list(row["validation"]) == ["rate = 1"]
    assert [s for s in grid("routed", ("rate",))] == [(("top_k", 1.0),), (("top_k", 2.0),)]


def test_every_grid_is_of_settings_that_exist() -> None:
    known = {key for method in METHODS.values() for key in method.grid}
    assert known == {"rate", "strength", "top_k"}
    for method in METHODS.values():
        assert all(grid(method.name)) == bool(method.grid)


def test_every_kind_of_routing_vector_is_asked_alone_and_together(
    mllm_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert votes.main(["tiny-ci", str(tmp_path), "--seeds", "1", "--cache", str(mllm_cache)]) == 0
    (found,) = json.loads((tmp_path / "votes.json").read_text())["seeds"]
    assert set(found["mean inputs"]) == {"layer", "together"}
    best = found["discriminants, background of 200, ridge 0.1"]
    assert set(best) == {"layer", "together", "own", "left"}
    assert best["own"] <= best["together"]
    assert best["together"] > 0.9
    assert best["left"] > 0.5
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)
    assert votes.main(["tiny-ci", str(tmp_path), "--seeds", "0"]) == 2
    assert "0 seeds" in capsys.readouterr().err


def test_ranks_that_are_put_back_bring_the_first_task_back(
    mllm_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks.main(["tiny-ci", str(tmp_path), "--seeds", "1", "--cache", str(mllm_cache)]) == 0
    (found,) = json.loads((tmp_path / "ranks.json").read_text())["seeds"]
    ways = [found[who] for who in ranks.FIRSTS]
    assert len({way["0"] for way in ways}) == len({way["1"] for way in ways}) == 1
    assert ways[0]["1"] > ways[0]["0"]
    held = found["held by the most important"]
    assert held["0"] == 0
    assert held["1"] == pytest.approx(1)
    assert held["0.25"] > 0.25
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)
    assert ranks.main(["tiny-ci", str(tmp_path), "--seeds", "0"]) == 2
