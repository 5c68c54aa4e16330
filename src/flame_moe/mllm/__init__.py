"""Continual multimodal language models: two published methods as adapters of the package PEFT.

`RoutedLoraConfig` keeps one LoRA expert per task and routes among them; `PassMoeConfig` is a mixture of LoRA experts of
constant size that protects what it has learned. Both go to `peft.get_peft_model`, are trained with any loop, saved with
`save_pretrained` and found again by `PeftModel.from_pretrained` (call `register()` first where no other name of this
room has been used). Needs the extra `mllm`.

Example:
    >>> from peft import get_peft_model  # doctest: +SKIP
    >>> from flame_moe.mllm import RoutedLoraConfig  # doctest: +SKIP
    >>> model = get_peft_model(base, RoutedLoraConfig(top_k=2))  # doctest: +SKIP
    >>> model.add_expert("charts")  # doctest: +SKIP

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_moe.mllm.adapters.inputs import check_tokenizer
    from flame_moe.mllm.adapters.pass_config import PassMoeConfig
    from flame_moe.mllm.adapters.pass_model import PassMoeModel
    from flame_moe.mllm.adapters.record import RoutingRecord
    from flame_moe.mllm.adapters.registration import register
    from flame_moe.mllm.adapters.routed_config import RoutedLoraConfig
    from flame_moe.mllm.adapters.routed_model import RoutedLoraModel

__all__ = [
    "PassMoeConfig",
    "PassMoeModel",
    "RoutedLoraConfig",
    "RoutedLoraModel",
    "RoutingRecord",
    "check_tokenizer",
    "register",
]

_ROOMS = {
    "adapters.inputs": ("check_tokenizer",),
    "adapters.pass_config": ("PassMoeConfig",),
    "adapters.pass_model": ("PassMoeModel",),
    "adapters.record": ("RoutingRecord",),
    "adapters.registration": ("register",),
    "adapters.routed_config": ("RoutedLoraConfig",),
    "adapters.routed_model": ("RoutedLoraModel",),
}
_HOME = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
