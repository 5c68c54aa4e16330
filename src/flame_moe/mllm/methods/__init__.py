"""The continual methods of the room: one small class each, behind one interface."""

from __future__ import annotations

from flame_moe.errors import RecipeError, nearest
from flame_moe.mllm.methods.base import Method, Settings, TaskData
from flame_moe.mllm.methods.experts import Identity, Merged, OLora, Retrieval
from flame_moe.mllm.methods.mixture import (
    MoeSoftmax,
    MoeTopk,
    PassCode,
    PassEven,
    PassMoe,
    PassRandom,
    PassReweighting,
)
from flame_moe.mllm.methods.quadratic import Ewc, Mas
from flame_moe.mllm.methods.routed import (
    AverageActivation,
    AverageActivationModel,
    AverageActivationSequence,
    Routed,
    RoutedDiscriminant,
    RoutedModel,
    RoutedNull,
    RoutedSequence,
)
from flame_moe.mllm.methods.sequential import Joint, LwF, Sequential

_ALL: tuple[type[Method], ...] = (
    *(Joint, Sequential, Ewc, Mas, LwF, OLora),
    *(Identity, Merged, Retrieval, AverageActivation, AverageActivationSequence, AverageActivationModel),
    *(Routed, RoutedSequence, RoutedModel, RoutedNull, RoutedDiscriminant),
    *(PassMoe, PassReweighting, PassRandom, PassEven, PassCode, MoeSoftmax, MoeTopk),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
"""Name -> method."""


def method_named(name: str) -> type[Method]:
    """A method by its name.

    Raises:
        RecipeError: naming the nearest known one.
    """
    if name not in METHODS:
        raise RecipeError(f"there is no method '{name}'", mend=nearest(name, METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Method", "Settings", "TaskData", "method_named"]
