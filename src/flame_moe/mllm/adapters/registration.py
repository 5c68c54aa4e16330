"""Make the two adapters known to PEFT, so that its own loading functions rebuild the right classes."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.utils import register_peft_method

from flame_moe.mllm.adapters.pass_config import PASS_MOE, PassMoeConfig
from flame_moe.mllm.adapters.pass_model import PassMoeModel
from flame_moe.mllm.adapters.peft_types import peft_type
from flame_moe.mllm.adapters.routed_config import ROUTED_LORA, RoutedLoraConfig
from flame_moe.mllm.adapters.routed_model import RoutedLoraModel

_METHODS: tuple[tuple[str, Any, Any], ...] = (
    (ROUTED_LORA, RoutedLoraConfig, RoutedLoraModel),
    (PASS_MOE, PassMoeConfig, PassMoeModel),
)


def register() -> None:
    """Register both adapters with PEFT; doing it again changes nothing.

    Needed before `PeftModel.from_pretrained` where nothing else of `flame_moe.mllm` has been imported.

    Example:
        >>> from peft import PeftConfig
        >>> from flame_moe.mllm import register
        >>> register()
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known: dict[PeftType, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    for name, config, model in _METHODS:
        if peft_type(name) not in known:
            register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=model.prefix)
