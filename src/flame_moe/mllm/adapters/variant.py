"""A LoRA variant of PEFT whose low-rank sum differs from token to token, so it has no weight to be merged into."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from flame_moe.errors import AdapterError


class TokenDependent(LoraVariant):
    """Refuses to be merged, with the reason; subclasses say what a forward does."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Raise AdapterError."""
        raise not_mergeable(active_adapter)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Raise AdapterError."""
        raise not_mergeable(active_adapter)

    def supports_lora_conversion(self) -> bool:
        """No: no plain LoRA does the same."""
        return False


def not_mergeable(name: str) -> AdapterError:
    """Why what depends on the token cannot be added to a weight."""
    what = f"'{name}' cannot be merged into the base: its experts are weighted anew for every token"
    return AdapterError(what, where=name, mend="Merge the plain LoRA of one expert, or serve the adapter as it is.")
