"""Tiny language models, alone and behind a vision tower, with random weights that are always the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, IMAGE, PAD = 64, 60, 0
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, image_size=16),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def internvl() -> Any:
    config = transformers.InternVLConfig(
        vision_config={**_VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        vision_config={**_VISION, "image_size": 16},
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def qwen() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llava": llava,
    "internvl": internvl,
    "idefics3": idefics3,
    "qwen2_5_vl": qwen,
}
_IMAGE_TOKENS = {"llama": 0, "llava": 4, "internvl": 1, "idefics3": 1, "qwen2_5_vl": 1}


def base(name: str, seed: int = 0) -> Any:
    """A model with random weights that depend on name and seed alone, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def prompts(name: str, lengths: tuple[int, ...] = (5, 8), *, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """A batch of prompts of several lengths, padded, with their image where the model reads one."""
    generator = torch.Generator().manual_seed(seed)
    images = _IMAGE_TOKENS[name]
    longest = max(lengths) + images
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        text = torch.randint(3, 50, (length,), generator=generator)
        whole = torch.cat([text[:1], torch.full((images,), IMAGE), text[1:]])
        place = slice(longest - len(whole), None) if left else slice(0, len(whole))
        ids[row, place] = whole
        mask[row, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | pictures(name, len(lengths), generator) | kinds(name, ids)


def pictures(name: str, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One image per prompt, as the processor of the model would give it."""
    if name == "llama":
        return {}
    if name == "idefics3":
        return {"pixel_values": torch.randn(count, 1, 3, 16, 16, generator=generator)}
    if name == "qwen2_5_vl":
        grid = torch.tensor([[1, 2, 2]] * count)
        return {"pixel_values": torch.randn(4 * count, 3 * 2 * 64, generator=generator), "image_grid_thw": grid}
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


def kinds(name: str, ids: Tensor) -> dict[str, Tensor]:
    """What Qwen2.5-VL also wants to know of every token."""
    return {"mm_token_type_ids": (ids == IMAGE).long()} if name == "qwen2_5_vl" else {}
