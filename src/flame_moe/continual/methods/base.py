"""How a stage is learned: what trains, what is protected, what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig


class Commit(NamedTuple):
    """What became of one weight at the end of a stage.

    Attributes:
        matrix: its name in the model.
        rank: rank kept, or None where the update was stored dense.
        relative_error: ||Delta - kept||_F / ||Delta||_F.
    """

    matrix: str
    rank: int | None
    relative_error: float


class Method(ABC):
    """One continual-learning method, stateless but for its configuration.

    The learner adds modalities and heads, then calls `begin`, trains whatever requires a gradient, and calls `commit`.
    """

    name: ClassVar[str]

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @abstractmethod
    def add_routers(self, model: Flame, stage: int, modalities: Iterable[str], new: Iterable[str]) -> None:
        """Add the router heads that a stage gets.

        Args:
            model: the network, which already has the stage's modalities and task heads.
            stage: its index.
            modalities: all that the stage's tasks read.
            new: those that appear for the first time.
        """

    @abstractmethod
    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        """Prepare the model to learn a stage: start updates, and set what requires a gradient."""

    @abstractmethod
    def commit(self, model: Flame, stage: int) -> list[Commit]:
        """Keep what the stage learned."""
