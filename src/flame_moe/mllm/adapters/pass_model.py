"""A language model whose layers hold PASs-MoE: the stages of a stream of tasks, and the loss that protects old ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.pass_config import PassMoeConfig
from flame_moe.mllm.adapters.pass_layer import Mixture, PassLinear
from flame_moe.mllm.adapters.pass_memory import PathwayMemory
from flame_moe.mllm.adapters.tuner import ExpertTuner

_LOG = logging.getLogger(__name__)
_UNIFORM = 0.99
"""Share of the greatest entropy from which routing counts as uniform."""


class PassMoeModel(ExpertTuner):
    """The PEFT model of `PassMoeConfig`; what it offers is reached through the `PeftModel` around it.

    Example:
        >>> model = get_peft_model(base, PassMoeConfig(experts=6))  # doctest: +SKIP
        >>> for task in tasks:  # doctest: +SKIP
        ...     model.start_task()
        ...     for batch in task:
        ...         loss = model(**batch).loss + model.stabilisation_loss()
        ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     model.finish_task()
    """

    layer_cls = PassLinear
    config_cls = PassMoeConfig

    @property
    def finished_tasks(self) -> int:
        """How many tasks the active adapter has finished."""
        return int(self._parts()[0][3].tasks)

    def start_task(self) -> None:
        """Begin a task: statistics of a task that was not finished are forgotten, and progress is unknown."""
        for _, _, mixture, memory in self._parts():
            memory.start_task()
            mixture.progress = None

    def set_progress(self, share: float) -> None:
        """Say how much of the task is done, where temperature or stabilisation change over it; call it every step.

        Args:
            share: between 0 at the start of the task and 1 at its end.

        Raises:
            AdapterError: if it is none.
        """
        if not 0 <= share <= 1:
            raise AdapterError(f"progress is {share!r}", where="set_progress", mend="Give a number from 0 to 1.")
        for _, _, mixture, _ in self._parts():
            mixture.progress = float(share)

    def finish_task(self) -> float:
        """End a task: its importances are added to those of earlier ones, and the experts are held where they are.

        Statistics of all processes are put together where torch.distributed runs.

        Returns:
            The mean entropy of the routing over the task, as a share of the greatest; 1 is uniform.

        Raises:
            AdapterError: if no token was seen in training mode since the task began.
        """
        parts = self._parts()
        _gather([memory for *_, memory in parts])
        unseen = next((name for name, *_, memory in parts if not int(memory.tokens)), None)
        if unseen is not None:
            mend = "Train between start_task and finish_task, with model.train() and calls of the whole model."
            raise AdapterError("the task has no statistics: no token was seen in training", where=unseen, mend=mend)
        found = self.routing_entropy()
        _LOG.info("task %d: entropy of the routing %.3f of the greatest", self.finished_tasks + 1, found)
        if found > _UNIFORM:
            _LOG.warning(
                "the routing stayed uniform (entropy %.4f of the greatest): the experts are one LoRA in effect. "
                "Their scores hardly differ; lower the temperature, start A larger, or train longer.",
                found,
            )
        for _, layer, _, memory in parts:
            name = self._active()
            memory.finish_task(layer.lora_A[name].weight, layer.lora_B[name].weight)
        return found

    def routing_entropy(self) -> float:
        """Mean entropy of the routing in the running task, over layers, as a share of the greatest; nan before any."""
        parts = self._parts()
        greatest = math.log(parts[0][2].config.experts)
        seen = [float(memory.entropy) for *_, memory in parts if int(memory.tokens)]
        return sum(seen) / len(seen) / greatest if seen and greatest else float("nan")

    def stabilisation_loss(self) -> Tensor:
        """What is to be added to the loss of a task so that earlier ones are kept; exactly 0 in the first task.

            L = ramp (lambda_A sum w ||a - a_ref||^2 + lambda_B sum w ||b - b_ref||^2) / N

        over all layers, N the number of ranks of all experts in the model, plus the orthogonality term if it is on.

        Returns:
            Scalar in float32.

        Raises:
            AdapterError: if the loss or the temperature depends on the progress of the task, which nobody told.
        """
        parts = self._parts()
        config = parts[0][2].config
        told = parts[0][2].progress
        if told is None and (config.ramp or config.temperature_start is not None):
            mend = "Call set_progress(step / steps) before every step."
            raise AdapterError("the progress of the task is not known", where="stabilisation_loss", mend=mend)
        device = parts[0][3].importance.device
        total = torch.zeros((), device=device)
        later = self.finished_tasks > 0
        name, ranks = self._active(), sum(memory.importance.numel() for *_, memory in parts)
        ramp = min(1.0, told / config.ramp) if config.ramp and told is not None else 1.0
        for where, layer, _, memory in parts:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if later:
                total = total + ramp / ranks * memory.loss(a, b, where)
            if config.orthogonality:
                total = total + config.orthogonality / len(parts) * _orthogonality(a, b, memory.shape, config)
        return total

    def _active(self) -> str:
        active = self.active_adapters
        if len(active) != 1:
            raise AdapterError(f"{len(active)} adapters are active", mend="Activate one with set_adapter.")
        return active[0]

    def _parts(self) -> list[tuple[str, Any, Mixture, PathwayMemory]]:
        name = self._active()
        return [
            (where, layer, layer.lora_variant[name], layer.lora_memory[name])
            for where, layer in self.layers()
            if name in layer.lora_memory
        ]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that DistributedDataParallel must not overwrite with those of the first process."""
        return list(self._memory_names("base_model."))

    def _memory_names(self, prefix: str) -> Iterator[str]:
        for name, _ in self.named_buffers():
            if ".lora_memory." in name:
                yield prefix + name

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        return PassMoeModel._new_layer(lora_config, adapter_name, target, **kwargs)


def _orthogonality(a: Tensor, b: Tensor, shape: tuple[int, int], config: PassMoeConfig) -> Tensor:
    """lambda_A mean((A^ A^^T - I)^2) + lambda_B mean(B^2), A^ with rows of length 1, the mean over experts."""
    rows = nn.functional.normalize(a.float().view(*shape, -1), dim=-1)
    off = rows @ rows.mT - torch.eye(shape[1], device=a.device)
    return config.lambda_a * off.square().mean() + config.lambda_b * b.float().square().mean()


def _gather(memories: list[PathwayMemory]) -> None:
    """Means over the tokens of all processes, where there are several."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for memory in memories:
        count = memory.tokens.clone()
        torch.distributed.all_reduce(count)
        share = memory.tokens.float() / count.clamp_min(1).float()
        for mean in (memory.current, memory.entropy):
            mean.mul_(share)
            torch.distributed.all_reduce(mean)
        memory.tokens.copy_(count)
