"""The recipes that come with the package, and how a recipe is found, changed and read.

A new one is one TOML file in this folder; `flame run NAME OUT` finds it by its name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from flame_moe.errors import RecipeError, nearest
from flame_moe.schema import Recipe

__all__ = ["load_recipe", "parse_assignment", "recipe_names"]


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, in alphabetical order.

    Example:
        >>> "digits" in recipe_names()
        True
    """
    return tuple(sorted(item.name[:-5] for item in files(__name__).iterdir() if item.name.endswith(".toml")))


def load_recipe(name_or_path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or from a TOML file, and change some of its keys.

    Args:
        name_or_path: the name of a recipe that comes with the package, or a path.
        changes: "key=value", where dots lead into tables and numbers into lists, and the value is written as in TOML
            (a bare word is text).

    Raises:
        RecipeError: if there is no such recipe, it is not valid, or a change does not fit.

    Example:
        >>> load_recipe("digits", ["train.epochs=3", "stages.1.epochs=2"]).train.epochs
        3
    """
    text, where = _read(str(name_or_path))
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe is not valid TOML: {error}", where=where) from None
    for change in changes:
        _assign(data, change)
    return Recipe.parse(data, where=f"{where} with changes" if changes else where)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split "key=value" and read the value as TOML; what is not TOML is text.

    Raises:
        RecipeError: if there is no key or no "=".

    Example:
        >>> parse_assignment("epochs=3"), parse_assignment("gate=softmax")
        (('epochs', 3), ('gate', 'softmax'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"'{text}' is not of the form key=value", mend="Write for example train.epochs=3.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _read(name: str) -> tuple[str, str]:
    """Text of a recipe and what to call it in messages. A file comes before a name."""
    path = Path(name)
    if not path.is_file():
        if name in recipe_names():
            return files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"recipe '{name}'"
        if path.suffix == ".toml" or len(path.parts) > 1:
            raise RecipeError("there is no such recipe file", where=name, mend="Check the path.")
        raise RecipeError(
            f"unknown recipe '{name}'", mend=f"Give a TOML file or a name. {nearest(name, recipe_names())}"
        )
    try:
        return path.read_text(encoding="utf-8"), name
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe is not UTF-8 text: {error.reason}", where=name) from None


def _assign(data: dict[str, Any], change: str) -> None:
    """Change one key in place; whether the key exists is for the recipe to judge."""
    key, value = parse_assignment(change)
    *path, last = key.split(".")
    table: Any = data
    for depth, part in enumerate(path):
        table = table.setdefault(part, {}) if isinstance(table, dict) else _item(table, part, change)
        if not isinstance(table, dict | list):
            raise RecipeError(f"'{'.'.join(path[: depth + 1])}' is a value, not a table", where=f"change {change}")
    if isinstance(table, list):
        _item(table, last, change)
        table[int(last)] = value
    else:
        table[last] = value


def _item(items: list[Any], index: str, change: str) -> Any:
    if not index.isdecimal() or int(index) >= len(items):
        mend = f"Give a number from 0 to {len(items) - 1}." if items else "The list is empty."
        raise RecipeError(f"'{index}' is no place in a list of {len(items)}", where=f"change {change}", mend=mend)
    return items[int(index)]
