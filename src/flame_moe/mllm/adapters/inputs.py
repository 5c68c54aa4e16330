"""Inputs that a language model would take in silence and answer with nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flame_moe.errors import AdapterError, DataError

_PICTURES = ("pixel_values", "pixel_values_videos", "image_hidden_states", "image_features")
CACHES = ("cache", "past_key_values")
_PICTURE_TOKENS = ("image_token_id", "image_token_index")


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Whether a tokenizer's ids mean to the model what they mean to the tokenizer.

    Args:
        model: of transformers, adapted or not.
        tokenizer: of transformers.

    Raises:
        AdapterError: if it has more ids than the model has embeddings, no padding token, or another id for the image
            or the end of text than the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    config = model.config
    if len(tokenizer) > rows:
        mend = "Take the tokenizer that came with the model, or call model.resize_token_embeddings."
        what = f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}"
        raise AdapterError(what, where="tokenizer", mend=mend)
    if tokenizer.pad_token_id is None:
        mend = "Set tokenizer.pad_token, for example to tokenizer.eos_token."
        raise AdapterError("the tokenizer has no padding token", where="tokenizer", mend=mend)
    image = getattr(tokenizer, "image_token", None)
    wanted = _image_token(config)
    if image is not None and wanted is not None and tokenizer.convert_tokens_to_ids(image) != wanted:
        found = tokenizer.convert_tokens_to_ids(image)
        what = f"the tokenizer's image token has id {found}, the model puts images where id {wanted} is"
        raise AdapterError(what, where="tokenizer", mend="Take the tokenizer that came with the model.")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ends = getattr(text, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None and ends and tokenizer.eos_token_id not in ends:
        what = f"the tokenizer ends a text with id {tokenizer.eos_token_id}, the model with {ends}"
        raise AdapterError(what, where="tokenizer", mend="Take the tokenizer that came with the model.")


def check_inputs(model: Any, given: Mapping[str, Any]) -> None:
    """Refuse ids that the model has no embedding for, and prompts with an image's place but no image.

    What follows a prompt in a cache is not looked at.

    Raises:
        AdapterError: if an id is outside the vocabulary.
        DataError: if the images are missing.
    """
    ids = given.get("input_ids")
    config = getattr(model, "config", None)
    if config is None or not isinstance(ids, Tensor) or not ids.numel() or torch.compiler.is_compiling():
        return
    if not hasattr(model, "get_input_embeddings") or filled_cache(given) is not None:
        return
    rows, top = model.get_input_embeddings().weight.shape[0], int(ids.max())
    if top >= rows or int(ids.min()) < 0:
        what = f"a prompt holds the id {top if top >= rows else int(ids.min())}, the model has embeddings for {rows}"
        raise AdapterError(what, where="input_ids", mend="The tokenizer does not fit the model: see check_tokenizer.")
    image = _image_token(config)
    if image is None or given.get("mm_encoder_outputs"):
        return
    if any(given.get(name) is not None for name in _PICTURES):
        return
    places = int((ids == image).sum())
    if places:
        what = f"the prompts have {places} places for image tokens (id {image}), but no images came with them"
        raise DataError(what, where="pixel_values", mend="Pass what the processor of the model gives, images included.")


def filled_cache(given: Mapping[str, Any]) -> Any:
    """The cache of keys and values among the arguments of a forward, if something is in it; else None.

    It is called `cache` since transformers 5.24 and `past_key_values` before.
    """
    cache: Any = next((given[name] for name in CACHES if given.get(name) is not None), None)
    return cache if hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0 else None


def _image_token(config: Any) -> int | None:
    return next((value for name in _PICTURE_TOKENS if (value := getattr(config, name, None)) is not None), None)
