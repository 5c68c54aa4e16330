"""One adapter for the whole stream: jointly, one task after another, and with a term that holds on to earlier tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame_moe.mllm.methods.base import Grid, Method, Part, Say, TaskData, with_adapter
from flame_moe.mllm.stream.encode import Batch, together
from flame_moe.mllm.stream.score import answer_loss

ADAPTER = "stream"


class Sequential(Method):
    """Sequential fine-tuning of one LoRA adapter (Hu et al. 2022): nothing holds on to earlier tasks."""

    name = "sequential"
    label = "sequential LoRA"
    grid: ClassVar[Grid] = {"rate": (0.4, 1.0)}

    def prepare(self, model: Any) -> Any:
        return with_adapter(model, ADAPTER, self.settings, self.seed)

    def learn(self, tasks: Sequence[TaskData], say: Say) -> None:
        (task,) = tasks
        self.samples = 0
        self.before(task)
        self.fit(task.train, self.trained(), say, what=task.name, loss=self.loss)
        self.after(task)
        self.tasks.append(task.name)

    def before(self, task: TaskData) -> None:
        """What is to be noted of the model before it changes."""

    def after(self, task: TaskData) -> None:
        """What is to be noted of a task that was learned."""

    def loss(self, batch: Batch) -> Tensor:
        """What is minimised: the answers' cross-entropy, and the method's own term once a task was learned."""
        loss = self.answered(batch)
        return loss + self.term() if self.tasks else loss

    def term(self) -> Tensor | float:
        """The method's own term; none here."""
        return 0.0

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        return self.call(batch)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def stored(self) -> dict[Part, int]:
        return {"experts": sum(p.numel() for p in self.trained())}

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class Joint(Sequential):
    """All tasks at once, with as many steps as they have one after another: what forgetting costs nothing."""

    name = "joint"
    label = "joint training"
    joint = True

    def learn(self, tasks: Sequence[TaskData], say: Say) -> None:
        self.samples = 0
        data, steps = together([task.train for task in tasks]), self.settings.steps * len(tasks)
        self.fit(data, self.trained(), say, what="all tasks", steps=steps)
        self.tasks = [task.name for task in tasks]


class LwF(Sequential):
    """Learning without forgetting (Li and Hoiem 2016): answers of the model before the task are distilled, on the
    inputs of the new task: strength T^2 KL(before || now) over the answers' tokens, T = 2."""

    name = "lwf"
    label = "LwF"
    grid: ClassVar[Grid] = {"strength": (0.1, 1.0, 10.0)}
    TEMPERATURE: ClassVar[float] = 2.0

    def before(self, task: TaskData) -> None:
        self._old = {name: p.detach().clone() for name, p in self.adapter().items()}

    def loss(self, batch: Batch) -> Tensor:
        if not self.tasks:
            return self.answered(batch)
        asked = batch.answers
        logits = self.call(asked)
        return answer_loss(logits, asked.labels) + self._moved(logits, asked)

    def _moved(self, logits: Tensor, batch: Batch) -> Tensor:
        inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask, "use_cache": False}
        inputs["logits_to_keep"] = batch.wanted
        with torch.no_grad():
            before = torch.func.functional_call(self.model, self._old, (), inputs).logits
        here = batch.labels[:, 1:] >= 0
        old = (before[:, :-1][here].float() / self.TEMPERATURE).log_softmax(-1)
        new = (logits[:, :-1][here].float() / self.TEMPERATURE).log_softmax(-1)
        kl = nn.functional.kl_div(new, old, log_target=True, reduction="batchmean")
        return self.settings.strength * self.TEMPERATURE**2 * kl
