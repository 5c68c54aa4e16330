"""Methods that keep, for every matrix, the directions in which earlier stages had inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flame_moe.continual.methods.base import Method, MethodState, Setting, over
from flame_moe.continual.subspace import Subspaces
from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig


class KeepsSpaces(Method):
    """Keeps an orthonormal basis per matrix, of a space that holds a share `threshold` of the energy of its inputs."""

    defaults: ClassVar[Mapping[str, float]] = {"threshold": 0.95}
    grid: ClassVar[tuple[Setting, ...]] = over("threshold", 0.9, 0.99)

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.spaces = Subspaces()

    def state(self) -> MethodState:
        return MethodState(dict(self.spaces.bases))

    def restore(self, model: Flame, state: MethodState) -> None:
        self.spaces = Subspaces(state.tensors)
        self.spaces.check(model)
