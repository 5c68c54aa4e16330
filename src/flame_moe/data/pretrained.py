"""Pre-trained models from a local folder in the layout of Hugging Face: `config.json` and weights as safetensors.

Nothing is ever fetched from the network, no code that comes with a model is run, and pickled weights are not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flame_moe.errors import DataError
from flame_moe.files import sha256
from flame_moe.foreign import explained, headless, library, quiet
from flame_moe.schema import Pretrained

_READ = (".json", ".txt", ".model", ".safetensors", ".jinja")
_CONVERT = "Save it with model.save_pretrained(folder) of transformers."


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


def model_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file that decides what the model gives."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _READ}


def load_model(folder: Path) -> Any:
    """The model, frozen and in evaluation mode.

    Raises:
        DataError: if it cannot be loaded, or wants code of its own to be run.
    """
    transformers = library()
    with explained(folder), quiet(transformers):
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return model.float().requires_grad_(False).eval()


def describe_model(folder: Path) -> Pretrained:
    """What a store keeps of a model that is to be trained: where it is, the hashes of its files, and its config."""
    return Pretrained(folder=str(folder.resolve()), files=model_files(folder), config=model_config(folder))


def starting_weights(pretrained: Pretrained, name: str) -> dict[str, Any]:
    """The weights from which a model of `build_model` starts.

    Args:
        pretrained: as the store describes it.
        name: of the modality, for the message.

    Raises:
        DataError: if the folder is not there, or its files are not those that the store was prepared with.
    """
    folder = model_folder(pretrained.folder)
    if model_files(folder) != pretrained.files:
        what = f"the model is not the one with which modality '{name}' was prepared"
        raise DataError(what, where=str(folder), mend="Restore its files, or prepare the store again.")
    return headless(load_model(folder)).state_dict()


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        DataError: if there is none, or it is not of the fast kind, which alone can cut long texts with overlap.
    """
    transformers = library()
    with explained(folder, "the tokenizer"), quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        mend = "Convert it: save a fast tokenizer (tokenizer.json) into the folder."
        raise DataError("the model has no fast tokenizer", where=str(folder), mend=mend)
    return tokenizer
