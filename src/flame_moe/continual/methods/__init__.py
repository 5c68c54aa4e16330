"""Continual-learning methods by name: a new one is one new file and one line here."""

from __future__ import annotations

from flame_moe.continual.methods.base import Commit, Method
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.continual.methods.flame import FlameCL
from flame_moe.errors import RecipeError, nearest
from flame_moe.schema import MethodConfig

METHODS: dict[str, type[Method]] = {method.name: method for method in (FlameCL, FineTune)}


def make_method(config: MethodConfig) -> Method:
    """The method a recipe names.

    Raises:
        RecipeError: for an unknown name, with the nearest known one.
    """
    if config.name not in METHODS:
        raise RecipeError(f"unknown method '{config.name}'", where="method.name", mend=nearest(config.name, METHODS))
    return METHODS[config.name](config)


__all__ = ["METHODS", "Commit", "Method", "make_method"]
