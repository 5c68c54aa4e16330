"""Models of the package transformers, built from their config alone: no file is read and no code but the package's run.

What lies in the folder of a model is the business of `flame_moe.data.pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame_moe.errors import DataError, ExtraMissingError
from flame_moe.extras import needed

_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd", "hidden_sizes", "embed_dim")
_FOREIGN = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "_name_or_path", "dtype")
"""Keys of a config that ask for code or weights from elsewhere, or for another type of numbers."""


def library() -> Any:
    """The package transformers.

    Raises:
        ExtraMissingError: if it is not installed.
    """
    return needed("transformers", "text", "a pre-trained model")


def model_width(config: Mapping[str, Any], where: str = "") -> int:
    """Length of the vectors that a model gives, from the content of its config.json.

    Raises:
        DataError: if it does not say.
    """
    for name in _WIDTHS:
        width = config.get(name)
        if isinstance(width, list) and width:
            width = width[-1]
        if isinstance(width, int) and width > 0:
            return width
    mend = f"An encoder of one kind of input is needed, whose config names one of {', '.join(_WIDTHS)}."
    raise DataError("config.json does not say how wide the model is", where=where, mend=mend)


def build_model(config: Mapping[str, Any]) -> Any:
    """A model of this config with random weights.

    Built by the library's own classes alone. Attention is the plain one, which all of them have.

    Raises:
        DataError: if the library knows no such model, or it is none that reads one kind of input.
        ExtraMissingError: if transformers is not installed.
    """
    transformers = library()
    plain = {key: value for key, value in config.items() if key not in (*_FOREIGN, "torch_dtype", "model_type")}
    kind = str(config.get("model_type", ""))
    with explained(None, f"the model of type '{kind}'"), quiet(transformers):
        parsed = transformers.AutoConfig.for_model(kind, **plain)
        if parsed.is_encoder_decoder:
            raise DataError(f"a model of type '{kind}' is an encoder with a decoder", mend="Use an encoder alone.")
        model = transformers.AutoModel.from_config(parsed, trust_remote_code=False, attn_implementation="eager")
    if model.main_input_name != "input_ids":
        raise DataError(f"a model of type '{kind}' reads no text", mend="Use an encoder of text.")
    return headless(model)


def headless(model: Any) -> Any:
    """The model in float32 and without its pooler, which nothing here reads."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.float()


@contextmanager
def explained(folder: Path | None, part: str = "the model") -> Iterator[None]:
    """Turn whatever the library says about a folder or an input into one sentence.

    Raises:
        DataError: with the first line of the library's message.
    """
    try:
        yield
    except (DataError, ExtraMissingError, KeyboardInterrupt, MemoryError):
        raise
    # What a broken or foreign model raises is of no fixed type: KeyError, ValueError, RuntimeError, SafetensorError ...
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        mend = "Check that the folder holds the whole model, and one that reads this kind of input alone."
        raise DataError(
            f"{part} cannot be used: {said}", where=None if folder is None else str(folder), mend=mend
        ) from None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice of the library while it loads."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
