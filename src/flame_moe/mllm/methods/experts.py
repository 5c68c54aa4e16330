"""One adapter per task, trained alone: with known identity, merged, or found by retrieval; and O-LoRA's sum of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame_moe.mllm.methods.base import Grid, Method, Part, Say, Settings, Share, TaskData, sampled, with_adapter
from flame_moe.mllm.stream.encode import Batch, Encoded

MERGED = "merged"


class Experts(Method):
    """Trains a LoRA adapter of its own for each task; earlier ones are not touched, not by one bit."""

    grid: ClassVar[Grid] = {"rate": (0.4, 1.0)}

    current = ""
    """The task whose adapter was trained last."""

    def prepare(self, model: Any) -> Any:
        return model

    def learn(self, tasks: Sequence[TaskData], say: Say) -> None:
        (task,) = tasks
        self.samples = 0
        self.model = with_adapter(self.model, task.name, self.settings, self.seed)
        self.current = task.name
        self.teach(task, say)
        self.tasks.append(task.name)
        self.after(task)

    def teach(self, task: TaskData, say: Say) -> None:
        """Train the new adapter."""
        self.fit_alone(task, say)

    def after(self, task: TaskData) -> None:
        """What is to be done with a new expert."""

    def trained(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if f".{self.current}." in name]

    def stored(self) -> dict[Part, int]:
        return {"experts": len(self.tasks) * sum(p.numel() for p in self.trained())}

    def expert(self, batch: Batch, name: str) -> Tensor:
        """Logits of one adapter alone."""
        if self.model.active_adapters != [name]:
            self.model.set_adapter(name)
        return self.call(batch)


class Identity(Experts):
    """Each sample is answered by its own task's adapter: the upper bound of routing."""

    name = "identity"
    label = "one adapter per task, identity known"
    knows_task = True

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        if task is None:
            with self.model.disable_adapter():
                return self.call(batch)
        return self.expert(batch, task)


class Merged(Experts):
    """The mean of all updates, 1/T sum of B_i A_i, as one adapter."""

    name = "merged"
    label = "merged adapters"

    def after(self, task: TaskData) -> None:
        if MERGED in self.model.peft_config:
            self.model.delete_adapter(MERGED)
        count = len(self.tasks)
        self.model.add_weighted_adapter(self.tasks, [1.0 / count] * count, MERGED, combination_type="cat")

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        return self.expert(batch, MERGED)


class Retrieval(Experts):
    """A sample goes to the task whose mean prompt is most like its own: cosine of the means of the base model's last
    hidden states over the prompt."""

    name = "retrieval"
    label = "retrieval of adapters"
    MEANS_OF = 500

    def __init__(self, model: Any, settings: Settings, seed: int, foundation: Encoded | None = None) -> None:
        super().__init__(model, settings, seed, foundation)
        self.means: dict[str, Tensor] = {}

    def after(self, task: TaskData) -> None:
        rows = sampled(task.train, self.MEANS_OF, self.seed, "means", task.name)
        seen = [self.prompt(task.train.batch(part, self.embedding)) for part in rows.split(self.settings.batch)]
        self.means[task.name] = torch.cat(seen).mean(0)

    @torch.no_grad()
    def prompt(self, batch: Batch) -> Tensor:
        """(B, width) mean hidden state of the prompt in the base model; answers are masked out."""
        inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask, "use_cache": False}
        with self.model.disable_adapter():
            found = self.model(**inputs, output_hidden_states=True, logits_to_keep=1)
        states = found.hidden_states[-1].float()
        weights = batch.prompt.float().unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1)

    def chosen(self, batch: Batch) -> Tensor:
        """(B,) place of the task that each sample goes to."""
        means = nn.functional.normalize(torch.stack([self.means[task] for task in self.tasks]), dim=-1)
        return (nn.functional.normalize(self.prompt(batch), dim=-1) @ means.T).argmax(-1)

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        chosen = self.chosen(batch)
        found: Tensor | None = None
        for place in chosen.unique().tolist():
            rows = chosen == place
            said = self.expert(batch.take(rows), self.tasks[place])
            if found is None:
                found = said.new_zeros((len(chosen), *said.shape[1:]))
            found[rows] = said
        assert found is not None
        return found

    def routing(self, task: str, samples: Encoded) -> Share | None:
        own = self.tasks.index(task)
        right = [(self.chosen(b) == own).float() for _, b in samples.batches(self.settings.batch, self.embedding)]
        return Share(float(torch.cat(right).mean()), 0.0)

    def stored(self) -> dict[Part, int]:
        return super().stored() | {"routers": sum(mean.numel() for mean in self.means.values())}


class OLora(Experts):
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): the updates of all tasks are summed; a new task's A is pushed to be
    orthogonal to those before it: strength sum over i < t of ||A_i A_t^T||_F^2."""

    name = "olora"
    label = "O-LoRA"
    grid: ClassVar[Grid] = {"strength": (0.5, 5.0, 50.0, 500.0)}

    def teach(self, task: TaskData, say: Say) -> None:
        self._weights: list[tuple[Tensor, list[Tensor]]] | None = None
        self.fit(task.train, self.trained(), say, what=task.name, loss=self.loss)

    def loss(self, batch: Batch) -> Tensor:
        if self._weights is None:
            new = self.current
            self._sum([*self.tasks, new])
            layers = [m for m in self.model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
            self._weights = [(m.lora_A[new].weight, [m.lora_A[t].weight for t in self.tasks]) for m in layers]
        loss = self.answered(batch)
        if self.tasks:
            overlap = [(torch.cat(old) @ own.T).square().sum() for own, old in self._weights]
            loss = loss + self.settings.strength * torch.stack(overlap).sum()
        return loss

    def after(self, task: TaskData) -> None:
        self._sum(self.tasks)

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        return self.call(batch)

    def _sum(self, names: list[str]) -> None:
        """Make several adapters active; only the one that is being learned trains."""
        self.model.base_model.set_adapter(names)
        for name, p in self.model.named_parameters():
            p.requires_grad_(f".{self.current}." in name)
