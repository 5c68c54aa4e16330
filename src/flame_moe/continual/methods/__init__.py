"""Continual-learning methods by name: a new one is one new file and one line here."""

from __future__ import annotations

from flame_moe.continual.methods.base import Commit, Method, MethodState, Setting, StageContext, concludes
from flame_moe.continual.methods.ewc import EWC
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.continual.methods.flame import FlameCL
from flame_moe.continual.methods.joint import Joint
from flame_moe.continual.methods.lwf import LwF
from flame_moe.continual.methods.mas import MAS
from flame_moe.continual.methods.replay import Replay
from flame_moe.errors import RecipeError, nearest
from flame_moe.schema import MethodConfig

METHODS: dict[str, type[Method]] = {method.name: method for method in (FlameCL, FineTune, Joint, Replay, EWC, MAS, LwF)}


def make_method(config: MethodConfig) -> Method:
    """The method a recipe names.

    Raises:
        RecipeError: for an unknown name, with the nearest known one; or a key that the method does not read.
    """
    if config.name not in METHODS:
        raise RecipeError(f"unknown method '{config.name}'", where="method.name", mend=nearest(config.name, METHODS))
    return METHODS[config.name](config)


def alike(name: str, config: MethodConfig) -> MethodConfig:
    """Another method's settings: the rank of `config` where the method reads one, its own defaults otherwise."""
    reads_rank = name in METHODS and "rank" in METHODS[name].keys
    return MethodConfig(name=name, rank=config.rank) if reads_rank else MethodConfig(name=name)


__all__ = [
    "METHODS",
    "Commit",
    "Method",
    "MethodState",
    "Setting",
    "StageContext",
    "alike",
    "concludes",
    "make_method",
]
