"""Checkpoints: a folder with safetensors and a JSON manifest, written whole or not at all, loaded strictly.

Loading reads numbers and JSON; it never executes anything from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from flame_moe.errors import CheckpointError
from flame_moe.files import replacing_folder, sha256

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"


def save_checkpoint(
    folder: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], *, kind: str, version: int
) -> Path:
    """Write a checkpoint folder atomically, replacing an older one only when the new one is complete.

    Args:
        folder: where.
        tensors: name -> tensor, any device.
        manifest: JSON-ready description of what the tensors mean.
        kind: what sort of checkpoint this is; `load_checkpoint` insists on it.
        version: of the format.
    """
    folder = Path(folder)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_folder(folder) as work:
        safetensors.torch.save_file(ready, work / TENSORS)
        document = {
            "format": kind,
            "version": version,
            "tensors": {"file": TENSORS, "sha256": sha256(work / TENSORS), "count": len(ready)},
            **manifest,
        }
        (work / MANIFEST).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    return folder


def load_checkpoint(folder: str | Path, *, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder, checking kind, version and hash.

    Raises:
        CheckpointError: if it is missing, of another kind or version, truncated or damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, kind, version)
    file = folder / TENSORS
    if not file.is_file():
        raise CheckpointError("the tensors of the checkpoint are missing", where=str(file), mend="Restore the file.")
    if sha256(file) != manifest.get("tensors", {}).get("sha256"):
        raise CheckpointError(
            "the tensors do not match the manifest: the file is truncated or was changed",
            where=str(file),
            mend="Restore it from a backup.",
        )
    try:
        return safetensors.torch.load_file(file), manifest
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"the tensors cannot be read: {error}", where=str(file)) from None


def match(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Insist on the same names, shapes and dtypes.

    Raises:
        CheckpointError: naming the first tensor that is missing, extra or of another shape.
    """
    for name in expected:
        if name not in found:
            raise CheckpointError(f"the tensor '{name}' is missing", where=where)
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(f"the tensor '{name}' is not part of this model", where=where)
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            what = f"the tensor '{name}' is {_shape(tensor)}, the model needs {_shape(want)}"
            raise CheckpointError(what, where=where)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError("there is no checkpoint", where=str(folder), mend="Check the path.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError("the manifest is not valid JSON: the file is truncated", where=str(file)) from None
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise CheckpointError(f"this is not a {kind} checkpoint", where=str(file))
    if manifest.get("version") != version:
        what = f"the checkpoint has version {manifest.get('version')}, this program reads version {version}"
        raise CheckpointError(what, where=str(file))
    return manifest
