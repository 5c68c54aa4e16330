"""Which layers of a model are adapted: linear layers of its language model, and nothing else by accident."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flame_moe.errors import AdapterError

ALL_LINEAR = "all-linear"


def language_model(model: Any) -> str:
    """Name of the language model inside a model; "" where the whole model is one, or is none of transformers.

    Uses `get_decoder()` of transformers, which is `language_model` of Llava, InternVL and Qwen2.5-VL, `text_model` of
    Idefics3 and SmolVLM, and `model` of a causal language model.
    """
    if not hasattr(model, "get_decoder"):
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def resolve_targets(
    model: nn.Module,
    targets: str | Collection[str] | None,
    *,
    exclude: str | Collection[str] | None = None,
    language_only: bool = True,
) -> str | set[str]:
    """What PEFT is to match so that exactly the wanted linear layers are adapted.

    Args:
        model: the model before it is adapted, or with adapters in it.
        targets: None or "all-linear" for every linear layer of the language model but its head; a list of names, each
            of which a layer's name equals or ends with, looked for in the language model alone; or a regular
            expression for whole names.
        exclude: names or an expression of layers that are left out.
        language_only: whether a layer outside the language model is a mistake; if not, names are looked for
            everywhere.

    Returns:
        A regular expression where all layers of one name are wanted, else the full names.

    Raises:
        AdapterError: if a target matches nothing, no linear layer, or something outside the language model.
    """
    inside = language_model(model)
    layers = _layers(model)
    allowed = [name for name in layers if not language_only or name.startswith(f"{inside}." if inside else "")]
    if targets is None or (isinstance(targets, str) and targets == ALL_LINEAR):
        head = _head(model)
        found = {name for name in allowed if _is_linear(layers[name]) and name != head}
        wanted = ALL_LINEAR
    elif isinstance(targets, str):
        found, wanted = {name for name in layers if re.fullmatch(targets, name)}, targets
        outside = sorted(found - set(allowed))
        if outside:
            raise _outside(f"the expression '{targets}'", outside)
    else:
        found, wanted = set(), ", ".join(sorted(targets))
        for target in sorted(targets):
            hits = {name for name in layers if name == target or name.endswith(f".{target}")}
            found |= hits & set(allowed)
            if hits and not hits & set(allowed):
                raise _outside(f"'{target}'", sorted(hits))
            if not hits:
                raise _nothing(f"'{target}'", allowed, layers)
    left = {name for name in found if exclude is None or not _matches(exclude, name)}
    found, changed = left, left != found
    if not found:
        raise _nothing(f"'{wanted}'", allowed, layers)
    wrong = sorted(name for name in found if not _is_linear(layers[name]))
    if wrong:
        kind = type(_base(layers[wrong[0]])).__name__
        mend = "Only torch.nn.Linear and Conv1D with floating-point weights can be adapted; name such layers."
        raise AdapterError(f"the target '{wrong[0]}' is a {kind}", where="target_modules", mend=mend)
    kept = isinstance(targets, str) and targets != ALL_LINEAR and not changed
    return targets if kept and isinstance(targets, str) else _as_expression(found, layers, inside)


def fingerprint(model: nn.Module, targets: str | set[str]) -> str:
    """Sixteen hexadecimal digits that tell one base model from another, whatever the precision it is loaded in.

    Names, shapes and the first eight weights, in bfloat16, of every layer that is adapted.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(_layers(model).items()):
        if _matches(targets, name):
            weight = _base(layer).weight
            assert isinstance(weight, Tensor)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            if weight.device.type != "meta":
                start = weight.detach().reshape(weight.shape[0], -1)[0, :8].to("cpu", torch.bfloat16)
                digest.update(bytes(start.view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]


def matched(model: nn.Module, targets: str | Collection[str]) -> set[str]:
    """Names of the layers of a model that PEFT would adapt for these targets."""
    return {name for name in _layers(model) if _matches(targets, name)}


def check_base(model: nn.Module, targets: str | set[str], expected: str | None) -> str:
    """The fingerprint of the base, which is the expected one.

    Raises:
        AdapterError: if the adapter was trained on another base.
    """
    found = fingerprint(model, targets)
    if expected is not None and found != expected:
        what = f"the adapter was trained on another base model (its fingerprint is {expected}, this model's {found})"
        mend = (
            "Load the base it was trained on; to take this one after all, set base_fingerprint of its config to None."
        )
        raise AdapterError(what, where="base_fingerprint", mend=mend)
    return found


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is no part of an adapter, by its name without adapters."""
    found: dict[str, nn.Module] = {}
    inner: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inner):
            continue
        found[name] = module
        if isinstance(module, BaseTunerLayer):
            inner.append(f"{name}.")
    return found


def _base(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _is_linear(layer: nn.Module) -> bool:
    base = _base(layer)
    return isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point()


def _head(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else next((name for name, module in model.named_modules() if module is head), None)


def _matches(targets: str | Collection[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _as_expression(found: set[str], layers: dict[str, nn.Module], inside: str) -> str | set[str]:
    leaves = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in found}))
    start = rf"{re.escape(inside)}\." if inside else ""
    expression = rf"{start}(?:.*\.)?(?:{leaves})"
    return expression if {name for name in layers if re.fullmatch(expression, name)} == found else found


def _outside(what: str, names: list[str]) -> AdapterError:
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    mend = "Name layers of the language model, or set language_only=False if that is what you want."
    return AdapterError(f"{what} matches layers outside the language model: {shown}", where="target_modules", mend=mend)


def _nothing(what: str, allowed: list[str], layers: dict[str, nn.Module]) -> AdapterError:
    leaves = sorted({name.rpartition(".")[2] for name in allowed if _is_linear(layers[name])})
    mend = f"Linear layers of the language model are: {', '.join(leaves) if leaves else 'none'}."
    return AdapterError(f"{what} matches no layer", where="target_modules", mend=mend)
