"""Pictures as vectors: made ready as the model was trained, the same everywhere, computed once."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flame_moe.data import vision
from flame_moe.data.vision import VisionOptions, embed_pictures, prepared, vision_width
from flame_moe.errors import DataError
from tests.pretrained import tiny_resnet, tiny_vit

SQUARE = {"size": {"height": 4, "width": 4}, "resample": 0, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> VisionOptions:
    return VisionOptions(encoder=str(tiny_vit(tmp_path_factory.mktemp("vit"))))


def pictures(n: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = [(20, 12), (16, 16, 3), (9, 30, 1)]
    return [generator.integers(0, 256, shapes[i % 3], dtype=np.uint8) for i in range(n)]


def test_a_picture_is_resized_and_standardised_as_the_model_says() -> None:
    picture = np.array([[0, 255], [51, 102]], dtype=np.uint8)
    ready = prepared(picture, SQUARE, 3)
    expected = (np.repeat(np.repeat(picture, 2, 0), 2, 1) / 255 - 0.5) / 0.25
    assert ready.shape == (3, 4, 4)
    assert ready.dtype == np.float32
    for channel in ready:
        assert channel == pytest.approx(expected, abs=1e-5)
    raw = prepared(picture, {**SQUARE, "do_resize": False, "do_rescale": False, "do_normalize": False}, 1)
    assert raw.tolist() == [[[0, 255], [51, 102]]]


def test_the_longer_side_follows_and_the_centre_is_cut_out() -> None:
    picture = np.tile(np.arange(40, dtype=np.uint8), (20, 1))
    steps = {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": {"height": 6, "width": 8}}
    ready = prepared(picture, {**steps, "do_rescale": False, "do_normalize": False}, 1)
    assert ready.shape == (1, 6, 8)
    assert ready[0, 0] == pytest.approx(12.5 + 2 * np.arange(8), abs=1.0)
    with pytest.raises(DataError, match=r"gives the size as \{'longest': 3\}"):
        prepared(picture, {"size": {"longest": 3}}, 1)


def test_colours_stay_in_their_channels_and_grey_is_repeated() -> None:
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert [float(c.mean()) for c in prepared(red, SQUARE, 3)] == pytest.approx([2.0, -2.0, -2.0])
    assert prepared(np.full((4, 4, 1), 255, np.uint8), SQUARE, 3) == pytest.approx(np.full((3, 4, 4), 2.0))


def test_the_vector_is_the_mean_of_the_last_layer(vit: VisionOptions) -> None:
    from transformers import ViTModel

    model = ViTModel.from_pretrained(vit.encoder, add_pooling_layer=False).eval()
    found = pictures(20)
    got = embed_pictures(found, vit)
    assert got.shape == (20, vision_width(vit)) == (20, 12)
    steps = json.loads((Path(vit.encoder) / "preprocessor_config.json").read_text())
    with torch.no_grad():
        for row, picture in zip(got, found, strict=True):
            x = torch.from_numpy(prepared(picture, steps, 3))[None]
            assert row == pytest.approx(model(pixel_values=x).last_hidden_state[0].mean(0).numpy(), abs=1e-5)


def test_a_convolutional_model_of_one_channel_works_too(tmp_path: Path) -> None:
    options = VisionOptions(encoder=str(tiny_resnet(tmp_path / "net")))
    got = embed_pictures(pictures(3), options)
    assert got.shape == (3, vision_width(options)) == (3, 8)
    assert np.isfinite(got).all()
    assert got[0] == pytest.approx(embed_pictures(pictures(1), options)[0], abs=1e-5)


def test_a_picture_is_embedded_once_and_its_shape_counts(
    vit: VisionOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    view = vision._Viewer.view

    def watched(self: Any, wanted: Any) -> Any:
        seen.append(len(wanted))
        return view(self, wanted)

    monkeypatch.setattr(vision._Viewer, "view", watched)
    found = pictures(4)
    first = embed_pictures([*found, found[0]], vit, tmp_path)
    np.testing.assert_array_equal(embed_pictures(found, vit, tmp_path), first[:4])
    assert seen == [4]
    embed_pictures([found[0].reshape(12, 20)], vit, tmp_path)
    assert seen == [4, 1]


def test_no_network_is_asked(vit: VisionOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert np.isfinite(embed_pictures(pictures(2), vit)).all()


def test_what_is_no_picture_or_no_vision_model_is_refused(vit: VisionOptions, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"picture 1 is float64 of shape \(3, 3\)\. Give uint8"):
        embed_pictures([pictures(1)[0], np.zeros((3, 3))], vit)
    with pytest.raises(DataError, match=r"picture 0 is uint8 of shape \(3, 3, 2\)"):
        embed_pictures([np.zeros((3, 3, 2), np.uint8)], vit)
    with pytest.raises(DataError, match="picture 0 has no pixels"):
        embed_pictures([np.zeros((0, 3), np.uint8)], vit)
    with pytest.raises(DataError, match=r"the encoder 'vit' is no folder\. Models are not fetched"):
        vision_width(VisionOptions(encoder="vit"))
    folder = tiny_vit(tmp_path / "other", size={"height": 32, "width": 32})
    with pytest.raises(DataError, match=r"the model cannot be used: .*32"):
        embed_pictures(pictures(1), VisionOptions(encoder=str(folder)))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"holds no preprocessor_config.json"):
        embed_pictures(pictures(1), VisionOptions(encoder=str(folder)))
