"""Each room imports only from rooms above it: parsed, not run, so imports inside functions count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flame_moe

ROOT = Path(flame_moe.__file__).parent

# Room -> the rooms it may import from. What is not named here does not exist.
FOUNDATION = {"errors", "description", "schema", "batch", "files"}
RESULTS = {"errors", "description", "schema", "files", "profile", "results", "progression", "measures"}
MAY: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "locking": {"errors"},
    "description": {"errors"},
    "schema": {"errors", "description"},
    "batch": {"errors"},
    "extras": {"errors"},
    "foreign": {"errors", "extras"},
    "profile": {"description", "schema"},
    "results": {"errors", "description", "schema", "files", "profile"},
    "progression": {"errors", "schema", "results"},
    "measures": {"results", "progression"},
    "data": FOUNDATION | {"profile", "foreign", "extras"},
    "nn": {"errors", "schema", "batch", "foreign"},
    "environment": {"results", "nn"},
    "training": FOUNDATION | {"data", "nn", "results"},
    "continual": FOUNDATION | {"data", "nn", "training"},
    "analysis": FOUNDATION | {"data", "nn", "training", "continual"},
    "report": RESULTS,
    "recorder": FOUNDATION | RESULTS | {"environment"} | {"data", "nn", "training", "continual", "analysis"},
    "runs": FOUNDATION | RESULTS | {"data", "nn", "training", "continual", "analysis", "report", "recorder", "locking"},
    "certification": FOUNDATION
    | RESULTS
    | {"environment", "data", "nn", "training", "continual", "report", "recorder", "runs", "locking"},
    "scoring": FOUNDATION | RESULTS | {"data", "nn", "training", "continual", "analysis", "recorder", "runs"},
    "mllm": FOUNDATION
    | RESULTS
    | {"environment", "foreign", "extras", "locking", "training", "continual", "nn", "report"},
}
FREE = {"experiments", "recipes", "cli", "cli_mllm", "cli_progress", "cli_show"}
"""Rooms at the very end: they may import everything, and nothing above imports them."""
NOT_IN = {
    "data": {"torch.nn", "matplotlib", "typer", "rich"},
    "nn": {"polars", "pyarrow", "sklearn", "safetensors", "matplotlib", "pathlib"},
    "report": {"torch", "polars"},
    "schema": {"torch"},
    "results": {"torch"},
}


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


FILES = [f for f in sorted(ROOT.rglob("*.py")) if f != ROOT / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_above_it(file: Path) -> None:
    here = room(file)
    if here not in MAY:
        return
    rooms = {name.split(".")[1] for name in imports(file) if name.startswith("flame_moe.")}
    assert rooms <= MAY[here] | {here}, f"{here} must not import {sorted(rooms - MAY[here] - {here})}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_room_does_not_use_what_it_should_not_know(file: Path) -> None:
    banned = NOT_IN.get(room(file), set())
    used = {name for name in imports(file) for b in banned if name == b or name.startswith(f"{b}.")}
    assert used == set()


def test_every_room_is_on_the_plan() -> None:
    """A new room is a decision: it gets its line in the table above."""
    assert {room(f) for f in FILES} - set(MAY) - {"__main__"} <= FREE


def test_the_table_has_no_room_that_is_below_itself() -> None:
    order = list(MAY)
    for here, above in MAY.items():
        assert all(order.index(other) < order.index(here) for other in above), here


def test_nothing_executes_code_from_files() -> None:
    for file in FILES:
        calls = {name.split(".")[0] for name in imports(file)}
        assert not calls & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}, file
        text = file.read_text(encoding="utf-8")
        assert "torch.load(" not in text, file
        assert "allow_pickle=True" not in text, file
