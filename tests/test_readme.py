"""What the README shows is what happens: its commands run, in order, as they stand, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import COMMANDS, SHORT

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```(sh|python)\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose file `digits` stands in for the recipe of that name, so that the commands take seconds."""
    place = tmp_path_factory.mktemp("readme")
    store = '[data]\nsource = "digits"\nstore = "stores/digits"'
    (place / "digits").write_text(SHORT.replace('[data]\nsource = "digits"', store))
    return place


def test_every_marked_block_runs_as_it_stands(folder: Path) -> None:
    assert [kind for kind, _ in BLOCKS] == ["python", "sh", "sh", "sh", "sh", "python"]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for kind, text in BLOCKS:
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (folder / "predictions.csv").read_text().startswith("id,task,output,probability,value\n")
    assert (folder / "runs/mine/report.html").is_file()


def test_first_commands_are_targets_of_the_makefile() -> None:
    first = re.search(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert first is not None
    targets = re.findall(r"^make (\w+)", first.group(1), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_table_of_commands_is_complete() -> None:
    assert re.findall(r"^\| `flame (\w+)", README, flags=re.MULTILINE) == [*COMMANDS, "mllm"]


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "REPRODUCIBILITY.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
