"""What both adapters take over from PEFT's `LoraConfig`, and what of it they refuse."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig

from flame_moe.errors import AdapterError, nearest

_REFUSED = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "lora_bias",
    "ensure_weight_tying",
    "layers_to_transform",
    "layers_pattern",
)
_INITS = (True, False, "gaussian", "orthogonal")


def check_lora_fields(config: LoraConfig) -> None:
    """Refuse options of LoRA that change more than one low-rank sum, or the base.

    Raises:
        AdapterError: naming the first of them.
    """
    for name in _REFUSED:
        if getattr(config, name, None):
            mend = "Leave it out: experts are plain LoRA; single layers are named by a regular expression of targets."
            raise AdapterError(f"'{name}' cannot be used with experts", where=name, mend=mend)
    if config.bias != "none":
        raise AdapterError("biases belong to all experts at once", where="bias", mend="Set bias='none'.")
    if config.init_lora_weights not in _INITS:
        mend = f"Choose among {', '.join(map(str, _INITS))}."
        what = f"init_lora_weights={config.init_lora_weights!r} changes the base or needs data"
        raise AdapterError(what, where="init_lora_weights", mend=mend)
    positive("r", config.r)
    for name in ("target_modules", "exclude_modules"):
        _check_expression(name, getattr(config, name))


def _check_expression(name: str, value: Any) -> None:
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        mend = "Give a valid one, or a list of names."
        raise AdapterError(f"'{value}' is no regular expression: {error}", where=name, mend=mend) from None


def positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse a number that is not above zero.

    Raises:
        AdapterError: if it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or (value == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        raise AdapterError(f"{name} is {value!r}", where=name, mend=f"Give a number {bound}.")


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a word that is not among the known ones.

    Raises:
        AdapterError: naming the nearest.
    """
    known = tuple(known)
    if value not in known:
        raise AdapterError(f"unknown {name} '{value}'", where=name, mend=nearest(str(value), known))
