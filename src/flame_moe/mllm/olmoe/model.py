"""A small OLMoE (Muennighoff et al., arXiv 2409.02060), its base training, and the stream of text that it learns."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn

from flame_moe.description import Description
from flame_moe.foreign import library
from flame_moe.locking import writing
from flame_moe.mllm.stream.encode import Encoded, encode, shuffled, together
from flame_moe.mllm.stream.fitting import Steps
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.generated import generate
from flame_moe.mllm.stream.llava import Say
from flame_moe.mllm.stream.samples import Item, Samples
from flame_moe.mllm.stream.score import answer_loss, ask, exact
from flame_moe.mllm.stream.words import BEGIN, END, NUMBER_OF, PAD, WORDS, WordReader
from flame_moe.schema import Name
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint

_SCENES = ["the", "picture", "shows", "a", "digit", "chart", "has", "bars", ",", "sign", "says"]
TEXT_WORDS = tuple(dict.fromkeys((*WORDS, *_SCENES)))
"""The vocabulary: that of the tiny multimodal model and the words of scenes."""
_KIND, _VERSION = "flame-moe-tiny-olmoe", 1
_PICTURE = 8
"""Size of the pictures whose scenes are read; they are thrown away."""
Positive = Annotated[int, Field(ge=1)]


class OlmoeSize(Description):
    """Sizes of the model, of its training and of the stream; everything that decides its weights.

    Attributes:
        width, layers, heads: of the transformer.
        experts, top_k, hidden: of each layer.
        tasks: of the stream, one stage each; the base learns the foundation of all of them.
        samples: of the foundation set.
        steps, batch, lr: of the base training.
        train, test: samples of each task.
        stage_steps, stage_lr: of each stage.
        seed: of the base model.
    """

    width: Positive = 96
    layers: Positive = 3
    heads: Positive = 4
    experts: Positive = 8
    top_k: Positive = 2
    hidden: Positive = 96
    tasks: tuple[Name, ...] = ("shapes", "digits", "chart", "ocr", "math")
    samples: Positive = 20_000
    steps: Positive = 1500
    batch: Positive = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    train: Positive = 4000
    test: Positive = 500
    stage_steps: Positive = 200
    stage_lr: Annotated[float, Field(gt=0)] = 1e-3
    seed: int = 0


SMALL = OlmoeSize(
    width=32, layers=2, experts=4, hidden=32, tasks=("shapes", "math"), samples=2000, steps=120, batch=32, lr=5e-3,
    train=400, test=60, stage_steps=30, stage_lr=5e-3,
)  # fmt: skip
"""What the tests run."""


class TextTask(NamedTuple):
    """A task of the stream."""

    name: str
    train: Encoded
    test: Encoded


def build(size: OlmoeSize) -> Any:
    """The model with random weights: an OlmoeForCausalLM."""
    transformers = library()
    torch.manual_seed(size.seed)
    config = transformers.OlmoeConfig(
        vocab_size=len(TEXT_WORDS),
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=NUMBER_OF[PAD],
        bos_token_id=NUMBER_OF[BEGIN],
        eos_token_id=NUMBER_OF[END],
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def task_data(name: str, size: OlmoeSize) -> TextTask:
    """A generated task with its scenes in words."""
    train, test = (generate(name, split, n, _PICTURE) for split, n in (("train", size.train), ("test", size.test)))
    return TextTask(name, _read(train), _read(test))


def foundation_text(split: str, count: int, size: OlmoeSize) -> Encoded:
    """The foundation with its scenes in words."""
    return together([_read(part) for part in foundation(split, count, _PICTURE, size.tasks).values()])


def base_model(size: OlmoeSize, cache: Path, say: Say) -> Any:
    """The base model, frozen, trained now if the cache does not hold it.

    Raises:
        BusyError: if another process is training it at this moment.
        CheckpointError: if what is kept is damaged.
    """
    own = {k: v for k, v in size.plain().items() if k not in ("train", "test", "stage_steps", "stage_lr")}
    text = json.dumps([_VERSION, own, TEXT_WORDS], sort_keys=True)
    folder = cache / f"tiny-olmoe-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with writing(folder, "training the base model"):
            model = build(size)
            _train(model, size, say)
            manifest = {"size": own, "foundation_validation": foundation_accuracy(model, size)}
            save_checkpoint(folder, dict(model.named_parameters()), manifest, kind=_KIND, version=_VERSION)
    tensors, _ = load_checkpoint(folder, kind=_KIND, version=_VERSION)
    model = build(size)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def accuracy(model: Any, data: Encoded) -> float:
    """Exact match."""
    model.eval()
    embedding: nn.Module = model.get_input_embeddings()
    right = exact(partial(ask, model), data, embedding)
    return float(right.float().mean())


def foundation_accuracy(model: Any, size: OlmoeSize, split: str = "val") -> float:
    """Exact match on the foundation."""
    return accuracy(model, foundation_text(split, size.test, size))


def _train(model: Any, size: OlmoeSize, say: Say) -> None:
    data = foundation_text("train", size.samples, size)
    step = Steps(list(model.parameters()), size.lr, size.steps, "base model")
    rng = np.random.default_rng(size.seed)
    model.train()
    for which in shuffled(len(data), size.batch, size.steps, rng):
        tokens = data.tokens(which)
        said = model(input_ids=tokens.ids, attention_mask=tokens.mask, output_router_logits=True)
        step(answer_loss(said.logits, tokens.labels) + 0.01 * said.aux_loss)
        say("base model", step.share)


def _read(samples: Samples) -> Encoded:
    items = [Item(i.kind, f"{i.scene} {i.question}".strip(), i.answer) for i in samples.items]
    return encode(items, WordReader(TEXT_WORDS), None)
