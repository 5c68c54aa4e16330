"""Tiny models with random weights, saved as the library for pre-trained models saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("chest", "pain", "fever", "cough", "no", "acute", "distress", "left", "arm", "of")


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    """A text model 16 wide that reads at most 32 tokens, with a vocabulary of ten words and the letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=32)
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder


def tiny_vit(folder: Path, seed: int = 0, **steps: Any) -> Path:
    """A vision transformer 12 wide that looks at 3 channels of 16 x 16 pixels, and how pictures are made ready."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ready = {
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        **steps,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(ready), encoding="utf-8")
    return folder


def tiny_resnet(folder: Path) -> Path:
    """A convolutional model whose last map is 8 channels wide; it takes any size and one channel."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ready = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(ready), encoding="utf-8")
    return folder
