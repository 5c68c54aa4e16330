"""The documentation is complete and true where a machine can tell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flame_moe.continual.methods import METHODS
from flame_moe.data.sources import source_names
from flame_moe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}


def rooms_of(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key of a description and of those inside it -> its default as the documentation writes it."""
    keys = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = shown(field.get_default(call_default_factory=True))
        inner = description_in(field.annotation)
        if inner is not None:
            keys |= rooms_of(inner, f"{prefix}{name}.")
    return keys


def description_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, UnionType) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in get_args(annotation) if (found := description_in(part))), None)


def shown(default: Any) -> str:
    if default is PydanticUndefined:
        return ""
    if default is None:
        return "none"
    if isinstance(default, BaseModel):
        return "{}"
    return json.dumps(list(default) if isinstance(default, tuple) else default)


def test_every_recipe_key_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.*?) ?\| .+ \|$", DOCS["recipes.md"], flags=re.MULTILINE)
    assert dict(rows) == rooms_of(Recipe)
    assert len(rows) == len(dict(rows))


def test_every_method_and_source_is_documented() -> None:
    assert all(f"`{name}`" in DOCS["recipes.md"] for name in METHODS)
    assert all(f"| `{name}` |" in DOCS["data.md"] for name in source_names())


def test_every_promise_names_a_test_that_exists() -> None:
    tests = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", DOCS["architecture.md"])
    assert len(named) >= 8
    for name in named:
        assert f"def {name}(" in tests, name


def test_every_room_named_in_the_documentation_exists() -> None:
    table = DOCS["architecture.md"].split("## The two ideas")[0]
    rooms = re.findall(
        r"`(\w+(?:/|\.py))`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    assert len(rooms) > 12
    for room in rooms:
        assert (ROOT / "src/flame_moe" / room).exists(), room


def test_the_example_of_language_models_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", DOCS["mllm.md"], flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "('charts', 'shapes')" in done.stdout


def test_nothing_of_a_machine_is_in_what_is_published() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "REPRODUCIBILITY.md", ROOT / "Makefile"]
    for page in [*pages, ROOT / "constraints.txt", ROOT / "pyproject.toml"]:
        text = page.read_text(encoding="utf-8")
        assert text.isascii(), page.name
        assert not re.search(r"/(?:home|root|tmp|work|opt)/|file://|--index-url", text), page.name
