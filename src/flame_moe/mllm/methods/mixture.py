"""Mixtures of LoRA experts of constant size: PASs-MoE (arXiv 2601.13020), its controls, and MoE-LoRA with a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame_moe.mllm.methods.base import Grid, Method, Part, Say, Share, TaskData, library
from flame_moe.mllm.stream.encode import Batch, Encoded
from flame_moe.training.seeding import derive

_BETA = 0.5
"""lambda_B over lambda_A."""


class PassMoe(Method):
    """Pathway-activation routing and stabilisation of the ranks that mattered; settings.strength is lambda_A."""

    name = "pass-moe"
    label = "PASs-MoE"
    grid: ClassVar[Grid] = {"strength": (30.0, 300.0, 3000.0)}
    preset: ClassVar[str] = "paper"
    options: ClassVar[dict[str, Any]] = {}
    stabilised: ClassVar[bool] = True

    def prepare(self, model: Any) -> Any:
        peft = library()
        from flame_moe.mllm.adapters.pass_config import PassMoeConfig

        s = self.settings
        strength = s.strength if self.stabilised else 0.0
        config = PassMoeConfig.from_preset(
            self.preset,
            experts=s.experts,
            r=s.rank,
            lora_alpha=s.rank,
            lambda_a=strength,
            lambda_b=_BETA * strength,
            **{"temperature": s.temperature} if self.preset == "paper" else {},
            **{"top_k": min(s.top_k, s.experts)} if "topk" in self.options.values() else {},
            **self.options,
        )
        torch.manual_seed(derive(self.seed, "adapter", "mixture"))
        return peft.get_peft_model(model, config, adapter_name="mixture")

    def learn(self, tasks: Sequence[TaskData], say: Say) -> None:
        (task,) = tasks
        self.samples = 0
        self.model.start_task()
        self.model.set_progress(0.0)
        parameters = self.trained()
        self.fit(task.train, parameters, say, what=task.name, loss=self.loss, after=self.progress)
        self.model.finish_task()
        self.tasks.append(task.name)

    def loss(self, batch: Batch) -> Tensor:
        """The answers' cross-entropy and the stabilisation of earlier tasks."""
        return self.answered(batch) + self.model.stabilisation_loss()

    def progress(self, done: int, steps: int) -> None:
        """Tell the layers how much of the task is done."""
        self.model.set_progress(done / steps)

    def logits(self, batch: Batch, task: str | None) -> Tensor:
        return self.call(batch)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def stored(self) -> dict[Part, int]:
        kept: dict[Part, int] = {"experts": sum(p.numel() for p in self.trained())}
        if self.stabilised:
            kept["memory"] = sum(b.numel() for n, b in self.model.named_buffers() if ".lora_memory." in n)
        return kept

    @torch.no_grad()
    def routing(self, task: str, samples: Encoded) -> Share | None:
        """Experts belong to no task: only the entropy is known."""
        with self.model.recording() as record:
            for _, batch in samples.batches(self.settings.batch, self.embedding):
                self.call(batch)
        return Share(float("nan"), record.entropy())


class PassReweighting(PassMoe):
    """Pathway-activation routing alone, without stabilisation."""

    name = "pass-rw"
    label = "PASs-MoE, reweighting alone"
    grid: ClassVar[Grid] = {}
    stabilised = False


class PassRandom(PassMoe):
    """The control: as much stabilisation, of ranks drawn at random."""

    name = "pass-random"
    label = "PASs-MoE, random importance"
    options: ClassVar[dict[str, Any]] = {"importance": "random"}


class PassEven(PassMoe):
    """The control: as much stabilisation, the same for every rank: squared distance from where the last task ended."""

    name = "pass-even"
    label = "PASs-MoE, even importance"
    options: ClassVar[dict[str, Any]] = {"importance": "even"}


class PassCode(PassMoe):
    """As the authors' released code does it: annealed temperature, running anchor, the most important ranks alone."""

    name = "pass-code"
    label = "PASs-MoE, as in the released code"
    preset = "reference_code"


class MoeSoftmax(PassMoe):
    """MoE-LoRA: a learned linear router over all experts, nothing stabilised."""

    name = "moe-softmax"
    label = "MoE-LoRA, softmax router"
    grid: ClassVar[Grid] = {}
    options: ClassVar[dict[str, Any]] = {"router": "softmax"}
    stabilised = False


class MoeTopk(MoeSoftmax):
    """MoE-LoRA with only the best experts of each token."""

    name = "moe-topk"
    label = "MoE-LoRA, top-k router"
    options: ClassVar[dict[str, Any]] = {"router": "topk"}
