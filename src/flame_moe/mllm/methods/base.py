"""What a continual method must do: learn one task after another on a frozen model, and answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from flame_moe.description import Description
from flame_moe.extras import needed
from flame_moe.mllm.shelf import Shelf, Taught
from flame_moe.mllm.stream.encode import Batch, Encoded, shuffled
from flame_moe.mllm.stream.fitting import Steps
from flame_moe.mllm.stream.score import answer_loss, ask
from flame_moe.training.seeding import derive, generator, seed_torch

TARGETS = r"(?!.*vision).*layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""The linear layers of the language model, by name; never of a vision tower."""
Say = Callable[[str, float], None]
Positive = Annotated[int, Field(ge=1)]
Grid = Mapping[str, Sequence[float]]


class Settings(Description):
    """How a task is learned; a stream has defaults of its own.

    Attributes:
        steps, batch: of each task; joint training takes as many steps as all tasks together.
        lr: highest learning rate, reached after 6 % of the steps, then a cosine down to 0.
        rate: factor of `lr`, among whose values validation chooses whatever a stream's own rate is.
        rank: of adapters.
        strength: of a method's own term in the loss: EWC, MAS, LwF, O-LoRA, PASs-MoE.
        importance_samples: of a task, from which EWC and MAS tell what matters.
        gate_steps, gate_lr: of routing vectors.
        top_k: of routing; at most as many as there are experts.
        temperature: of routing; divides the scores.
        score: of routed adapters, see `flame_moe.mllm.adapters.scores`.
        null_share: of the foundation sample's tokens that the null expert is fitted to win.
        experts: of mixtures of a fixed number of experts.
    """

    steps: Positive = 200
    batch: Positive = 64
    lr: Annotated[float, Field(gt=0)] = 5e-3
    rate: Annotated[float, Field(gt=0)] = 1.0
    rank: Positive = 8
    strength: Annotated[float, Field(ge=0)] = 1.0
    importance_samples: Positive = 200
    gate_steps: Positive = 60
    gate_lr: Annotated[float, Field(gt=0)] = 5e-3
    top_k: Positive = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0
    score: Literal["standardized", "cosine", "raw", "arrow"] = "standardized"
    null_share: Annotated[float, Field(gt=0, lt=1)] = 0.9
    experts: Positive = 4


class TaskData(NamedTuple):
    """One task of a stream, as the model reads it."""

    name: str
    train: Encoded
    val: Encoded
    test: Encoded


Part = Literal["experts", "routers", "memory"]


class Share(NamedTuple):
    """How routing treats the samples of a task: the share that the task's own expert has of them, and the entropy of
    the weights over the experts, in nats; means over tokens and layers."""

    own: float
    entropy: float


class Method(ABC):
    """A continual method on one frozen model. The model is changed in place and belongs to the method.

    Args:
        model: a causal language model or a multimodal one of transformers, with frozen weights.
        settings: how tasks are learned.
        seed: of new weights and of the order of samples.
        foundation: a sample of what the model could do before, for methods that look at it; not the one measured on.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    grid: ClassVar[Grid] = {}
    """Settings among which validation chooses in comparisons: key -> values."""
    joint: ClassVar[bool] = False
    """Whether it learns all tasks at once."""
    shelf: Shelf | None = None
    """Where experts that are trained alone are kept and found."""
    spared: float = 0.0
    """Seconds that the last task would have taken more, had its expert not been found."""
    knows_task: ClassVar[bool] = False
    """Whether it must be told which task a sample belongs to; it has then no answer for other samples."""

    def __init__(self, model: Any, settings: Settings, seed: int, foundation: Encoded | None = None) -> None:
        self.settings, self.seed, self.foundation = settings, seed, foundation
        self.embedding: nn.Module = model.get_input_embeddings()
        self.model = self.prepare(model)
        self.tasks: list[str] = []
        self.samples = 0
        """How many samples the last task was shown, with repetition."""

    @abstractmethod
    def prepare(self, model: Any) -> Any:
        """The model with what the method adds to it."""

    @abstractmethod
    def learn(self, tasks: Sequence[TaskData], say: Say) -> None:
        """Learn the next task; with `joint` all of them."""

    @abstractmethod
    def logits(self, batch: Batch, task: str | None) -> Tensor:
        """(B, L, vocabulary), or (B, wanted, vocabulary).

        Args:
            task: of the samples, for methods that know it; None for samples of no task.
        """

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """What the last task trained."""

    @abstractmethod
    def stored(self) -> dict[Part, int]:
        """Numbers that are kept after the last task, to answer or to go on learning."""

    def routing(self, task: str, samples: Encoded) -> Share | None:
        """How samples of a learned task are routed; None for methods that do not route."""
        return None

    def call(self, batch: Batch) -> Tensor:
        """Logits of the model as it is set now, (B, L, vocabulary), or of the last tokens that are wanted."""
        return ask(self.model, batch)

    def answered(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the answers' tokens."""
        asked = batch.answers
        return answer_loss(self.call(asked), asked.labels)

    def fit_alone(self, task: TaskData, say: Say) -> None:
        """Train the expert of a task on nothing but its answers, everything else frozen; or take it from the shelf."""
        s = self.settings
        what = {"task": task.name, "seed": self.seed, "rank": s.rank, "steps": s.steps, "batch": s.batch}
        what |= {"lr": s.lr * s.rate}
        mine = {name: p for name, p in self.model.named_parameters() if f".{task.name}." in name}
        found = None if self.shelf is None else self.shelf.take(what, mine)
        self.spared = 0.0 if found is None else found.seconds
        if found is not None:
            self.samples += found.samples
            return
        before, start = self.samples, time.perf_counter()
        self.fit(task.train, list(mine.values()), say, what=task.name)
        if self.shelf is not None:
            self.shelf.keep(what, mine, Taught(self.samples - before, time.perf_counter() - start))

    def fit(
        self,
        data: Encoded,
        parameters: Sequence[nn.Parameter],
        say: Say,
        *,
        what: str,
        steps: int | None = None,
        lr: float | None = None,
        loss: Callable[[Batch], Tensor] | None = None,
        after: Callable[[int, int], None] | None = None,
    ) -> None:
        """Train some parameters with AdamW on the answers of some samples.

        Args:
            what: place in the run, for messages and for the order of samples.
            steps, lr: instead of the settings'.
            loss: default the mean cross-entropy over the answers' tokens.
            after: told after each step how many were done, of how many.

        Raises:
            NonFiniteError: before the weights take a step along a loss that is no number.
        """
        steps, lr = steps or self.settings.steps, lr or self.settings.lr * self.settings.rate
        loss = loss or self.answered
        step = Steps(parameters, lr, steps, what, weight_decay=0.0)
        order = shuffled(len(data), self.settings.batch, steps, generator(self.seed, "order", what))
        seed_torch(self.seed, "steps", what)
        with training(self.model):
            for which in order:
                step(loss(data.batch(which, self.embedding)))
                self.samples += len(which)
                if after is not None:
                    after(step.done, steps)
                say(what, step.share)


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode within the block, evaluation mode after it."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def library() -> Any:
    """The package peft.

    Raises:
        ExtraMissingError: if it is not installed.
    """
    return needed("peft", "mllm", "a continual adapter")


def with_adapter(model: Any, name: str, settings: Settings, seed: int) -> Any:
    """A model with one more LoRA adapter on every linear layer of its language model, scale 1, made active."""
    peft = library()
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS)
    torch.manual_seed(derive(seed, "adapter", name))
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
        return model
    return peft.get_peft_model(model, config, adapter_name=name)


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers some tensors hold."""
    return sum(t.numel() for t in tensors.values())


def sampled(data: Encoded, count: int, seed: int, *place: str) -> Tensor:
    """Rows of `count` samples, or of all if there are fewer."""
    rng: np.random.Generator = generator(seed, *place)
    return torch.from_numpy(rng.permutation(len(data))[:count].copy())
