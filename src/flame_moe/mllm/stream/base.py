"""The trained tiny model, kept: made once per configuration, whole or not there, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flame_moe.environment import environment
from flame_moe.errors import CheckpointError, NonFiniteError
from flame_moe.files import write_bytes
from flame_moe.locking import writing
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.llava import (
    Say,
    TinyConfig,
    build,
    foundation_data,
    picture_features,
    train_language,
    train_tower,
)
from flame_moe.mllm.stream.samples import Pixels
from flame_moe.mllm.stream.score import exact
from flame_moe.mllm.stream.words import WORDS
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint

_KIND, _VERSION = "flame-moe-tiny-llava", 1
_VALIDATION = 1000


def default_cache() -> Path:
    """Where models are kept unless the user says otherwise: $XDG_CACHE_HOME/flame-moe, or ~/.cache/flame-moe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flame-moe"


@dataclass(frozen=True)
class Base:
    """The trained model in a cache.

    Attributes:
        config: that made it.
        folder: where it is.
    """

    config: TinyConfig
    folder: Path

    @classmethod
    def of(cls, config: TinyConfig, cache: Path, say: Say) -> Base:
        """The model of a configuration, trained now if the cache does not hold it (minutes, once).

        Raises:
            BusyError: if another process is training it at this moment.
        """
        text = json.dumps([_VERSION, config.plain(), WORDS], sort_keys=True)
        base = cls(config, cache / f"tiny-llava-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
        if not base.folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with writing(base.folder, "training the base model"):
                base._make(say)
        return base

    def model(self) -> Any:
        """A fresh copy, frozen and in evaluation mode.

        Raises:
            CheckpointError: if what is kept is damaged.
        """
        tensors, _ = self._load()
        model = build(self.config)
        model.load_state_dict(tensors, strict=False)
        model.tie_weights()
        if gone := [name for name, _ in model.named_parameters() if name not in tensors]:
            raise CheckpointError(
                f"the tensor '{gone[0]}' is missing", where=str(self.folder), mend="Remove the folder."
            )
        return model.requires_grad_(False).eval()

    def manifest(self) -> dict[str, Any]:
        """What is known of it: configuration, accuracies, seconds, machine."""
        return self._load()[1]

    def features(self, model: Any, name: str, pictures: Pixels) -> Tensor:
        """(n, patches, width) of the pictures of a split, from the cache where they were computed before.

        Args:
            model: of `model`.
            name: of the file, for people; the pictures themselves decide whether it fits.
            pictures: (n, H, W, 3).
        """
        digest = hashlib.sha256(pictures.tobytes()).hexdigest()[:12]
        file = self.folder.with_name(f"{self.folder.name}-features") / f"{name}-{digest}.safetensors"
        if file.is_file():
            try:
                return safetensors.torch.load_file(file)["features"].float()
            except (safetensors.SafetensorError, KeyError):
                mend = "Remove the file: it is made again."
                raise CheckpointError("the picture features are damaged", where=str(file), mend=mend) from None
        found = picture_features(model, pictures)
        write_bytes(file, safetensors.torch.save({"features": found}))
        return found.float()

    def _load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return load_checkpoint(self.folder, kind=_KIND, version=_VERSION)

    def _make(self, say: Say) -> None:
        config, start = self.config, time.perf_counter()
        skills = foundation("train", config.samples, config.image, config.tasks)
        model = build(config).train()
        seen = train_tower(model, skills, config, say)
        between = time.perf_counter()
        model.model.vision_tower.requires_grad_(False)
        train_language(model, skills, config, say)
        model.eval()
        held = foundation_data(model, foundation("val", _VALIDATION, config.image, config.tasks))
        right = exact(
            lambda b: model(inputs_embeds=b.embeds, attention_mask=b.mask).logits, held, model.get_input_embeddings()
        )
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise NonFiniteError("the weights of the base model are no numbers", mend="Lower the learning rate.")
        kinds = sorted({item.kind for item in held.items})
        of_kind = {k: [bool(r) for r, item in zip(right, held.items, strict=True) if item.kind == k] for k in kinds}
        manifest = {
            "config": config.plain(),
            "words": list(WORDS),
            "tower_slots_named": seen,
            "foundation_validation": float(right.float().mean()),
            "foundation_by_kind": {kind: sum(found) / len(found) for kind, found in of_kind.items()},
            "seconds": {"tower": between - start, "language": time.perf_counter() - between},
            "environment": environment().plain(),
        }
        save_checkpoint(self.folder, dict(model.named_parameters()), manifest, kind=_KIND, version=_VERSION)
