"""The trained tiny model, kept: made once per configuration, whole or not there, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flame_moe.environment import environment
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.kept import Kept
from flame_moe.mllm.stream.llava import Say, TinyConfig, build, train_language, train_tower
from flame_moe.mllm.stream.words import WORDS, WordReader
from flame_moe.training.checkpoint import save_checkpoint


def default_cache() -> Path:
    """Where models are kept unless the user says otherwise: $XDG_CACHE_HOME/flame-moe, or ~/.cache/flame-moe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flame-moe"


@dataclass(frozen=True)
class Base(Kept):
    """The trained model in a cache.

    Attributes:
        config: that made it.
    """

    config: TinyConfig
    kind: ClassVar[str] = "flame-moe-tiny-llava"

    @classmethod
    def of(cls, config: TinyConfig, cache: Path, say: Say) -> Base:
        """The model of a configuration, trained now if the cache does not hold it (minutes, once).

        Raises:
            BusyError: if another process is training it at this moment.
        """
        text = json.dumps([cls.version, config.plain(), WORDS], sort_keys=True)
        base = cls(cache / f"tiny-llava-{hashlib.sha256(text.encode()).hexdigest()[:12]}", config)
        base.ensure(base._make, "training the base model", say)
        return base

    @property
    def tower(self) -> TinyConfig:
        return self.config

    @property
    def reader(self) -> WordReader:
        return WordReader()

    def model(self) -> Any:
        model = build(self.config)
        self.fill(model, model)
        return model.requires_grad_(False).eval()

    def _make(self, say: Say) -> None:
        config, start = self.config, time.perf_counter()
        skills = foundation("train", config.samples, config.image, self.skills)
        model = build(config).train()
        seen = train_tower(model, skills, config, say)
        between = time.perf_counter()
        model.model.vision_tower.requires_grad_(False)
        learns = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
        train_language(model, skills, self.reader, learns, config, say)
        spent = {"tower": between - start, "language": time.perf_counter() - between}
        manifest = {
            "config": config.plain(),
            "words": list(WORDS),
            "tower_slots_named": seen,
            **self.judged(model.eval(), say),
            "seconds": spent,
            "environment": environment().plain(),
        }
        save_checkpoint(self.folder, dict(model.named_parameters()), manifest, kind=self.kind, version=self.version)
