"""Importing is quick, the public names are all there, and the wheel works without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flame_moe

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "sklearn", "scipy", "matplotlib", "polars", "pyarrow", "pydantic", "typer")


def python(code: str, **options: object) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return str(done.stdout).strip()


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, flame_moe; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == "[]"


def test_model_names_need_neither_reports_nor_sources() -> None:
    heavy = [name for name in HEAVY if name not in ("torch", "pydantic")]
    code = f"import sys; from flame_moe import Flame, Recipe, Sample; print([n for n in {heavy} if n in sys.modules])"
    assert python(code) == "[]"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in flame_moe.__all__:
        assert getattr(flame_moe, name).__doc__, name
    assert set(flame_moe.__all__) <= set(dir(flame_moe))
    assert sorted(flame_moe.__all__) == list(flame_moe.__all__)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Flamme'"):
        _ = flame_moe.Flamme


def test_wheel_holds_everything_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("flame_moe-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for needed in ("py.typed", "recipes/digits.toml", "report/template.html", "report/style.css", "cli.py"):
        assert f"flame_moe/{needed}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("flame_moe/", "flame_moe-")) for name in names)
    outside = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}}
    assert python("import flame_moe; print(flame_moe.__file__)", **outside).startswith(str(tmp_path))
    code = "from flame_moe.recipes import load_recipe; print(load_recipe('digits').name)"
    assert python(code, **outside) == "digits"
    command = [sys.executable, "-m", "flame_moe", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, **outside)
    assert said.stdout == f"flame-moe {flame_moe.__version__}\n"
