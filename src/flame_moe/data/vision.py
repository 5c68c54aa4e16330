"""Pictures as vectors by a frozen vision model: a fixed function of the pixels. They become a modality of kind `timed`.

The resizing and scaling that a model was trained with is read from its preprocessor_config.json and done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from flame_moe.data.embedcache import cached_rows, digest, maker_name
from flame_moe.data.pretrained import load_model, model_config, model_files, model_folder
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.foreign import explained, model_width

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

BATCH = 16
_VERSION = 1
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


class VisionOptions(Description):
    """How pictures become vectors.

    Attributes:
        encoder: the path of a local folder with a vision model in the layout of Hugging Face.
    """

    encoder: Annotated[str, Field(min_length=1)]


def vision_width(options: VisionOptions) -> int:
    """Length of the vectors; only config.json is read.

    Raises:
        DataError: if the encoder is no model.
    """
    folder = model_folder(options.encoder)
    return model_width(model_config(folder), str(folder))


def embed_pictures(pictures: Sequence[Pixels], options: VisionOptions, cache: Path | None = None) -> Floats:
    """One vector per picture, the same in every run: the mean of the model's last layer over its tokens or places.

    Args:
        pictures: n pictures of any size, each uint8 (H, W) or (H, W, 1) for grey or (H, W, 3) for colours.
        options: which encoder.
        cache: folder in which vectors are kept, by the hash of pixels and model; None for nowhere.

    Returns:
        (n, vision_width(options)).

    Raises:
        DataError: for something that is no picture, or an encoder that is no vision model.
        ExtraMissingError: if transformers is not installed.

    Example:
        vectors = embed_pictures([picture], VisionOptions(encoder="models/vit"), Path("cache"))
    """
    for i, picture in enumerate(pictures):
        if (
            picture.dtype != np.uint8
            or picture.ndim not in (2, 3)
            or (picture.ndim == 3 and picture.shape[2] not in (1, 3))
        ):
            what = f"picture {i} is {picture.dtype} of shape {picture.shape}"
            raise DataError(what, mend="Give uint8 (H, W), (H, W, 1) or (H, W, 3).")
        if picture.size == 0:
            raise DataError(f"picture {i} has no pixels: shape {picture.shape}", mend="Leave it out.")
    folder = model_folder(options.encoder)
    width = model_width(model_config(folder), str(folder))
    viewer: list[_Viewer] = []

    def make(wanted: Sequence[int]) -> Floats:
        if not viewer:
            viewer.append(_Viewer(folder, width))
        return viewer[0].view([pictures[i] for i in wanted])

    place = None if cache is None else cache / maker_name({"pictures": _VERSION}, model_files(folder))
    keys = [digest(str(picture.shape).encode(), picture.tobytes()) for picture in pictures]
    return cached_rows(keys, make, width, place)


class _Viewer:
    """A model that is loaded once it is needed, with how it wants pictures to be."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self.steps = model_config(folder, "preprocessor_config.json")
        self.channels = int(model_config(folder).get("num_channels", 3))
        self.model = load_model(folder)

    def view(self, pictures: Sequence[Pixels]) -> Floats:
        """(n, width)."""
        found = []
        with explained(self.folder), torch.inference_mode():
            for start in range(0, len(pictures), BATCH):
                ready = [prepared(p, self.steps, self.channels) for p in pictures[start : start + BATCH]]
                states = self.model(pixel_values=torch.from_numpy(np.stack(ready))).last_hidden_state.float()
                # Convolutional models give (n, d, h, w), transformers (n, tokens, d).
                found.append(states.mean((2, 3)) if states.ndim == 4 else states.mean(1))
        vectors: Floats = torch.cat(found).numpy()
        if vectors.shape[1] != self.width:
            what = f"the model gives {vectors.shape[1]} numbers, its config.json says {self.width}"
            raise DataError(what, where=str(self.folder), mend="A vision model of one output width is needed.")
        return vectors


def prepared(picture: Pixels, steps: Mapping[str, Any], channels: int) -> Floats:
    """A picture as a model wants it: resized, cropped around its centre, scaled to 0..1, standardised.

    Args:
        picture: uint8 (H, W), (H, W, 1) or (H, W, 3).
        steps: the content of preprocessor_config.json.
        channels: that the model reads; a grey picture is repeated, a coloured one made grey.

    Returns:
        (channels, height, width).

    Raises:
        DataError: if the size is given in a way that is not known.
    """
    image = Image.fromarray(picture if picture.ndim == 2 or picture.shape[2] == 3 else picture[:, :, 0])
    image = image.convert("L" if channels == 1 else "RGB")
    if steps.get("do_resize", True):
        resample = Image.Resampling(steps.get("resample", Image.Resampling.BILINEAR))
        image = image.resize(_target(image, steps.get("size", 224)), resample)
    if steps.get("do_center_crop", False):
        width, height = _target(image, steps.get("crop_size", 224))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    x = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, channels)
    if steps.get("do_rescale", True):
        x = x * np.float32(steps.get("rescale_factor", 1 / 255))
    if steps.get("do_normalize", True):
        mean, std = (np.float32(steps.get(name, default)) for name, default in _IMAGENET.items())
        if channels == 1:
            mean, std = mean.mean(), std.mean()
        x = (x - mean) / std
    return np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32)


def _target(image: Image.Image, size: Any) -> tuple[int, int]:
    """(width, height) in pixels from {height, width}, {shortest_edge} or one number for both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["width"]), int(size["height"])
    if isinstance(size, Mapping) and "shortest_edge" in size:
        factor = int(size["shortest_edge"]) / min(image.size)
        return max(1, int(image.width * factor)), max(1, int(image.height * factor))
    raise DataError(f"preprocessor_config.json gives the size as {size}", mend="Give it as height and width.")
