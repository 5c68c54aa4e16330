"""Frozen models from a local folder in the layout of Hugging Face: `config.json` and weights as safetensors.

Nothing is ever fetched from the network, no code that comes with a model is run, and pickled weights are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame_moe.errors import DataError, ExtraMissingError
from flame_moe.files import sha256

_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd", "hidden_sizes", "embed_dim")
_READ = (".json", ".txt", ".model", ".safetensors", ".jinja")
_CONVERT = "Save it with model.save_pretrained(folder) of transformers."


def library() -> Any:
    """The package transformers.

    Raises:
        ExtraMissingError: if it is not installed.
    """
    try:
        import transformers
    except ImportError:
        mend = "Install it with: pip install 'flame-moe[text]'"
        raise ExtraMissingError("pre-trained models need the package transformers", mend=mend) from None
    return transformers


def model_folder(encoder: str, builtin: str = "") -> Path:
    """The folder of a model, checked as far as its files can tell without reading the weights.

    Args:
        encoder: the path as the user gave it.
        builtin: for the message, names that are no paths.

    Raises:
        DataError: if it is no folder of a model.
    """
    folder = Path(encoder).expanduser()
    if not folder.is_dir():
        known = f"neither {builtin} nor a folder" if builtin else "no folder"
        mend = "Models are not fetched from the network: give the path of a folder that holds one."
        raise DataError(f"the encoder '{encoder}' is {known}", mend=mend)
    if not (folder / "config.json").is_file():
        raise DataError("the folder holds no model: config.json is missing", where=str(folder), mend=_CONVERT)
    if not any(folder.glob("*.safetensors")):
        what = "the folder holds no weights as safetensors"
        raise DataError(what, where=str(folder), mend=f"Pickled weights are not read. {_CONVERT}")
    return folder


def model_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a model.

    Raises:
        DataError: if it is missing or no JSON object.
    """
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"the folder holds no {name}", where=str(folder), mend="Fetch the whole model.") from None
    except (OSError, ValueError):
        raise DataError("the file is no JSON", where=str(folder / name), mend="Fetch the model again.") from None
    if not isinstance(found, dict):
        raise DataError("the file is no JSON object", where=str(folder / name), mend="Fetch the model again.")
    return found


def model_width(folder: Path) -> int:
    """Length of the vectors that a model gives, from its config.json.

    Raises:
        DataError: if the file does not say.
    """
    config = model_config(folder)
    for name in _WIDTHS:
        width = config.get(name)
        if isinstance(width, list) and width:
            width = width[-1]
        if isinstance(width, int) and width > 0:
            return width
    mend = f"An encoder of one kind of input is needed, whose config names one of {', '.join(_WIDTHS)}."
    raise DataError("config.json does not say how wide the model is", where=str(folder), mend=mend)


def model_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file that decides what the model gives."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _READ}


def load_model(folder: Path) -> Any:
    """The model, frozen and in evaluation mode.

    Raises:
        DataError: if it cannot be loaded, or wants code of its own to be run.
    """
    transformers = library()
    with explained(folder), _quiet(transformers):
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return model.float().requires_grad_(False).eval()


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        DataError: if there is none, or it is not of the fast kind, which alone can cut long texts with overlap.
    """
    transformers = library()
    with explained(folder, "the tokenizer"), _quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        mend = "Convert it: save a fast tokenizer (tokenizer.json) into the folder."
        raise DataError("the model has no fast tokenizer", where=str(folder), mend=mend)
    return tokenizer


@contextmanager
def explained(folder: Path, part: str = "the model") -> Iterator[None]:
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
        raise DataError(f"{part} cannot be used: {said}", where=str(folder), mend=mend) from None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
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
