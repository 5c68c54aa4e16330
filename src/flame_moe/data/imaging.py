"""Pictures and volumes of medical files, brought to one form: what a source needs of PNG, JPEG, DICOM and NIfTI.

Both functions are pure: the same file gives the same numbers, and nothing is fitted. The libraries come with the extra
`imaging` and are loaded at the first file that needs them.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flame_moe.errors import DataError
from flame_moe.extras import needed

Array = NDArray[Any]

_PREAMBLE = 128
_BROKEN = (OSError, EOFError, ValueError, SyntaxError, LookupError, ArithmeticError, struct.error, zlib.error)
"""What the readers raise on files that are damaged or not what their name says."""
_BROKEN_DICOM = (*_BROKEN, AttributeError, NotImplementedError, RuntimeError, TypeError)
"""What pydicom and its decoders raise besides: for an attribute that the file lacks (AttributeError, TypeError where it
then counts with None), a transfer syntax that nobody decodes (NotImplementedError), a decoder that gives up
(RuntimeError)."""


def read_picture(path: Path, shape: tuple[int, int, int], *, flip: bool = False) -> NDArray[np.uint8]:
    """A picture as 8-bit pixels of one size, whatever it was stored as.

    DICOM is told by its content, whatever the file is called: stored values go through the modality look-up table or
    rescale slope and intercept, then the first VOI look-up table or window (DICOM PS3.3 C.11.1 and C.11.2), and
    MONOCHROME1 is inverted, so that more is always brighter; padding pixels are black. A DICOM file of more than 8 bit
    without a window, and other files of 16 bit, are stretched from their own darkest to their brightest pixel.
    The picture is resized by Lanczos with its proportions kept, and centred on black.

    Args:
        path: PNG, JPEG or another format of Pillow, or DICOM with one frame in any of the usual compressions.
        shape: (height, width, channels) of the result; 1 channel is grey, 3 are red, green and blue.
        flip: mirror left and right, for example to bring all breasts to the same side.

    Returns:
        (height * width * channels,) uint8, rows first, channels last.

    Raises:
        DataError: if the file cannot be read, holds no pixels or more than one frame, or its window is no window.
        ExtraMissingError: if the extra `imaging` is not installed.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise DataError(f"pictures have 1 or 3 channels, not {channels}", where=str(path))
    pil = _library("PIL.Image")
    picture = pil.fromarray(_dicom(path) if _is_dicom(path) else _plain(path))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if flip:
        picture = picture.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    scale = min(height / picture.height, width / picture.width)
    inside = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = pil.new(picture.mode, (width, height))
    corner = ((width - inside[0]) // 2, (height - inside[1]) // 2)
    canvas.paste(picture.resize(inside, pil.Resampling.LANCZOS), corner)
    return np.asarray(canvas, dtype=np.uint8).reshape(-1)


def read_volume(path: Path, size: tuple[int, int, int], *, frame: int | None = None) -> NDArray[np.float32]:
    """A head volume in canonical orientation, of one size, z-scored by the head alone.

    Axes are turned to the nearest of right, anterior, superior, as the file's affine says, so that how the file was
    stored changes nothing. The field of view is resampled by cubic splines (smoothed first where it gets coarser) with
    its proportions in millimetres kept, centred, and filled up with its darkest value. The head is what exceeds the 2nd
    percentile by a tenth of the distance to the 98th (Smith, Human Brain Mapping 17:143-155, 2002); all voxels are
    scored by its mean and standard deviation, so air and padding do not matter and darker stays darker. NaN voxels
    count as the darkest, because brain extraction writes them around the brain.

    Args:
        path: NIfTI, plain or packed, of either byte order.
        size: voxels of the result along right, anterior and superior.
        frame: which volume of a file with several to take, from 0; without it such a file is refused.

    Returns:
        float32 of shape `size`.

    Raises:
        DataError: if the file cannot be read, does not say its orientation, has several volumes, has infinite voxels,
            or nothing in it stands out from the background.
        ExtraMissingError: if the extra `imaging` is not installed.
    """
    return score_volume(*_nifti(path, frame), size, str(path))


def score_volume(
    voxels: NDArray[np.float32], spacing: NDArray[np.float64], size: tuple[int, int, int], where: str
) -> NDArray[np.float32]:
    """A head volume whose axes are right, anterior, superior, as `read_volume` gives it.

    Args:
        voxels: (X, Y, Z).
        spacing: (3,) millimetres from voxel to voxel.
        size: voxels of the result.
        where: for messages.

    Raises:
        DataError: if it has infinite voxels, or nothing in it stands out from the background.
    """
    known = np.isfinite(voxels)
    if np.isinf(voxels).any() or not known.any():
        what = "infinite voxels" if known.any() else "no finite voxel"
        raise DataError(f"the volume has {what}", where=where, mend="Export it again.")
    low, high = np.percentile(voxels[known], (2, 98))
    dark = float(voxels[known].min())
    if not known.all():
        voxels = np.where(known, voxels, np.float32(dark))
    resampled = _resample(voxels, spacing, size, dark)
    head = resampled > low + 0.1 * (high - low)
    spread = float(resampled[head].std(dtype=np.float64)) if head.any() else 0.0
    if spread == 0.0:
        raise DataError("nothing in the volume stands out from its background", where=where, mend="Look at it.")
    return ((resampled - resampled[head].mean(dtype=np.float64)) / spread).astype(np.float32)


def _library(name: str) -> Any:
    return needed(name, "imaging", "reading images")


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(_PREAMBLE + 4)
    except OSError as error:
        raise DataError(f"the picture cannot be read ({error.strerror})", where=str(path)) from None
    return start[_PREAMBLE:] == b"DICM"


def _plain(path: Path) -> NDArray[np.uint8]:
    """Grey (H, W) or colour (H, W, 3), turned as its camera says."""
    pil = _library("PIL.Image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pil.open(path) as file:
                if getattr(file, "n_frames", 1) > 1:
                    raise DataError(f"the file has {file.n_frames} frames", where=str(path), mend="Give one picture.")
                picture = _library("PIL.ImageOps").exif_transpose(file)
                picture.load()
    except (*_BROKEN, pil.DecompressionBombError) as error:
        what = f"the picture cannot be read ({type(error).__name__})"
        raise DataError(what, where=str(path), mend="Export it again, as PNG, JPEG or DICOM.") from None
    if picture.mode.startswith(("I", "F")):
        return _stretch(np.asarray(picture, dtype=np.float32))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = pil.alpha_composite(pil.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def _dicom(path: Path) -> NDArray[np.uint8]:
    """Grey (H, W), windowed and more is brighter, or colour (H, W, 3)."""
    pydicom, pixels = _library("pydicom"), _library("pydicom.pixels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            header = pydicom.dcmread(path)
        except _BROKEN_DICOM as error:
            what = f"the DICOM file cannot be read ({type(error).__name__})"
            raise DataError(what, where=str(path), mend="Fetch it again.") from None
        if "PixelData" not in header:
            mend = "It is a report or a header alone: leave it out, or fetch the image."
            raise DataError("the DICOM file holds no pixel data", where=str(path), mend=mend)
        if int(header.get("NumberOfFrames") or 1) > 1:
            what = f"the DICOM file has {header.NumberOfFrames} frames"
            raise DataError(what, where=str(path), mend="Give a picture: tomosynthesis and films are not read.")
        try:
            stored = pixels.pixel_array(header)
            if stored.ndim == 3:
                return _colour(stored, path)
            values = np.asarray(pixels.apply_modality_lut(stored, header), dtype=np.float32)
            shades = _window(values, stored, header, path)
        except _BROKEN_DICOM as error:
            syntax = header.file_meta.get("TransferSyntaxUID", "unknown")
            what = f"the pixels cannot be decoded ({getattr(syntax, 'name', syntax)}: {type(error).__name__})"
            raise DataError(what, where=str(path), mend="Fetch it again, or convert it to PNG.") from None
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        shades = 1.0 - shades
    padding = header.get("PixelPaddingValue")
    if padding is not None:
        shades = np.where(stored == padding, np.float32(0.0), shades)
    return np.rint(shades * 255.0).astype(np.uint8)


def _colour(stored: Array, path: Path) -> NDArray[np.uint8]:
    if stored.dtype != np.uint8 or stored.shape[2] != 3:
        what = f"colour pixels are {stored.dtype} with {stored.shape[2]} samples"
        raise DataError(what, where=str(path), mend="Convert the picture to PNG.")
    return np.asarray(stored)


def _window(values: NDArray[np.float32], stored: Array, header: Any, path: Path) -> NDArray[np.float32]:
    """Values as brightness 0..1: look-up table, window, stored range of 8 bit, or else the picture's own range."""
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        what = f"pixels of type {header.get('PhotometricInterpretation')} are not read"
        raise DataError(what, where=str(path), mend="Convert the picture to PNG.")
    if header.get("VOILUTSequence"):
        table = header.VOILUTSequence[0]
        shades = _library("pydicom.pixels").apply_voi(values.astype(np.int64), header, 0)
        return np.clip(shades / np.float32(2 ** int(table.LUTDescriptor[2]) - 1), 0.0, 1.0).astype(np.float32)
    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if centre is not None and width is not None:
        function = str(header.get("VOILUTFunction") or "LINEAR")
        if not (np.isfinite(centre) and np.isfinite(width) and width > 0) or (function == "LINEAR" and width < 1):
            what = f"window centre {centre:g} and width {width:g} are no window"
            raise DataError(what, where=str(path), mend="Mend the header, or convert the picture to PNG.")
        return _shades(values, centre, width, function)
    if int(header.BitsStored) <= 8 and values.min() >= 0.0:
        return np.clip(values / np.float32(2 ** int(header.BitsStored) - 1), 0.0, 1.0)
    padding = header.get("PixelPaddingValue")
    real = values if padding is None else values[stored != padding]
    low, high = (float(real.min()), float(real.max())) if real.size else (0.0, 0.0)
    return np.clip((values - low) / max(high - low, 1e-6), 0.0, 1.0)


def _shades(values: NDArray[np.float32], centre: float, width: float, function: str) -> NDArray[np.float32]:
    """The window functions of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0..1."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -80.0, 80.0)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    return np.clip((values - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5, 0.0, 1.0)


def _first(value: Any) -> float | None:
    """The first of one or several header values."""
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


def _stretch(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) * (255.0 / max(high - low, 1e-6))).astype(np.uint8)


def _nifti(path: Path, frame: int | None) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels along right, anterior, superior, and their spacing in millimetres."""
    nibabel = _library("nibabel")
    broken = (*_BROKEN, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise DataError(f"the file is {type(image).__name__}, not NIfTI", where=str(path), mend="Convert it.")
        _check_affine(image, path)
        image = nibabel.as_closest_canonical(image)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    except broken as error:
        what = f"the volume cannot be read ({type(error).__name__})"
        raise DataError(what, where=str(path), mend="Fetch it again, as .nii or .nii.gz.") from None
    spacing = np.asarray(nibabel.affines.voxel_sizes(image.affine), dtype=np.float64)
    voxels = voxels.reshape(*voxels.shape[:3], -1)
    if voxels.ndim != 4 or 0 in voxels.shape:
        raise DataError(f"the shape {image.shape} is no volume", where=str(path))
    if frame is None and voxels.shape[3] > 1:
        raise DataError(f"the file holds {voxels.shape[3]} volumes", where=str(path), mend="Say which, or give one.")
    if not 0 <= (frame or 0) < voxels.shape[3]:
        raise DataError(f"there is no volume {frame}, they are 0 to {voxels.shape[3] - 1}", where=str(path))
    return voxels[..., frame or 0], spacing


def _check_affine(image: Any, path: Path) -> None:
    """An orientation that the file does not state would be guessed by the reader."""
    if int(image.header["qform_code"]) == 0 and int(image.header["sform_code"]) == 0:
        mend = "Convert it from the scanner's files with a tool that keeps the orientation."
        raise DataError("the file does not say how the volume is oriented", where=str(path), mend=mend)
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError("the affine of the volume is no orientation", where=str(path), mend="Convert it again.")


def _resample(
    voxels: NDArray[np.float32], spacing: NDArray[np.float64], size: tuple[int, int, int], fill: float
) -> NDArray[np.float32]:
    """The whole field of view in a box of `size` cubic voxels, centred."""
    have, want = np.array(voxels.shape), np.array(size)
    step = (have * spacing / want).max() / spacing
    smooth = ndimage.gaussian_filter(voxels, np.maximum(0.0, (step - 1.0) / 2.0), mode="nearest")
    offset = (have - 1) / 2.0 - step * (want - 1) / 2.0
    moved = ndimage.affine_transform(
        smooth, step, offset=offset, output_shape=tuple(size), order=3, mode="constant", cval=fill
    )
    return np.asarray(moved, dtype=np.float32)
