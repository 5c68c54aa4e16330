"""Texts as vectors: a fixed function of the text, nothing fitted. Notes become a modality of kind `timed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flame_moe.data.embedcache import cached_rows, digest, maker_name
from flame_moe.data.ngrams import ngram_vectors
from flame_moe.data.pretrained import explained, load_model, load_tokenizer, model_files, model_folder, model_width
from flame_moe.errors import DataError
from flame_moe.schema import Description

Floats = NDArray[np.float32]

NGRAMS = "ngrams"
BATCH = 16
_VERSION = 1


class TextOptions(Description):
    """How texts become vectors.

    Attributes:
        encoder: "ngrams", hashed words and runs of characters, which needs no model (`flame_moe.data.ngrams`); or the
            path of a local folder with a model in the layout of Hugging Face.
        width: of the vectors of "ngrams"; a model brings its own.
        chunk: tokens that a model reads at a time; a longer text is cut into overlapping pieces.
        overlap: tokens that two neighbouring pieces share.
    """

    encoder: Annotated[str, Field(min_length=1)] = NGRAMS
    width: Annotated[int, Field(ge=8)] = 256
    chunk: Annotated[int, Field(ge=8)] = 256
    overlap: Annotated[int, Field(ge=0)] = 32

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 2 * self.overlap > self.chunk:
            raise ValueError(f"overlap {self.overlap} is more than half of chunk {self.chunk}")
        return self


def text_width(options: TextOptions) -> int:
    """Length of the vectors; of a model only config.json is read.

    Raises:
        DataError: if the encoder is no model.
    """
    return options.width if options.encoder == NGRAMS else model_width(model_folder(options.encoder, f"'{NGRAMS}'"))


def embed_texts(texts: Sequence[str], options: TextOptions, cache: Path | None = None) -> Floats:
    """One vector per text, the same in every run.

    "ngrams" gives vectors of length 1. A model's vector is the mean over the tokens of a piece, then over the pieces.

    Args:
        texts: n texts with at least one character that is not blank.
        options: which encoder.
        cache: folder in which a model's vectors are kept, by the hash of text, settings and model; None for nowhere.
            N-grams are computed faster than they are looked up and are not kept.

    Returns:
        (n, text_width(options)).

    Raises:
        DataError: for a blank text, or an encoder that is no model.
        ExtraMissingError: if a model is asked for and transformers is not installed.

    Example:
        >>> embed_texts(["No acute distress.", "Chest pain."], TextOptions(width=64)).shape
        (2, 64)
    """
    for i, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"text {i} of {len(texts)} is blank", mend="Leave it out: a blank note is no note.")
    if options.encoder == NGRAMS:
        return ngram_vectors(texts, options.width)
    folder = model_folder(options.encoder, f"'{NGRAMS}'")
    width = model_width(folder)
    reader: list[_Reader] = []

    def make(wanted: Sequence[int]) -> Floats:
        if not reader:
            reader.append(_Reader(folder, options, width))
        return reader[0].read([texts[i] for i in wanted])

    settings = {"texts": _VERSION, "chunk": options.chunk, "overlap": options.overlap}
    place = None if cache is None else cache / maker_name(settings, model_files(folder))
    return cached_rows([digest(text.encode("utf-8", "surrogatepass")) for text in texts], make, width, place)


class _Reader:
    """A model that is loaded once it is needed, and how it reads texts."""

    def __init__(self, folder: Path, options: TextOptions, width: int) -> None:
        self.folder, self.options, self.width = folder, options, width
        self.tokenizer, self.model = load_tokenizer(folder), load_model(folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None))
        longest = min(limit for limit in limits if limit)
        if options.chunk > longest:
            what = f"chunk {options.chunk} is more than the {longest} tokens that the model reads"
            raise DataError(what, where=str(folder), mend=f"Set chunk to {longest} or less.")

    def read(self, texts: Sequence[str]) -> Floats:
        """(n, width): mean over tokens, then over pieces; pieces of like length are read together."""
        with explained(self.folder):
            pieces: list[list[int]] = []
            owner: list[int] = []
            for i, text in enumerate(texts):
                cut = self._cut(text)
                pieces += cut
                owner += [i] * len(cut)
            vectors = torch.zeros(len(pieces), self.width, dtype=torch.float64)
            order = sorted(range(len(pieces)), key=lambda p: len(pieces[p]))
            for start in range(0, len(order), BATCH):
                at = order[start : start + BATCH]
                vectors[at] = self._encode([pieces[p] for p in at]).double()
            total = torch.zeros(len(texts), self.width, dtype=torch.float64)
            total.index_add_(0, torch.tensor(owner), vectors)
            counts = torch.bincount(torch.tensor(owner), minlength=len(texts))
        return (total / counts[:, None]).float().numpy()

    def _cut(self, text: str) -> list[list[int]]:
        cut = self.tokenizer(
            text,
            truncation=True,
            max_length=self.options.chunk,
            stride=self.options.overlap,
            return_overflowing_tokens=True,
        )
        pieces = [list(piece) for piece in cut["input_ids"] if len(piece)]
        if not pieces:
            what = f"the text '{text.strip()[:40]}' has no token"
            raise DataError(what, where=str(self.folder), mend="Leave it out, or use another encoder.")
        return pieces

    def _encode(self, pieces: Sequence[Sequence[int]]) -> Any:
        longest = max(len(piece) for piece in pieces)
        ids = torch.full((len(pieces), longest), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, piece in enumerate(pieces):
            ids[i, : len(piece)] = torch.tensor(piece)
            mask[i, : len(piece)] = 1
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            seen = mask[..., None].to(states.dtype)
            return (states * seen).sum(1) / seen.sum(1)
