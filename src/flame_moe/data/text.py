"""Texts as vectors, a fixed function of the text: a modality of kind `timed`. Or as numbers of tokens, for a model that
is trained with the rest: a modality of kind `tokens`. Nothing is fitted either way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flame_moe.batch import Observation
from flame_moe.data.embedcache import cached_rows, digest, maker_name
from flame_moe.data.ngrams import ngram_vectors
from flame_moe.data.pretrained import (
    describe_model,
    load_model,
    load_tokenizer,
    model_config,
    model_files,
    model_folder,
)
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.foreign import build_model, explained, model_width
from flame_moe.schema import Modality

Floats = NDArray[np.float32]

NGRAMS = "ngrams"
BATCH = 16
_VERSION = 1
_LENGTHS = ("max_position_embeddings", "n_positions")


class TextOptions(Description):
    """How texts become vectors.

    Attributes:
        encoder: "ngrams", hashed words and runs of characters, which needs no model (`flame_moe.data.ngrams`); or the
            path of a local folder with a model in the layout of Hugging Face.
        width: of the vectors of "ngrams"; a model brings its own.
        chunk: tokens that a model reads at a time; a longer text is cut into overlapping pieces.
        overlap: tokens that two neighbouring pieces share.
        finetune: train the model with the rest, in the stage in which the texts first appear; the store then keeps the
            pieces as numbers of tokens. False keeps the model as it is, and the store its vectors.
    """

    encoder: Annotated[str, Field(min_length=1)] = NGRAMS
    width: Annotated[int, Field(ge=8)] = 256
    chunk: Annotated[int, Field(ge=8)] = 256
    overlap: Annotated[int, Field(ge=0)] = 32
    finetune: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 2 * self.overlap > self.chunk:
            raise ValueError(f"overlap {self.overlap} is more than half of chunk {self.chunk}")
        if self.finetune and self.encoder == NGRAMS:
            raise ValueError(f"'{NGRAMS}' has nothing to train: finetune needs an encoder that is a model")
        return self


class TextRows(NamedTuple):
    """What a store keeps of some texts.

    Attributes:
        values: (m, features) one vector per text, or the pieces of all texts, one after the other.
        owner: (m,) int64, ascending, which text each row is of.
    """

    values: NDArray[Any]
    owner: NDArray[np.int64]

    def each(self) -> Iterator[Observation]:
        """Every text on its own, at the origin."""
        for rows in np.split(self.values, np.flatnonzero(np.diff(self.owner)) + 1) if len(self.values) else ():
            yield Observation(rows, np.zeros(len(rows), dtype=np.float32))


def text_modality(name: str, options: TextOptions, description: str) -> Modality:
    """The modality that texts become: of kind tokens if their model is to be trained, else timed.

    Raises:
        DataError: if the encoder is no model.
        ExtraMissingError: if a model is to be trained and transformers is not installed.
    """
    if not options.finetune:
        return Modality(name=name, kind="timed", features=text_width(options), description=description)
    folder = model_folder(options.encoder)
    model = describe_model(folder)
    model_width(model.config, str(folder))
    build_model(model.config)
    return Modality(
        name=name, kind="tokens", features=options.chunk, pretrained=model, scaling="none", description=description
    )


def read_texts(texts: Sequence[str], options: TextOptions, cache: Path | None = None) -> TextRows:
    """What a store keeps of texts as `text_modality` describes it; arguments and errors as of `embed_texts`."""
    if not options.finetune:
        return TextRows(embed_texts(texts, options, cache), np.arange(len(texts), dtype=np.int64))
    _refuse_blank(texts)
    folder = model_folder(options.encoder)
    cutter = _Cutter(folder, options)
    with explained(folder):
        pieces = [cutter.cut(text) for text in texts]
    flat = [piece for cut in pieces for piece in cut]
    values = np.zeros((len(flat), options.chunk), dtype=np.int32)
    for row, piece in zip(values, flat, strict=True):
        row[: len(piece)] = np.array(piece) + 1
    return TextRows(values, np.repeat(np.arange(len(texts)), [len(cut) for cut in pieces]))


def text_width(options: TextOptions) -> int:
    """Length of the vectors; of a model only config.json is read.

    Raises:
        DataError: if the encoder is no model.
    """
    if options.encoder == NGRAMS:
        return options.width
    folder = model_folder(options.encoder, f"'{NGRAMS}'")
    return model_width(model_config(folder), str(folder))


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
    _refuse_blank(texts)
    if options.encoder == NGRAMS:
        return ngram_vectors(texts, options.width)
    folder = model_folder(options.encoder, f"'{NGRAMS}'")
    width = model_width(model_config(folder), str(folder))
    reader: list[_Reader] = []

    def make(wanted: Sequence[int]) -> Floats:
        if not reader:
            reader.append(_Reader(folder, options, width))
        return reader[0].read([texts[i] for i in wanted])

    settings = {"texts": _VERSION, "chunk": options.chunk, "overlap": options.overlap}
    place = None if cache is None else cache / maker_name(settings, model_files(folder))
    return cached_rows([digest(text.encode("utf-8", "surrogatepass")) for text in texts], make, width, place)


def _refuse_blank(texts: Sequence[str]) -> None:
    for i, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"text {i} of {len(texts)} is blank", mend="Leave it out: a blank note is no note.")


class _Cutter:
    """A tokenizer, and how it cuts texts into pieces."""

    def __init__(self, folder: Path, options: TextOptions) -> None:
        self.folder, self.options, self.tokenizer = folder, options, load_tokenizer(folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        config = model_config(folder)
        limits = (self.tokenizer.model_max_length, *(config.get(name) for name in _LENGTHS))
        longest = min(limit for limit in limits if limit)
        if options.chunk > longest:
            what = f"chunk {options.chunk} is more than the {longest} tokens that the model reads"
            raise DataError(what, where=str(folder), mend=f"Set chunk to {longest} or less.")

    def cut(self, text: str) -> list[list[int]]:
        """Overlapping pieces, each with the tokens that the model wants around it."""
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


class _Reader:
    """A model that is loaded once it is needed, and how it reads texts."""

    def __init__(self, folder: Path, options: TextOptions, width: int) -> None:
        self.folder, self.width = folder, width
        self.cutter, self.model = _Cutter(folder, options), load_model(folder)

    def read(self, texts: Sequence[str]) -> Floats:
        """(n, width): mean over tokens, then over pieces; pieces of like length are read together."""
        with explained(self.folder):
            pieces: list[list[int]] = []
            owner: list[int] = []
            for i, text in enumerate(texts):
                cut = self.cutter.cut(text)
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

    def _encode(self, pieces: Sequence[Sequence[int]]) -> Any:
        longest = max(len(piece) for piece in pieces)
        ids = torch.full((len(pieces), longest), self.cutter.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, piece in enumerate(pieces):
            ids[i, : len(piece)] = torch.tensor(piece)
            mask[i, : len(piece)] = 1
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            seen = mask[..., None].to(states.dtype)
            return (states * seen).sum(1) / seen.sum(1)
