"""The tiny multimodal model, LLaVA's architecture (Liu et al., arXiv 2304.08485): CLIP-style tower, projector, Llama.

Nothing is pre-trained elsewhere. The tower learns to name what a picture shows (its colours, forms, digits, bars and
letters, slot by slot), then it is frozen; projector and language model learn the foundation set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from flame_moe.description import Description
from flame_moe.foreign import library
from flame_moe.mllm.stream.encode import Batch, Encoded, encode, shuffled, together
from flame_moe.mllm.stream.fitting import Steps
from flame_moe.mllm.stream.generated import ALPHABET, COLORS, NUMBERS
from flame_moe.mllm.stream.pictures import SHAPES
from flame_moe.mllm.stream.samples import Item, Pixels, Samples
from flame_moe.mllm.stream.score import answer_loss, ask
from flame_moe.mllm.stream.words import BEGIN, END, IMAGE, NUMBER_OF, PAD, WORDS, Reader
from flame_moe.schema import Name

Say = Callable[[str, float], None]
"""Told what is being done and what share of it is done."""
Positive = Annotated[int, Field(ge=1)]
SHOWN = ("", *COLORS, *SHAPES, *NUMBERS, *ALPHABET)
"""What a slot of a scene can show; the first is nothing."""
SLOTS = {"shapes": 2, "digits": 1, "chart": 8, "ocr": 3}
"""Task -> how many things a picture of it shows at most."""


class TinyConfig(Description):
    """Sizes of the model and of its training; everything that decides its weights.

    Attributes:
        image, patch: size of pictures and of their patches, in pixels.
        tower_width, tower_layers: of the vision tower.
        width, layers, heads, hidden: of the language model.
        tasks: whose skills are the foundation.
        samples: of the foundation set.
        tower_steps, base_steps, batch, lr: of both trainings.
        seed: of weights and order.
    """

    image: Positive = 32
    patch: Positive = 8
    tower_width: Positive = 96
    tower_layers: Positive = 3
    width: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    hidden: Positive = 256
    tasks: tuple[Name, ...] = ("shapes", "digits", "chart", "ocr", "math")
    samples: Positive = 40_000
    tower_steps: Positive = 2500
    base_steps: Positive = 3000
    batch: Positive = 64
    lr: Annotated[float, Field(gt=0)] = 1e-3
    seed: int = 0


def tower_config(config: TinyConfig) -> Any:
    """Of the vision tower, for transformers."""
    return library().CLIPVisionConfig(
        hidden_size=config.tower_width,
        intermediate_size=2 * config.tower_width,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=4,
        image_size=config.image,
        patch_size=config.patch,
    )


def joined_config(tower: Any, language: Any, image: int, sizes: TinyConfig) -> Any:
    """A LlavaConfig of tower and language model, with `image` for the token that pictures stand for."""
    return library().LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_id=image,
        image_seq_length=(sizes.image // sizes.patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build(config: TinyConfig) -> Any:
    """The model with random weights: a LlavaForConditionalGeneration."""
    transformers = library()
    torch.manual_seed(config.seed)
    language = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=NUMBER_OF[PAD],
        bos_token_id=NUMBER_OF[BEGIN],
        eos_token_id=NUMBER_OF[END],
    )
    whole = joined_config(tower_config(config), language, NUMBER_OF[IMAGE], config)
    return transformers.LlavaForConditionalGeneration(whole)


def pixel_values(pictures: Pixels) -> Tensor:
    """(n, H, W, 3) uint8 as the tower reads them: (n, 3, H, W), -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def tower_features(model: Any, pictures: Pixels) -> Tensor:
    """(n, patches, tower width): the last layer of the tower without its class token."""
    seen = model.model.vision_tower(pixel_values(pictures), output_hidden_states=True)
    return seen.hidden_states[-1][:, 1:]


@torch.no_grad()
def picture_features(model: Any, pictures: Pixels, size: int = 256) -> Tensor:
    """(n, patches, width) float16, projected: what the language model is given for each picture."""
    parts = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    return torch.cat([model.model.multi_modal_projector(tower_features(model, part)).half() for part in parts])


def slots(task: str, item: Item) -> list[int]:
    """What a picture shows, in the order of its scene: places in `SHOWN`."""
    shown = [SHOWN.index(word) for word in item.scene.split() if word in SHOWN[1:]]
    return [*shown, *[0] * (SLOTS[task] - len(shown))]


def train_tower(model: Any, skills: Mapping[str, Samples], config: TinyConfig, say: Say) -> float:
    """Teach the tower to name what pictures show; returns the share of slots that it names on its last hundred
    batches. The readout is thrown away."""
    torch.manual_seed(config.seed + 1)
    shown = {task: samples for task, samples in skills.items() if samples.pictures is not None}
    first = dict(zip(shown, np.cumsum([0, *(SLOTS[task] for task in shown)]).tolist(), strict=False))
    total = sum(SLOTS[task] for task in shown)
    labels = torch.full((sum(len(s) for s in shown.values()), total), -1)
    row = 0
    for task, samples in shown.items():
        for item in samples.items:
            labels[row, first[task] : first[task] + SLOTS[task]] = torch.tensor(slots(task, item))
            row += 1
    pictures = np.concatenate([s.pictures for s in shown.values() if s.pictures is not None])
    patches = (config.image // config.patch) ** 2
    readout = nn.Linear(patches * config.tower_width, total * len(SHOWN))
    tower = model.model.vision_tower
    step = Steps([*tower.parameters(), *readout.parameters()], config.lr, config.tower_steps, "vision tower")
    rng = np.random.default_rng(config.seed + 1)
    right: list[float] = []
    for which in shuffled(len(pictures), config.batch, config.tower_steps, rng):
        logits = readout(tower_features(model, pictures[which.numpy()]).flatten(1)).view(len(which), total, -1)
        here = labels[which] >= 0
        wanted = labels[which][here]
        loss = nn.functional.cross_entropy(logits[here], wanted)
        right.append(float((logits[here].argmax(-1) == wanted).float().mean()))
        step(loss)
        say("vision tower", step.share)
    return float(np.mean(right[-100:]))


class Training(Protocol):
    """How projector and language model are trained."""

    @property
    def base_steps(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def seed(self) -> int: ...


def train_language(
    model: Any,
    skills: Mapping[str, Samples],
    reader: Reader,
    learns: Sequence[nn.Parameter],
    config: Training,
    say: Say,
) -> None:
    """Teach some parameters of projector and language model the foundation set."""
    torch.manual_seed(config.seed + 2)
    with torch.no_grad():
        features = {
            task: torch.cat([tower_features(model, part) for part in np.array_split(s.pictures, len(s) // 256 + 1)])
            for task, s in skills.items()
            if s.pictures is not None
        }
    data = together([encode(samples.items, reader, features.get(task)) for task, samples in skills.items()])
    projector, embedding = model.model.multi_modal_projector, model.get_input_embeddings()
    step = Steps(learns, config.lr, config.base_steps, "language model")
    rng = np.random.default_rng(config.seed + 2)
    for which in shuffled(len(data), config.batch, config.base_steps, rng):
        asked = _batch(data, which, embedding, projector).answers
        step(answer_loss(ask(model, asked), asked.labels))
        say("language model", step.share)


def foundation_data(model: Any, skills: Mapping[str, Samples], reader: Reader) -> Encoded:
    """A foundation set as the language model reads it."""
    features = {t: None if s.pictures is None else picture_features(model, s.pictures) for t, s in skills.items()}
    return together([encode(samples.items, reader, features[task]) for task, samples in skills.items()])


def _batch(data: Encoded, which: Tensor, embedding: nn.Module, projector: nn.Module) -> Batch:
    """Some samples, words and projected features with gradients."""
    ids, pictures, mask, labels, prompt = data.tokens(which)
    embeds = embedding(ids.masked_fill(pictures, 0))
    if bool(pictures.any()):
        embeds = embeds.masked_scatter(pictures.unsqueeze(-1), projector(data.shown(which)))
    return Batch(embeds, mask, labels, prompt)
