"""Pictures and volumes of medical files come out in one form, whatever they were stored as."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)

from flame_moe.data.imaging import read_picture, read_volume
from flame_moe.errors import DataError, ExtraMissingError

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
RAMP = np.arange(24, dtype=np.uint16).reshape(4, 6) * 100


def dicom(path: Path, pixels: NDArray[Any] | None, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Path:
    """A mammogram with these stored values, written plainly or compressed."""
    data = Dataset()
    data.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    data.SOPInstanceUID = generate_uid()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == JPEGBaseline8Bit else syntax
    if pixels is not None:
        data.PhotometricInterpretation = "MONOCHROME2"
        data.SamplesPerPixel = 1
        data.Rows, data.Columns = pixels.shape[-2:]
        data.BitsAllocated = pixels.dtype.itemsize * 8
        data.BitsStored = 8 if pixels.dtype == np.uint8 else 12
        data.HighBit = data.BitsStored - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    if syntax in (RLELossless, JPEG2000Lossless):
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.compress(syntax)
    data.save_as(path, enforce_file_format=True)
    return path


def png(path: Path, pixels: NDArray[Any], mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def grey(path: Path, height: int = 4, width: int = 6, **options: Any) -> NDArray[np.uint8]:
    return read_picture(path, (height, width, 1), **options).reshape(height, width)


def nifti(path: Path, voxels: NDArray[Any], affine: NDArray[Any]) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def head(shape: tuple[int, int, int] = (12, 14, 10)) -> NDArray[np.float32]:
    """A bright box with a brighter corner to the right, in front, on top."""
    voxels = np.zeros(shape, dtype=np.float32)
    voxels[2:-2, 2:-2, 2:-2] = 50.0
    voxels[-5:-2, -6:-2, -4:-2] = 100.0
    return voxels


def test_a_png_of_the_right_size_comes_back_unchanged(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", GREY)
    assert grey(path).tolist() == GREY.tolist()
    assert read_picture(path, (4, 6, 3)).reshape(4, 6, 3)[..., 2].tolist() == GREY.tolist()
    assert grey(path, flip=True).tolist() == GREY[:, ::-1].tolist()


def test_proportions_are_kept_and_the_rest_is_black(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", np.full((40, 20), 200, dtype=np.uint8))
    small = grey(path, 8, 8)
    assert (small[:, 2:6] == 200).all()
    assert (small[:, :2] == 0).all()
    assert (small[:, 6:] == 0).all()
    large = grey(path, 100, 60)
    assert (large[:, 5:55] == 200).all()
    assert large.sum() == 200 * 100 * 50
    assert grey(png(tmp_path / "line.png", np.full((1, 900), 9, dtype=np.uint8)), 8, 8).max() == 9


def test_colours_transparency_and_16_bit_have_one_meaning(tmp_path: Path) -> None:
    colour = np.zeros((4, 6, 3), dtype=np.uint8)
    colour[:, :3, 0] = 255
    path = png(tmp_path / "c.png", colour)
    assert read_picture(path, (4, 6, 3)).reshape(4, 6, 3).tolist() == colour.tolist()
    assert grey(path)[0].tolist() == [76] * 3 + [0] * 3
    clear = np.dstack([colour, np.full((4, 6), 0, dtype=np.uint8)])
    assert grey(png(tmp_path / "t.png", clear)).max() == 0
    assert grey(png(tmp_path / "p.png", colour, "P"))[0].tolist() == [76] * 3 + [0] * 3
    assert grey(png(tmp_path / "deep.png", RAMP + 1000)).tolist() == np.rint(RAMP / 2300 * 255).tolist()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    assert grey(tmp_path / "a.png", 6, 4).tolist() == np.rot90(GREY, -1).tolist()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_dicom_gives_the_same_pixels_in_every_compression(tmp_path: Path, syntax: str) -> None:
    values = np.kron(RAMP, np.ones((16, 16), dtype=np.uint16))
    path = dicom(tmp_path / "no-suffix", values, syntax=syntax, WindowCenter=1150.5, WindowWidth=2301)
    assert np.abs(grey(path, 64, 96) - np.rint(values / 2300 * 255)).max() <= 1


def test_a_jpeg_inside_dicom_is_read(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 4
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    path = dicom(tmp_path / "a.dcm", smooth, syntax=JPEGBaseline8Bit)
    data = __import__("pydicom").dcmread(path)
    data.PixelData = encapsulate([(tmp_path / "a.jpg").read_bytes()])
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)
    assert np.abs(grey(path, 16, 16).astype(int) - smooth).max() <= 4
    assert np.abs(grey(tmp_path / "a.jpg", 16, 16).astype(int) - smooth).max() <= 4


def test_rescale_comes_before_the_window_and_monochrome1_is_inverted(tmp_path: Path) -> None:
    window = {"WindowCenter": 0.5, "WindowWidth": 1001, "RescaleSlope": 2, "RescaleIntercept": -1000}
    values = RAMP * 2.0 - 1000
    shades = np.clip((values - 0.0) / 1000 + 0.5, 0, 1)
    assert np.abs(grey(dicom(tmp_path / "a", RAMP, **window)) - shades * 255).max() <= 0.51
    inverted = dicom(tmp_path / "b", RAMP, PhotometricInterpretation="MONOCHROME1", **window)
    assert np.abs(grey(inverted) - (1 - shades) * 255).max() <= 0.51


def test_the_first_window_and_every_window_function_is_used(tmp_path: Path) -> None:
    two = {"WindowCenter": [1000.5, 5], "WindowWidth": [1001, 3]}
    expected = np.clip((RAMP - 1000.0) / 1000 + 0.5, 0, 1)
    assert grey(dicom(tmp_path / "a", RAMP, **two)).tolist() == np.rint(expected * 255).tolist()
    exact = {"WindowCenter": 1000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}
    assert grey(dicom(tmp_path / "b", RAMP, **exact)).tolist() == np.rint(expected * 255).tolist()
    curved = dicom(tmp_path / "c", RAMP, WindowCenter=1000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    sigmoid = 1 / (1 + np.exp(-4 * (RAMP - 1000.0) / 1000))
    assert np.abs(grey(curved) - np.rint(sigmoid * 255)).max() <= 1


def test_a_look_up_table_goes_before_the_window(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.LUTData = b"\x00\x00\x0a\x00\x14\x00\xff\x00"
    pixels = np.array([[0, 1, 2], [3, 2, 9]], dtype=np.uint16)
    path = dicom(tmp_path / "a", pixels, VOILUTSequence=[table], WindowCenter=1, WindowWidth=2)
    assert grey(path, 2, 3).tolist() == [[0, 10, 20], [255, 20, 255]]


def test_without_a_window_the_padding_does_not_darken_the_breast(tmp_path: Path) -> None:
    signed = RAMP.astype(np.int16) // 2
    signed[0, 0] = -2000
    path = dicom(tmp_path / "a", signed, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    got = grey(path)
    assert got[0, 0] == 0
    assert got[0, 1] == 255
    assert got[-1, -1] == 0
    assert grey(dicom(tmp_path / "b", GREY)).tolist() == GREY.tolist()


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"pixels": None}, r"the DICOM file holds no pixel data .*a report or a header alone"),
        ({"pixels": np.zeros((3, 4, 6), np.uint16), "NumberOfFrames": 3}, r"the DICOM file has 3 frames"),
        ({"WindowCenter": 5, "WindowWidth": 0}, r"window centre 5 and width 0 are no window"),
        ({"PixelData": b"\x00\x00"}, r"the pixels cannot be decoded \(Explicit VR Little Endian"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, r"pixels of type PALETTE COLOR are not read"),
    ],
)
def test_a_dicom_file_without_a_picture_is_one_sentence(tmp_path: Path, tags: dict[str, Any], message: str) -> None:
    path = dicom(tmp_path / "a.dcm", tags.pop("pixels", RAMP), **tags)
    with pytest.raises(DataError, match=message) as caught:
        grey(path)
    assert "a.dcm" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_picture_is_one_sentence(tmp_path: Path) -> None:
    whole = png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).read_bytes()
    for name, content in (("cut.png", whole[:900]), ("empty.png", b""), ("text.png", b"no picture at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"the picture cannot be read .*{name}"):
            grey(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\) \[.*absent.png\]"):
        grey(tmp_path / "absent.png")
    (tmp_path / "cut.dcm").write_bytes(dicom(tmp_path / "b.dcm", RAMP).read_bytes()[:200])
    with pytest.raises(DataError, match=r"the DICOM file|the pixels cannot"):
        grey(tmp_path / "cut.dcm")
    Image.new("L", (4, 4)).save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("L", (4, 4), 9)])
    with pytest.raises(DataError, match="the file has 2 frames"):
        grey(tmp_path / "film.gif")
    with pytest.raises(DataError, match="pictures have 1 or 3 channels, not 2"):
        read_picture(tmp_path / "a.png", (4, 6, 2))


def test_how_a_volume_was_stored_changes_nothing(tmp_path: Path) -> None:
    """Turned, mirrored and permuted on disk, with the affine that says so: the same head."""
    affine = np.array([[2.0, 0, 0, -10], [0, 1.5, 0, -8], [0, 0, 2.5, -5], [0, 0, 0, 1]])
    straight = nibabel.Nifti1Image(head(), affine)
    expected = read_volume(nifti(tmp_path / "ras.nii", head(), affine), (10, 10, 10))
    for codes in ("LAS", "LPI", "SAR", "PIL"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(codes))
        )
        image = straight.as_reoriented(turn)
        assert "".join(nibabel.aff2axcodes(image.affine)) == codes
        nibabel.save(image, tmp_path / f"{codes}.nii.gz")
        assert read_volume(tmp_path / f"{codes}.nii.gz", (10, 10, 10)) == pytest.approx(expected, abs=1e-5)
    wrong = read_volume(nifti(tmp_path / "wrong.nii", head()[::-1], affine), (10, 10, 10))
    assert np.abs(wrong - expected).max() > 0.5


def test_a_volume_is_scored_by_its_head_alone(tmp_path: Path) -> None:
    voxels = head() * 7 + 3
    got = read_volume(nifti(tmp_path / "a.nii", voxels, np.eye(4)), (14, 14, 14))
    assert got.dtype == np.float32
    inside = got[1:-1, :, 2:-2][head() > 0]
    assert inside.mean(dtype=np.float64) == pytest.approx(0, abs=1e-5)
    assert inside.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    assert got[0] == pytest.approx(np.full((14, 14), got.min()))
    assert np.unravel_index(got.argmax(), got.shape) > (7, 7, 7)
    in_air = np.pad(voxels, 6, constant_values=3.0)
    more = read_volume(nifti(tmp_path / "b.nii", in_air, np.eye(4)), (26, 26, 26))
    assert more[6:-6, 6:-6, 6:-6] == pytest.approx(got, abs=1e-5)
    bare = np.where(head() == 0, np.nan, voxels + np.arange(10))
    assert np.isfinite(read_volume(nifti(tmp_path / "c.nii", bare, np.eye(4)), (14, 14, 14))).all()


def test_proportions_of_a_volume_are_kept_in_millimetres(tmp_path: Path) -> None:
    """A cube of 12 mm stays a cube, although it is 12 by 12 by 4 voxels."""
    voxels = np.zeros((24, 24, 8), dtype=np.float32)
    voxels[6:18, 6:18, 2:6] = np.linspace(50, 54, 12, dtype=np.float32)[:, None, None]
    got = read_volume(nifti(tmp_path / "a.nii", voxels, np.diag([1.0, 1, 3, 1])), (24, 24, 24))
    got = got > (got.min() + got.max()) / 2
    sides = [int(np.ptp(np.flatnonzero(got.any(axis=axes)))) + 1 for axes in ((1, 2), (0, 2), (0, 1))]
    assert sides[0] == sides[1] == 12
    assert abs(sides[2] - 12) <= 2
    wide = read_volume(nifti(tmp_path / "b.nii", voxels, np.diag([1.0, 1, 3, 1])), (24, 48, 24))
    assert wide.shape == (24, 48, 24)
    assert np.ptp(wide[:, :12]) == 0


def test_real_volumes_of_every_make_are_read(shared_data: Path) -> None:
    folder = shared_data / "nifti"
    small = read_volume(folder / "anatomical.nii", (16, 20, 12))
    assert np.isfinite(small).all()
    whole = read_volume(folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz", (24, 28, 24))
    mirrored = whole[::-1]
    assert (whole > whole.min() / 2).mean() == pytest.approx(0.27, abs=0.08)
    assert np.corrcoef(whole.ravel(), mirrored.ravel())[0, 1] > 0.98
    with pytest.raises(DataError, match=r"the file holds 2 volumes \[.*example4d"):
        read_volume(folder / "example4d.nii.gz", (16, 16, 16))
    assert read_volume(folder / "example4d.nii.gz", (16, 16, 8), frame=1).shape == (16, 16, 8)
    with pytest.raises(DataError, match="there is no volume 2, they are 0 to 1"):
        read_volume(folder / "example4d.nii.gz", (16, 16, 8), frame=2)


def test_byte_order_and_a_mirrored_affine_of_a_real_volume_change_nothing(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "nifti" / "anatomical.nii"
    image = nibabel.load(path)
    assert image.header.endianness == ">"
    expected = read_volume(path, (16, 16, 16))
    stored = np.asarray(image.dataobj)
    little = nifti(tmp_path / "little.nii", stored.astype("<f4"), image.affine)
    assert read_volume(little, (16, 16, 16)) == pytest.approx(expected, abs=1e-4)
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = stored.shape[0] - 1
    flipped = nifti(tmp_path / "flipped.nii", stored[::-1].astype("<f4"), image.affine @ mirror)
    assert read_volume(flipped, (16, 16, 16)) == pytest.approx(expected, abs=1e-4)


def test_a_volume_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    spoilt = head()
    spoilt[0, 0, 0] = np.inf
    cases = {
        "nothing in the volume stands out": nifti(tmp_path / "flat.nii", np.ones((4, 4, 4)), np.eye(4)),
        "the volume has infinite voxels": nifti(
            tmp_path / "inf.nii", np.append(np.ones(63), np.inf).reshape(4, 4, 4), np.eye(4)
        ),
        "the volume has no finite voxel": nifti(tmp_path / "nan.nii", np.full((4, 4, 4), np.nan), np.eye(4)),
        "is no volume": nifti(tmp_path / "flat2d.nii", np.ones((4, 4)), np.eye(4)),
    }
    unsaid = nibabel.Nifti1Image(head(), None)
    nibabel.save(unsaid, tmp_path / "unsaid.nii")
    cases["does not say how the volume is oriented"] = tmp_path / "unsaid.nii"
    whole = nifti(tmp_path / "whole.nii.gz", head(), np.eye(4)).read_bytes()
    for name, content in (("cut.nii.gz", whole[: len(whole) // 2]), ("text.nii", b"no volume"), ("empty.nii", b"")):
        (tmp_path / name).write_bytes(content)
        cases[f"the volume cannot be read .*{name}"] = tmp_path / name
    cases[r"the volume cannot be read .*absent"] = tmp_path / "absent.nii"
    for message, path in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            read_volume(path, (8, 8, 8))
        assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, volume = dicom(tmp_path / "a.dcm", RAMP), nifti(tmp_path / "a.nii", head(), np.eye(4))
    for name in ("nibabel", "pydicom", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExtraMissingError, match=r"needs nibabel, .* pip install 'flame-moe\[imaging\]'"):
        read_volume(volume, (8, 8, 8))
    with pytest.raises(ExtraMissingError, match=r"needs PIL"):
        grey(picture)
