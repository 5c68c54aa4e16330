"""The command line: what it prints, where it prints it, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from flame_moe import load_recipe
from flame_moe.cli import app
from flame_moe.cli_progress import Bar, waiting
from flame_moe.errors import RecipeError
from flame_moe.recipes import parse_assignment, recipe_names
from flame_moe.results import Results

SHORT = """
name = "short"
compare = ["finetune"]
[data]
source = "digits"
[[stages]]
tasks = ["digit", "odd"]
[[stages]]
tasks = ["loops"]
[model]
width = 8
heads = 2
experts = 2
hidden = 8
time_width = 8
steps = 4
[train]
epochs = 1
batch_size = 256
bootstrap = 20
[method]
rank = 2
"""
COMMANDS = (
    "demo",
    "init",
    "prepare",
    "describe",
    "run",
    "extend",
    "certify",
    "verify",
    "evaluate",
    "predict",
    "report",
)


def flame(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Result, *parts: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that says all the parts."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("flame: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a short recipe and its run."""
    folder = tmp_path_factory.mktemp("flame")
    (folder / "short.toml").write_text(SHORT)
    made = flame("prepare", "digits", folder / "store", "--option", "missing=0.1")
    assert made.exit_code == 0, made.output
    done = flame("run", folder / "short.toml", folder / "run", "--store", folder / "store")
    assert done.exit_code == 0, done.output
    return folder


def test_every_command_explains_itself_with_an_example() -> None:
    listed = flame("--help").stdout
    for command in COMMANDS:
        assert command in listed
        said = flame(command, "--help")
        assert said.exit_code == 0
        assert "Example" in said.stdout
        assert f"flame {command}" in said.stdout


def test_version_is_that_of_the_package() -> None:
    assert flame("--version").stdout.startswith("flame-moe 0.")


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom flame_moe.cli import app\ntry:\n    app(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('torch', 'sklearn', 'matplotlib', 'polars') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_prepare_tells_the_cohort_the_labels_and_what_is_missing(place: Path, tmp_path: Path) -> None:
    said = flame("prepare", "digits", "-", tmp_path / "store").stdout
    for title in ("Cohort", "Handled without leaving a sample out", "Splits, by subject", "Labels", "without the"):
        assert title in said
    assert "1,797" in said
    assert "shape" in said
    assert flame("describe", tmp_path / "store").stdout in said


def test_run_tells_scores_forgetting_and_where_the_report_is(tmp_path: Path, place: Path) -> None:
    done = flame("run", place / "short.toml", tmp_path / "a", "--store", place / "store", "--set", "train.lr=1e-2")
    assert done.exit_code == 0
    assert done.stderr == ""
    assert "bitwise equal" in done.stdout
    assert "Earlier tasks then and now" in done.stdout
    assert f"Report: {tmp_path / 'a' / 'report.html'}" in done.stdout
    assert Results.load(tmp_path / "a" / "results.json").recipe["train"]["lr"] == 1e-2


def test_a_run_is_not_replaced_by_accident(place: Path) -> None:
    before = (place / "run" / "results.json").read_bytes()
    refused(flame("run", place / "short.toml", place / "run", "--store", place / "store"), "--overwrite")
    assert (place / "run" / "results.json").read_bytes() == before


def test_extend_adds_a_task_and_changes_no_earlier_prediction(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "before.csv"
    flame("run", place / "short.toml", tmp_path / "run", "--store", place / "store")
    assert flame("predict", tmp_path / "run", place / "store", "--task", "digit", "--out", out).exit_code == 0
    done = flame("extend", tmp_path / "run", "--task", "large", "--epochs", 1)
    assert done.exit_code == 0, done.output
    assert "large" in done.stdout
    after = tmp_path / "after.csv"
    flame("predict", tmp_path / "run", place / "store", "--task", "digit", "--out", after)
    assert after.read_bytes() == out.read_bytes()


def test_evaluate_prints_a_table_or_json(place: Path) -> None:
    assert "95 % interval" in flame("evaluate", place / "run", "--task", "odd").stdout
    rows = json.loads(flame("evaluate", place / "run", "--task", "odd", "--split", "val", "--json").stdout)
    assert [(row["task"], row["split"], row["n"] > 0) for row in rows] == [("odd", "val", True)]
    assert 0 <= rows[0]["metrics"]["auroc"] <= 1


def test_predict_shows_the_head_or_writes_a_file(place: Path, tmp_path: Path) -> None:
    shown = flame("predict", place / "run", place / "store", "--task", "odd", "--split", "test")
    assert "First 10 of" in shown.stdout
    out = tmp_path / "p.parquet"
    assert flame("predict", place / "run", place / "store", "--out", out).exit_code == 0
    table = pl.read_parquet(out)
    assert table.columns == ["id", "task", "output", "probability", "value"]
    assert set(table["task"]) == {"digit", "odd", "loops"}


def test_report_is_made_again_from_the_results(place: Path) -> None:
    page = place / "run" / "report.html"
    before = page.read_text()
    page.unlink()
    assert flame("report", place / "run").exit_code == 0
    assert page.read_text() == before


def test_mistakes_get_one_sentence_and_exit_code_2(place: Path, tmp_path: Path) -> None:
    run, store, recipe, out = place / "run", place / "store", place / "short.toml", tmp_path / "out"
    refused(flame("prepare", "digit", out), "unknown source 'digit'", "'digits'")
    refused(flame("prepare", "digits", out, "--option", "mising=0.1"), "unknown key 'mising'", "'missing'")
    refused(flame("prepare", "digits", out, "--option", "missing"), "key=value")
    refused(flame("prepare", "digits", out, "--task", "digits"), "unknown task 'digits'", "'digit'")
    refused(flame("prepare", "physionet2012", out), "needs raw data")
    refused(flame("prepare", "digits", store), str(store))
    refused(flame("describe", tmp_path), "no sample store")
    refused(flame("run", "digit", out), "unknown recipe 'digit'", "'digits'")
    refused(flame("run", "none.toml", out), "no such recipe file")
    refused(flame("run", recipe, out, "--set", "train.epocs=3"), "unknown key 'epocs'", "'epochs'")
    refused(flame("run", recipe, out, "--set", "stages.7.epochs=3"), "no place in a list of 2")
    refused(flame("run", recipe, out, "--set", "name.first=3"), "is a value, not a table")
    refused(flame("run", recipe, out, "--set", "model.top_k=9"), "top_k 9 is above the pool")
    refused(flame("run", recipe, out), "names no store")
    refused(flame("run", recipe, out, "--store", store, "--set", 'stages.1.tasks=["loop"]'), "'loop'", "'loops'")
    refused(flame("extend", run, "--task", "odd"), "was learned in stage 0")
    refused(flame("extend", run, "--task", "larg"), "'large'")
    refused(flame("extend", run, "--task", "large", "--task", "large"), "a stage names a task twice")
    refused(flame("evaluate", run, "--task", "od"), "'odd'")
    refused(flame("evaluate", run, "--split", "tset"), "tset")
    refused(flame("predict", run, store, "--out", tmp_path / "p.xlsx"), ".csv or .parquet")
    refused(flame("predict", run, store, "--task", "od"), "'odd'")
    refused(flame("predict", tmp_path / "none", store), "none")
    refused(flame("predict", run, tmp_path / "none"), "nothing to score")
    refused(flame("evaluate", run, "--store", tmp_path / "none"), "no sample store")
    refused(flame("extend", run, "--task", "large", "--store", tmp_path / "none"), "no sample store")
    refused(flame("report", tmp_path), "no such results")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(flame("prepare", "digits", tmp_path / "file" / "store"), "file")


def test_a_wrong_option_is_exit_code_2() -> None:
    assert flame("run", "--bogus").exit_code == 2
    assert flame("dance").exit_code == 2
    assert flame("prepare", "digits", "a", "b", "c").exit_code == 2


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flame_moe.recipes.load_recipe", interrupted)
    assert flame("run", "digits", tmp_path / "out").exit_code == 130


def test_the_module_is_the_command_and_keeps_pipes_clean(place: Path) -> None:
    command = [sys.executable, "-W", "default", "-m", "flame_moe", "evaluate", str(place / "run"), "--json"]
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    assert len(json.loads(done.stdout)) == 3


def test_the_bar_shows_stage_epoch_and_score_on_a_terminal_only() -> None:
    for terminal in (True, False):
        console = Console(force_terminal=terminal, width=160, record=True, file=io.StringIO())
        with Bar(console) as bar:
            bar.stage(1, 3, "flame")
            bar.begin(["loops"], 2, 5, 0)
            bar.step()
            bar.epoch({"epoch": 0, "val": {"loops": {"auroc": 0.9, "brier": 0.1}}})
        said = console.export_text()
        assert ("flame, stage 2/3: loops" in said) is terminal
        assert ("epoch 2/2, val 0.900" in said) is terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_reading_shows_the_table_its_share_and_the_time_left_on_a_terminal_only(terminal: bool) -> None:
    console = Console(force_terminal=terminal, width=160, record=True, file=io.StringIO())
    clock = [0.0]
    with waiting(console, "reading mine", lambda: clock[0]) as say:
        say("patients")
        for share in (0.0, 0.1, 0.2):
            clock[0] += 10
            say("chartevents", share)
    said = console.export_text()
    assert bool(said) is terminal
    assert ("reading mine: chartevents" in said) is terminal
    # 10 s for a tenth: 80 s for the other eight.
    assert ("20% 01:20 left" in said) is terminal


def test_changes_are_read_as_toml_and_bare_words_as_text() -> None:
    changed = load_recipe("digits", ["train.epochs=3", "model.gate=softmax", "stages.1.epochs=2", "method.rank=4"])
    assert (changed.train.epochs, changed.model.gate, changed.stages[1].epochs) == (3, "softmax", 2)
    assert parse_assignment("a=[1, 2]") == ("a", [1, 2])
    with pytest.raises(RecipeError, match="key=value"):
        parse_assignment("=3")


def test_shipped_recipes_are_valid_and_named_after_their_file() -> None:
    assert "digits" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_recipe_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(SHORT)
    assert load_recipe("digits").name == "short"
    assert tomllib.loads(SHORT)["name"] == "short"
    Path("bad.toml").write_text("name = ")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe("bad.toml")
    Path("bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe("bytes.toml")
