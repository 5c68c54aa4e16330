"""What models that see have in common: a folder in a cache, whole or not there, and beside it what they see."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from flame_moe.errors import CheckpointError, NonFiniteError
from flame_moe.files import write_bytes
from flame_moe.locking import writing
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.llava import Say, TinyConfig, foundation_data, picture_features
from flame_moe.mllm.stream.samples import Pixels
from flame_moe.mllm.stream.score import ask, exact
from flame_moe.mllm.stream.words import Reader
from flame_moe.training.checkpoint import load_checkpoint


@dataclass(frozen=True)
class Kept(ABC):
    """A model that was trained here, in a cache.

    Attributes:
        folder: where it is.
    """

    folder: Path
    kind: ClassVar[str]
    version: ClassVar[int] = 1
    validation: ClassVar[int] = 1000
    """Samples of the foundation that it is judged by."""

    @property
    @abstractmethod
    def tower(self) -> TinyConfig:
        """Of the vision tower."""

    @property
    def skills(self) -> tuple[str, ...]:
        """Tasks whose skills are the foundation."""
        return self.tower.tasks

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """How it is asked."""

    @abstractmethod
    def model(self) -> Any:
        """A fresh copy, frozen and in evaluation mode.

        Raises:
            CheckpointError: if what is kept is damaged.
        """

    def ensure(self, make: Callable[[Say], None], what: str, say: Say) -> None:
        """Make it if the cache lacks it.

        Raises:
            BusyError: if another process is making it at this moment.
        """
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.folder, what):
                make(say)

    def manifest(self) -> dict[str, Any]:
        """What is known of it: configuration, accuracies, seconds, machine."""
        return self.load()[1]

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and manifest.

        Raises:
            CheckpointError: if what is kept is damaged.
        """
        return load_checkpoint(self.folder, kind=self.kind, version=self.version)

    def fill(self, model: Any, part: Any) -> None:
        """Put what is kept into `part` of a model.

        Raises:
            CheckpointError: if a tensor of it is missing.
        """
        tensors, _ = self.load()
        part.load_state_dict(tensors, strict=False)
        model.tie_weights()
        if gone := [name for name, _ in part.named_parameters() if name not in tensors]:
            raise CheckpointError(
                f"the tensor '{gone[0]}' is missing", where=str(self.folder), mend="Remove the folder."
            )

    def judged(self, model: Any, say: Say) -> dict[str, Any]:
        """Exact match on validation samples of the foundation, in all and of each kind.

        Raises:
            NonFiniteError: if the weights are no numbers.
        """
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise NonFiniteError("the weights of the base model are no numbers", mend="Lower the learning rate.")
        say("validation of the base model", 0.0)
        skills = foundation("val", self.validation, self.tower.image, self.skills)
        held = foundation_data(model, skills, self.reader)
        right = exact(partial(ask, model), held, model.get_input_embeddings())
        kinds = sorted({item.kind for item in held.items})
        of_kind = {k: [bool(r) for r, item in zip(right, held.items, strict=True) if item.kind == k] for k in kinds}
        return {
            "foundation_validation": float(right.float().mean()),
            "foundation_by_kind": {kind: sum(found) / len(found) for kind, found in of_kind.items()},
        }

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

    def about(self) -> Mapping[str, Any]:
        """The manifest, but for what only loading needs."""
        return {key: value for key, value in self.manifest().items() if key not in ("words", "tensors")}
