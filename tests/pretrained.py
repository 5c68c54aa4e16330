"""Tiny models with random weights, saved as the library for pre-trained models saves them."""

from __future__ import annotations

from pathlib import Path

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
