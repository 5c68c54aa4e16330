"""Experts of a pool as folders of PEFT: each a plain LoRA that stock PEFT loads, its routing vector beside it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from flame_moe.errors import AdapterError, CheckpointError
from flame_moe.mllm.adapters.routed_config import RoutedLoraConfig
from flame_moe.mllm.adapters.routed_layer import NULL

if TYPE_CHECKING:
    from flame_moe.mllm.adapters.routed_model import RoutedLoraModel


def read(folder: str, task: str, **hub: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights of a plain LoRA.

    Raises:
        CheckpointError: if there is none.
        AdapterError: if it is another kind of adapter.
    """
    where = f"{folder}/{hub['subfolder']}" if hub.get("subfolder") else str(folder)
    try:
        config = PeftConfig.from_pretrained(folder, **hub)
        if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
            mend = "Only plain LoRA can be an expert; give the folder of one expert, not of a whole pool."
            raise AdapterError(f"expert '{task}' is no plain LoRA but {config.peft_type}", where=where, mend=mend)
        return config, load_peft_weights(folder, device="cpu", **hub)
    except AdapterError:
        raise
    # What PEFT, the hub and safetensors raise on a missing or broken folder is of no fixed type.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        mend = "Give the folder that save_pretrained wrote for this expert."
        raise CheckpointError(f"expert '{task}' cannot be read: {said}", where=where, mend=mend) from None


def check_name(config: LoraConfig, model: Any, folder: str) -> None:
    """Refuse an expert that names another base than this model's.

    Raises:
        AdapterError: if both have a name, and the last parts of the names differ.
    """
    names = [str(name) for name in (config.base_model_name_or_path, getattr(model, "name_or_path", None)) if name]
    if len(names) == 2 and Path(names[0]).name != Path(names[1]).name:
        what = f"the adapter was trained on '{names[0]}', this model is '{names[1]}'"
        raise AdapterError(
            what, where=str(folder), mend="Load that base, or pass check_base=False if they are the same."
        )


def check_task_name(model: nn.Module, task: str, taken: Collection[str]) -> None:
    """Refuse names that PEFT could not tell from parts of the model when it saves.

    Raises:
        AdapterError: saying which names can be given.
    """
    mend = "Give a short word of letters, digits, - and _ that is no part of the name of a layer."
    if task in taken:
        raise AdapterError(f"there is already an expert or adapter '{task}'", where="task", mend="Give another name.")
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    clash = hasattr(nn.ModuleDict(), task) or hasattr(nn.ParameterDict(), task) or task in parts or task in "lora_"
    if not task or "." in task or "/" in task or task == NULL or clash:
        raise AdapterError(f"'{task}' cannot be the name of an expert", where="task", mend=mend)


def put(model: nn.Module, task: str, weights: dict[str, Tensor], where: str) -> None:
    """Put weights into the layers of an expert that has just been added.

    Raises:
        AdapterError: if they are for other layers or shapes: the adapter belongs to another base.
    """
    mend = "Load the base that the adapter was trained on."
    try:
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=task)
    except RuntimeError as error:
        said = str(error).splitlines()
        what = f"expert '{task}' has other shapes than this base: {said[min(1, len(said) - 1)].strip()[:200]}"
        raise AdapterError(what, where=str(where), mend=mend) from None
    missing = [key for key in result.missing_keys if f".{task}" in key and not _ours(key)]
    if result.unexpected_keys or missing:
        key, place = (
            (result.unexpected_keys or missing)[0],
            "that this base lacks" if result.unexpected_keys else "less",
        )
        what = f"expert '{task}' has weights {place}: {key}"
        raise AdapterError(what, where=str(where), mend=mend)


def _ours(key: str) -> bool:
    """Whether a weight is none that a plain LoRA has."""
    return "lora_gate" in key or "lora_offset" in key


def load_all(tuner: RoutedLoraModel | None, config: RoutedLoraConfig) -> None:
    """Load every expert that a saved pool names; they lie in folders of their names beside the router's files.

    Raises:
        AdapterError: if the loading function is none that can load a pool.
        CheckpointError: if an expert is missing.
    """
    if tuner is None or config.source is None:
        mend = "Use PeftModel.from_pretrained(base, folder), or a config of RoutedLoraConfig.from_pretrained(folder)."
        raise AdapterError("the experts of the pool cannot be found this way", mend=mend)
    folder, hub = config.source
    awaited, config.awaited = config.awaited, []
    beside = Path(folder)
    if beside.is_dir() and awaited and not (beside / awaited[0]).is_dir():
        beside = beside.parent
    for task in awaited:
        if Path(folder).is_dir():
            tuner.load_expert(str(beside / task), task, check_base=False)
        else:
            tuner.load_expert(folder, task, check_base=False, subfolder=task, **hub)
