"""Checkpoints: a folder with safetensors and a JSON manifest, written whole or not at all, loaded strictly.

Loading reads numbers and JSON; it never executes anything from the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flame_moe.errors import CheckpointError
from flame_moe.files import replacing_folder, sha256, whole

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
_RESTORE = "Restore the checkpoint from a backup."


def save_checkpoint(
    folder: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], *, kind: str, version: int
) -> Path:
    """Write a checkpoint folder atomically, replacing an older one only when the new one is complete.

    Args:
        folder: where.
        tensors: name -> tensor, any device.
        manifest: JSON-ready description of what the tensors mean; a number that is NaN or infinite becomes null.
        kind: what sort of checkpoint this is; `load_checkpoint` insists on it.
        version: of the format.

    Raises:
        CheckpointError: if the disk does not take the tensors; OSError if it does not take the rest.
    """
    folder = Path(folder)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_folder(folder) as work:
        try:
            safetensors.torch.save_file(ready, work / TENSORS)
        except safetensors.SafetensorError as error:
            mend = "Make room on the disk and try again; nothing was replaced."
            raise CheckpointError(f"the tensors cannot be written: {error}", where=str(folder), mend=mend) from None
        tensor_file = {"file": TENSORS, "sha256": sha256(work / TENSORS), "count": len(ready)}
        document = _plain({"format": kind, "version": version, "tensors": tensor_file, **manifest})
        document["digest"] = _digest(document)
        (work / MANIFEST).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    return folder


def load_checkpoint(folder: str | Path, *, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder, checking kind, version and the hashes of tensors and manifest.

    Raises:
        CheckpointError: if it is missing, of another kind or version, truncated or damaged.
    """
    folder = whole(folder)
    manifest = _read_manifest(folder, kind, version)
    file = folder / TENSORS
    if not file.is_file():
        raise CheckpointError("the tensors of the checkpoint are missing", where=str(file), mend=_RESTORE)
    if sha256(file) != manifest["tensors"]["sha256"]:
        raise CheckpointError(
            "the tensors do not match the manifest: the file is truncated or was changed",
            where=str(file),
            mend=_RESTORE,
        )
    try:
        return safetensors.torch.load_file(file), manifest
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"the tensors cannot be read: {error}", where=str(file), mend=_RESTORE) from None


def digest_of(folder: str | Path) -> str:
    """The digest over everything that a checkpoint states, to be noted elsewhere; the checkpoint must be readable."""
    return str(json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["digest"])


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, in C order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """One sha256 over names and contents."""
    return _digest({name: hash_tensor(tensor) for name, tensor in tensors.items()})


def match(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Insist on the same names, shapes and dtypes.

    Raises:
        CheckpointError: naming the first tensor that is missing, extra or of another shape.
    """
    for name in expected:
        if name not in found:
            raise CheckpointError(f"the tensor '{name}' is missing", where=where, mend=_RESTORE)
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(f"the tensor '{name}' is not part of this model", where=where, mend=_RESTORE)
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            what = f"the tensor '{name}' is {_shape(tensor)}, the model needs {_shape(want)}"
            raise CheckpointError(what, where=where, mend=_RESTORE)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError("there is no checkpoint", where=str(folder), mend="Check the path.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        what = "the manifest is not valid JSON: the file is truncated or damaged"
        raise CheckpointError(what, where=str(file), mend=_RESTORE) from None
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise CheckpointError(f"this is not a {kind} checkpoint", where=str(file), mend="Check the path.")
    if manifest.get("version") != version:
        what = f"the checkpoint has version {manifest.get('version')}, this program reads version {version}"
        raise CheckpointError(what, where=str(file), mend="Use the version of the program that wrote it.")
    if manifest.pop("digest", None) != _digest(manifest):
        what = "the manifest was changed after it was written"
        raise CheckpointError(what, where=str(file), mend=_RESTORE)
    return manifest


def _digest(document: Mapping[str, Any]) -> str:
    """Hash of a manifest's content, so that a single changed digit is seen."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON, with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
