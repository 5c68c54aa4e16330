"""Routing-based continual learning (arXiv 2511.01831): one expert per task, a routing vector per layer, no identity.

A new task trains its own LoRA and then its own routing vectors; no sample and no parameter of another task is touched,
so what a task costs does not grow with the number of tasks before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flame_moe.errors import RecipeError
from flame_moe.mllm.methods.base import Grid, Method, Part, Say, Share, TaskData, library, sampled
from flame_moe.mllm.stream.encode import Batch, Encoded
from flame_moe.training.seeding import derive


class Routed(Method):
    """Tokens choose among the experts, in every layer for themselves; gates are trained behind a sigmoid."""

    name = "routed"
    label = "routed experts, by token"
    grid: ClassVar[Grid] = {"rate": (0.4, 1.0), "top_k": (1, 2)}
    granularity: ClassVar[Literal["token", "sequence", "model"]] = "token"
    null: ClassVar[bool] = False
    """Whether a null expert takes part."""
    score: ClassVar[Literal["discriminant"] | None] = None
    """Instead of that of the settings."""
    current = ""

    def prepare(self, model: Any) -> Any:
        peft = library()
        from flame_moe.mllm.adapters.routed_config import RoutedLoraConfig

        s = self.settings
        config = RoutedLoraConfig(
            r=s.rank,
            lora_alpha=s.rank,
            top_k=1 if self.granularity == "model" else s.top_k,
            score=self.score or s.score,
            temperature=s.temperature,
            granularity=self.granularity,
        )
        return peft.get_peft_model(model, config, adapter_name="router")

    def learn(self, tasks: Sequence[TaskData], say: Say) -> None:
        (task,) = tasks
        self.samples = 0
        self.current = task.name
        torch.manual_seed(derive(self.seed, "adapter", task.name))
        self.model.add_expert(task.name)
        self.model.train_expert(task.name)
        self.fit_alone(task, say)
        self.gate(task, say)
        self.tasks.append(task.name)
        self.model.route(null_expert=False)
        if self.null and self.foundation is not None:
            self.admit_null(self.foundation)

    def admit_null(self, foundation: Encoded) -> None:
        """Let the null expert take part."""
        rows = sampled(foundation, 200, self.seed, "null")
        self.model.fit_null(list(self.inputs(foundation, rows)), share=self.settings.null_share)
        self.model.route()

    def gate(self, task: TaskData, say: Say) -> None:
        """Give the new expert its routing vectors."""
        self.model.train_gate(task.name)
        gates = [p for p in self.model.parameters() if p.requires_grad]
        steps, lr = self.settings.gate_steps, self.settings.gate_lr
        self.fit(task.train, gates, say, what=f"{task.name} gate", steps=steps, lr=lr)

    def inputs(self, data: Encoded, rows: Tensor) -> Iterator[dict[str, Tensor]]:
        """Some samples as the model takes them."""
        for part in rows.split(self.settings.batch):
            batch = data.batch(part, self.embedding)
            yield {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}

    def prompts(self, data: Encoded, rows: Tensor) -> Iterator[dict[str, Tensor]]:
        """Some samples with labels, by which the layers know where a prompt ends."""
        for part in rows.split(self.settings.batch):
            batch = data.batch(part, self.embedding)
            yield {"inputs_embeds": batch.embeds, "attention_mask": batch.mask, "labels": batch.labels}

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        with self.model.prompted(batch.prompt):  # a sequence is routed by its prompt alone
            return self.call(batch)

    def trained(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if f".{self.current}." in name]

    def stored(self) -> dict[Part, int]:
        kept = ("lora_gate",) if self.score is None else ("lora_gate", "lora_offset")
        ends = tuple(f"{name}.{self.current}" for name in kept)
        gates = sum(p.numel() for n, p in self.model.named_parameters() if n.endswith(ends))
        count = len(self.tasks)
        return {"experts": count * sum(p.numel() for p in self.trained()), "routers": count * gates}

    @torch.no_grad()
    def routing(self, task: str, samples: Encoded) -> Share | None:
        with self.model.recording() as record:
            for _, batch in samples.batches(self.settings.batch, self.embedding):
                self.logits(batch, None)
        return Share(record.mass().get(task, 0.0), record.entropy())


class RoutedSequence(Routed):
    """The whole sample goes where the mean score over its prompt says, in every layer for itself."""

    name = "routed-sequence"
    label = "routed experts, by sequence"
    granularity = "sequence"


class RoutedModel(Routed):
    """All layers agree on one expert for the sample: our own variant. Mean scores lie close together, so top_k is 1."""

    name = "routed-model"
    label = "routed experts, by sample, all layers agreed"
    grid: ClassVar[Grid] = {"rate": (0.4, 1.0)}
    granularity = "model"


class RoutedNull(Routed):
    """By token, with one more expert that does nothing, fitted on a sample of the foundation: our own variant."""

    name = "routed-null"
    label = "routed experts with a null expert, by token"
    null = True


class AverageActivation(Routed):
    """By token, with each layer's mean input as routing vector, not trained (PHATGOOSE's baseline)."""

    name = "average-activation"
    label = "average-activation routing, by token"
    MEANS_OF: ClassVar[int] = 500

    def gate(self, task: TaskData, say: Say) -> None:
        rows = sampled(task.train, self.MEANS_OF, self.seed, "means", task.name)
        self.model.fill_gate(task.name, self.inputs(task.train, rows))


class AverageActivationSequence(AverageActivation):
    """The same by sequence."""

    name = "average-activation-sequence"
    label = "average-activation routing, by sequence"
    granularity = "sequence"


class AverageActivationModel(AverageActivation):
    """The same, all layers agreed on one expert for the sample: our own variant."""

    name = "average-activation-model"
    label = "average-activation routing, all layers agreed"
    grid: ClassVar[Grid] = {"rate": (0.4, 1.0)}
    granularity = "model"


class RoutedDiscriminant(Routed):
    """All layers agree on one expert, or on none, by discriminants of its prompts from the foundation sample: our own.

    Nothing is trained for routing, and what is said of an expert does not depend on the others.
    """

    name = "routed-discriminant"
    label = "routed experts by discriminant, or none"
    grid: ClassVar[Grid] = {"rate": (0.4, 1.0)}
    granularity = "model"
    score = "discriminant"
    null = True
    PROMPTS_OF: ClassVar[int] = 500

    def gate(self, task: TaskData, say: Say) -> None:
        if self.foundation is None:
            raise RecipeError("discriminants need a foundation sample", where=self.name, mend="Give one.")
        rows = sampled(task.train, self.PROMPTS_OF, self.seed, "means", task.name)
        around = self.prompts(self.foundation, torch.arange(len(self.foundation)))
        self.model.fit_gate(task.name, self.prompts(task.train, rows), around)

    def admit_null(self, foundation: Encoded) -> None:
        self.model.route(null_expert=True)
