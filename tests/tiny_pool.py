"""A pool of routed experts with random weights on a tiny language model."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from flame_moe.mllm import RoutedLoraConfig
from tests.tiny_mllm import base

TASKS = ("charts", "shapes", "sums")


def filled(name: str = "llama", tasks: tuple[str, ...] = TASKS, **options: Any) -> Any:
    """A pool whose experts and routing vectors have random weights, routing."""
    model = get_peft_model(base(name), RoutedLoraConfig(r=4, **options))
    generator = torch.Generator().manual_seed(5)
    for task in tasks:
        model.add_expert(task)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.route()
    return model.eval()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def tensors(model: Any, task: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".{task}" in key}
