"""How a stage is learned: what trains, what is protected, what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.errors import CheckpointError, RecipeError
from flame_moe.nn.model import Flame
from flame_moe.nn.slices import Ragged, Slice, ranks_of, tensors
from flame_moe.schema import MethodConfig, Modality, Task
from flame_moe.training.hooks import Hooks
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import generator

SAMPLED, LEAST = 24, 2
"""Training batches of a stage that a method looks at before it cuts an update, and the fewest of a task among them.
More do not help: docs/performance.md, "How many batches a commit looks at"."""


def share(tasks: int) -> int:
    """How many training batches of each of a stage's tasks are looked at: `SAMPLED` in all, never below `LEAST`.

    Example:
        >>> share(1), share(2), share(30)
        (24, 12, 2)
    """
    return max(LEAST, SAMPLED // tasks)


class Commit(NamedTuple):
    """What became of one weight at the end of a stage.

    Attributes:
        matrix: its name in the model.
        rank: rank kept, of a stack the largest; None where the update was stored dense.
        relative_error: ||Delta - kept||_F / ||Delta||_F.
        functional_error: the same of what it does, (E||(Delta - kept) z||^2 / E||Delta z||^2)^(1/2) over the inputs z
            of the training data; after the bias has taken the mean if it does. None where inputs were not gathered.
        ranks: of a stack whose matrices keep different ranks, each of them, None for dense; else empty.
        parameters: numbers kept.
    """

    matrix: str
    rank: int | None
    relative_error: float
    functional_error: float | None = None
    ranks: tuple[int | None, ...] = ()
    parameters: int = 0

    @classmethod
    def of(cls, matrix: str, part: Slice, relative_error: float, functional_error: float | None = None) -> Commit:
        """The record of a slice."""
        numbers = 0 if part is None else sum(t.numel() for t in tensors(part).values())
        if isinstance(part, Ragged):
            low = [rank for rank in part.ranks if rank is not None]
            return cls(matrix, max(low, default=None), relative_error, functional_error, part.ranks, numbers)
        return cls(matrix, ranks_of(part, 1)[0], relative_error, functional_error, (), numbers)

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Commit:
        """The inverse of `_asdict` through JSON."""
        return cls(**{**plain, "ranks": tuple(plain.get("ranks", ()))})


class Round(NamedTuple):
    """A part of a stage's training.

    Attributes:
        epochs: its length.
        compressed: whether updates train in the form in which they are kept.
        routing_only: whether only routers and heads train.
    """

    epochs: int
    compressed: bool = False
    routing_only: bool = False


class Setting(NamedTuple):
    """One point of a method's grid.

    Attributes:
        keys: of `MethodConfig`, the name left out.
        lr: factor of the learning rate of every stage after the first.
    """

    keys: Mapping[str, Any] = {}
    lr: float = 1.0


RATES: tuple[Setting, ...] = (Setting(lr=1.0), Setting(lr=3.0), Setting(lr=10.0))
"""The grid of a method that learns new numbers and has nothing of its own to choose."""
CAREFUL_RATES: tuple[Setting, ...] = (Setting(lr=0.3), Setting(lr=1.0), Setting(lr=3.0))
"""The grid of a method that trains on what earlier tasks read: a smaller step forgets less."""


@dataclass(frozen=True)
class StageContext:
    """What a method may look at while it learns a stage.

    Attributes:
        model: the network, with the stage's modalities, routers and heads; training changes it in place.
        stage: the stage's index.
        tasks: learned in it.
        modalities: all that its tasks read.
        new_modalities: those that appear for the first time.
        problems: its tasks, with their training and validation batches.
        earlier: tasks of earlier stages with batches of the training samples that the method may read again
            (`Method.rereads`, `Method.memory`), and of no others.
        cursors: task -> the stage at whose weights it is read, for every task so far, this stage's included.
        batch_size: samples of one task in a step.
        seed: of the recipe; `training.seeding.generator(seed, purpose, stage)` draws for a purpose.
    """

    model: Flame
    stage: int
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    new_modalities: tuple[str, ...]
    problems: Mapping[str, Problem]
    earlier: Mapping[str, Problem]
    cursors: Mapping[str, int]
    batch_size: int
    seed: int

    def batches(self) -> Iterator[FlexiBatch]:
        """All training batches of the stage's tasks, task after task, in the order of the store."""
        return (batch for problem in self.problems.values() for batch in problem.train.batches(None))

    def sampled(self, purpose: str) -> Iterator[tuple[Problem, FlexiBatch]]:
        """Some training batches, as many of each of the stage's tasks (`share`), drawn by the seed for a purpose."""
        for name, problem in self.problems.items():
            draw = generator(self.seed, purpose, self.stage, name)
            yield from ((problem, batch) for batch in islice(problem.train.batches(draw), share(len(self.problems))))

    @property
    def old_tasks(self) -> tuple[str, ...]:
        """Tasks of earlier stages, in the order in which they were learned."""
        return tuple(name for name in self.cursors if name not in self.tasks)


@dataclass
class MethodState:
    """What a method keeps from stage to stage beside the model; saved with it.

    Attributes:
        tensors: name -> tensor.
        meta: JSON-ready.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Method(Hooks, ABC):
    """One continual-learning method.

    A stage goes: `add` (with `add_routers`), `begin` (what trains), `prepare`, training of whatever requires a gradient
    with the calls of `Hooks` in each step, `conclude`, `compress`, `commit`. Training may have several `rounds`:
    `enter` begins each after the first, and `compress` is called before the first that trains compressed updates.
    The first stage is learned alike by every method: everything trains, and hooks do nothing. What a method remembers
    changes in `prepare` and `conclude` only, so that a stage that is taken up again after a crash ends as if it had not
    stopped.

    Attributes:
        name: in recipes.
        keys: of `MethodConfig` that this method reads and may share with others (a rank).
        defaults: further keys that it reads, with its own values where they are left out; all others are refused.
        rereads: whether all training samples of earlier tasks may be read again.
        grid: settings among which validation chooses; as many for every method.
        memory: task -> ids of its training samples that may be read again.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, float]] = {}
    rereads: ClassVar[bool] = False
    grid: ClassVar[tuple[Setting, ...]] = RATES

    def __init__(self, config: MethodConfig) -> None:
        _refuse_unused(type(self), config)
        self.config = config
        self.memory: dict[str, tuple[str, ...]] = {}

    def value(self, key: str) -> float:
        """A key of the method: as the recipe has it, or the method's own default."""
        given: float | None = getattr(self.config, key)
        return self.defaults[key] if given is None else given

    def add(
        self, model: Flame, stage: int, tasks: Sequence[Task], modalities: Sequence[str], new: Sequence[Modality]
    ) -> None:
        """Add everything that a stage gets: new modalities, router heads, task heads. Also called to read a checkpoint.

        Args:
            model: the network.
            stage: its index.
            tasks: learned in it.
            modalities: all that they read.
            new: those that appear for the first time.
        """
        for modality in new:
            model.add_modality(modality, stage)
        self.add_routers(model, stage, modalities, [modality.name for modality in new])
        for task in tasks:
            model.add_task(task)

    @abstractmethod
    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        """Add the router heads that a stage gets.

        Args:
            model: the network, which already has the stage's modalities.
            stage: its index.
            modalities: all that the stage's tasks read.
            new: those that appear for the first time.
        """

    @abstractmethod
    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        """Prepare the model to learn a stage: start updates, and set what requires a gradient."""

    def prepare(self, context: StageContext) -> None:
        """Look at the data of the stage once, after `begin` and before the first step."""

    def problems(self, context: StageContext) -> Mapping[str, Problem]:
        """What the stage trains and validates on; its own tasks, unless a method says otherwise."""
        return context.problems

    def rounds(self, stage: int, epochs: int) -> Sequence[Round]:
        """How a stage's epochs are divided.

        Raises:
            RecipeError: if there are too few.
        """
        return (Round(epochs),)

    def enter(self, context: StageContext, part: Round) -> None:
        """Set what requires a gradient in a round after the first."""

    def compresses(self, stage: int) -> bool:
        """Whether `compress` has anything to do in a stage."""
        return False

    def compress(self, context: StageContext) -> list[Commit]:
        """Bring the stage's updates to the form in which they are kept; they may train on in it."""
        return []

    def conclude(self, context: StageContext) -> None:
        """Learn from the trained model what later stages need, before the commit."""

    @abstractmethod
    def commit(self, model: Flame, stage: int) -> list[Commit]:
        """Keep what the stage learned."""

    def state(self) -> MethodState:
        """Everything that later stages need beside the model."""
        return MethodState()

    def restore(self, model: Flame, state: MethodState) -> None:
        """Take up a saved state; the model is as it was when it was saved.

        Raises:
            CheckpointError: if it is not a state of this method for this model.
        """
        if state.tensors or state.meta:
            raise CheckpointError(f"the method '{self.name}' keeps no state, and the checkpoint holds one")


def over(key: str, low: float, high: float, rates: tuple[float, float] = (1.0, 3.0)) -> tuple[Setting, ...]:
    """A grid of one key and the rate: a strong protection may need larger steps to learn anything new."""
    slow, fast = rates
    return (Setting({key: low}, slow), Setting({key: low}, fast), Setting({key: high}, fast))


def concludes(method: Method) -> bool:
    """Whether a method learns anything from a stage beside the model."""
    return type(method).conclude is not Method.conclude


def _refuse_unused(method: type[Method], config: MethodConfig) -> None:
    known = (*method.keys, *method.defaults)
    for key, info in MethodConfig.model_fields.items():
        if key != "name" and key not in known and getattr(config, key) != info.default:
            mend = f"It reads {_listed(known)}." if known else "It reads no key but its name."
            raise RecipeError(f"the method '{method.name}' does not read '{key}'", where=f"method.{key}", mend=mend)


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)
