"""Codes, pictures and signals against plain loops over events, pixels and steps, and what keeps samples apart."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_moe.batch import ModalityBatch
from flame_moe.nn.encoders import ENCODERS, CodeEncoder, ImageEncoder, WaveformEncoder
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.codes import StackedEmbedding
from flame_moe.nn.encoders.convolution import StackedConv, StackedGroupNorm, pooling
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.schema import Modality
from flame_moe.training.optim import parameter_groups
from tests.reference import naive_codes, naive_image, naive_waveform
from tests.tiny import BY_NAME, config, full_batch

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def trained(net: Encoder, stages: int = 2) -> Encoder:
    """The encoder with random updates of later stages, so that a cursor makes a difference."""
    torch.manual_seed(1)
    for stage in range(1, stages):
        for _, part in growables(net):
            part.grow(stage)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        for _, part in growables(net):
            part.commit(lambda delta: delta)
    return net.eval()


def encoder(modality: Modality, **changes: object) -> Encoder:
    torch.manual_seed(0)
    return trained(ENCODERS[modality.kind](modality, config(**changes), 0))


def part(values: Tensor, lengths: list[int], times: Tensor | None = None) -> ModalityBatch:
    return ModalityBatch(torch.arange(len(values)), values, torch.tensor(lengths), times)


def signals(lengths: list[int], channels: int, seed: int = 0) -> ModalityBatch:
    generator = torch.Generator().manual_seed(seed)
    return part(torch.randn(len(lengths), max(lengths), channels, generator=generator), lengths)


@pytest.mark.parametrize("cursor", [0, 1])
def test_codes_equal_a_loop_over_events(cursor: int) -> None:
    net, batch = encoder(BY_NAME["events"], width=16), full_batch(6).modalities["events"]
    assert isinstance(net, CodeEncoder)
    assert batch.times is not None
    x, mask = net(batch, cursor)
    for i, length in enumerate(batch.lengths.tolist()):
        found = naive_codes(net, batch.values[i, :length], batch.times[i, :length], cursor)
        names = [*net.modality.types, "sample"]
        assert [name for name, there in zip(names, mask[i].tolist(), strict=True) if there] == [
            name for name in names if name in found
        ]
        for t, name in enumerate(names):
            if name in found:
                assert torch.allclose(x[i, t], found[name], **CLOSE)


def test_a_type_without_an_event_is_a_step_that_is_not_there() -> None:
    net = encoder(BY_NAME["events"])
    values = torch.tensor([[[2.0, 1.0], [0.0, 3.0], [2.0, 3.0]], [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]])
    x, mask = net(part(values, [3, 1], torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.0, 0.0]])), 0)
    assert mask.tolist() == [[True, False, True, True], [False, True, False, True]]
    assert not bool(x[~mask].any())


def test_the_order_of_events_of_one_time_changes_nothing() -> None:
    net, batch = encoder(BY_NAME["events"]), full_batch(3).modalities["events"]
    assert batch.times is not None
    same = batch._replace(times=torch.full_like(batch.times, 0.4))
    order = torch.cat(
        [torch.arange(int(batch.lengths[0])).flip(0), torch.arange(int(batch.lengths[0]), batch.values.shape[1])]
    )
    turned = same._replace(values=torch.cat([same.values[:1, order], same.values[1:]]))
    assert torch.allclose(net(turned, 0).x, net(same, 0).x, **CLOSE)


def test_an_unknown_code_starts_as_its_type_and_time_alone() -> None:
    torch.manual_seed(0)
    net = CodeEncoder(BY_NAME["events"], config(), 0)
    assert not bool(net.embed_code.weight.base[0].any())
    assert bool(net.embed_code.weight.base[1:].any(1).all())


@pytest.mark.parametrize("cursor", [0, 1])
@pytest.mark.parametrize(("shape", "patches"), [((10, 7, 1), 4), ((20, 33, 3), 16), ((8, 8, 1), 16), ((70, 9, 1), 9)])
def test_pictures_equal_a_loop_over_pixels(shape: tuple[int, int, int], patches: int, cursor: int) -> None:
    h, w, c = shape
    modality = Modality(name="p", kind="image", features=h * w * c, shape=shape)
    net = encoder(modality, width=16, patches=patches)
    assert isinstance(net, ImageEncoder)
    times = torch.tensor([[0.1, 0.7], [0.3, 0.0]])
    batch = part(torch.randn(2, 2, h * w * c), [2, 1], times)
    x, mask = net(batch, cursor)
    cells = x.shape[1] // 2
    assert 1 <= cells <= patches
    assert mask.tolist() == [[True] * 2 * cells, [True] * cells + [False] * cells]
    for i, j in ((0, 0), (0, 1), (1, 0)):
        expected = naive_image(net, batch.values[i, j].view(shape), times[i, j], cursor)
        assert torch.allclose(x[i, j * cells : (j + 1) * cells], expected, **CLOSE)


def test_a_strided_point_wise_convolution_survives_channels_last_and_two_threads() -> None:
    """PyTorch's own writes out of bounds here and takes the process with it, so it runs in one of its own."""
    lines = [
        "import torch",
        "from flame_moe.nn.encoders.convolution import StackedConv",
        "torch.set_num_threads(2)",
        "conv = StackedConv(8, 16, 1, axes=2, stride=2, stage=0)",
        "for n in range(600):",
        "    x = torch.randn(1 + n % 64, 8, 14, 14).to(memory_format=torch.channels_last).requires_grad_()",
        "    conv(x, 0).square().mean().backward()",
        "y = torch.nn.functional.conv2d(x.contiguous(), conv.weight.base.view(16, 8, 1, 1), stride=2)",
        "torch.testing.assert_close(conv(x, 0), y)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_picture_costs_about_the_same_whatever_its_size() -> None:
    sizes = {}
    for side in (64, 128, 500):
        modality = Modality(name="p", kind="image", features=side * side, shape=(side, side, 1))
        net = ENCODERS["image"](modality, config(), 0)
        assert isinstance(net, ImageEncoder)
        sizes[side] = net.stem(torch.randn(1, 1, side, side), 0).shape[-1]
    assert sizes == {64: 32, 128: 64, 500: 63}


@pytest.mark.parametrize("cursor", [0, 1])
def test_signals_equal_a_loop_over_unpadded_ones(cursor: int) -> None:
    net, batch = encoder(Modality(name="w", kind="waveform", features=3), width=16), signals([700, 65, 64, 1], 3)
    assert isinstance(net, WaveformEncoder)
    x, mask = net(batch, cursor)
    assert mask.sum(1).tolist() == [5, 2, 1, 1]
    for i, length in enumerate(batch.lengths.tolist()):
        expected = naive_waveform(net, batch.values[i, :length], cursor)
        assert torch.allclose(x[i, : len(expected)], expected, **CLOSE)


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 400), extra=st.integers(1, 130), seed=st.integers(0, 99))
def test_a_signal_ends_where_it_ends(length: int, extra: int, seed: int) -> None:
    """No boundary of a stride lets anything of the padding into a step that exists."""
    net = encoder(Modality(name="w", kind="waveform", features=2))
    alone = signals([length], 2, seed)
    padded = part(torch.cat([alone.values, torch.full((1, extra, 2), float("nan"))], dim=1), [length])
    short, long = net(alone, 0), net(padded, 0)
    steps = int(short.mask.sum())
    assert int(long.mask.sum()) == steps == min(5, -(-length // 64))
    assert torch.allclose(long.x[:, :steps], short.x[:, :steps], **CLOSE)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), bins=st.integers(1, 12), extra=st.integers(0, 5))
def test_bins_are_means_of_neighbours_that_share_all_steps_out(lengths: list[int], bins: int, extra: int) -> None:
    steps = max(lengths) + extra
    weights = pooling(torch.tensor(lengths), steps, bins)
    assert weights.shape == (len(lengths), min(steps, bins), steps)
    for w, length in zip(weights, lengths, strict=True):
        used = w[w.any(1)]
        assert len(used) == min(length, bins)
        assert torch.allclose(used.sum(1), torch.ones(len(used)))
        assert (w > 0).sum(0).tolist() == [1] * length + [0] * (steps - length)
        sizes = (used > 0).sum(1)
        assert int(sizes.max() - sizes.min()) <= 1
        first = (used > 0).float().argmax(1)
        assert bool((first.diff() > 0).all())


def test_the_masked_norm_is_the_plain_one_on_what_is_there() -> None:
    norm = StackedGroupNorm(16, stage=0)
    x = torch.randn(3, 16, 9)
    lengths = torch.tensor([9, 4, 1])
    mask = torch.arange(9)[None] < lengths[:, None]
    y = norm(x.masked_fill(~mask[:, None], 0.0), 0, mask)
    for i, length in enumerate(lengths.tolist()):
        assert torch.allclose(y[i, :, :length], norm(x[i : i + 1, :, :length], 0)[0], **CLOSE)
    assert not bool(y.masked_select(~mask[:, None]).any())


@pytest.mark.parametrize("name", ["events", "scans", "ecg"])
def test_every_map_of_the_encoder_is_cut_to_the_rank_and_old_cursors_stay(name: str) -> None:
    from flame_moe.continual.truncation import by_weight

    torch.manual_seed(0)
    net, batch = ENCODERS[BY_NAME[name].kind](BY_NAME[name], config(), 0).eval(), full_batch(4).modalities[name]
    before = net(batch, 0).x.detach()
    for _, grown in growables(net):
        grown.grow(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    for _, grown in growables(net):
        grown.commit(by_weight(1))
    matrices = [m for m in net.modules() if isinstance(m, StackedMatrix)]
    assert len(matrices) > 5
    assert all(m.stages == (1,) for m in matrices)
    assert torch.equal(net(batch, 0).x, before)
    assert not torch.allclose(net(batch, 1).x, before)
    again = copy.deepcopy(net)
    assert torch.equal(again(batch, 1).x, net(batch, 1).x)


def test_embeddings_are_not_decayed_and_convolutions_are() -> None:
    for name, decayed in (("events", StackedEmbedding), ("scans", StackedConv)):
        net = ENCODERS[BY_NAME[name].kind](BY_NAME[name], config(), 0)
        with_decay, without = ({id(p) for p in group["params"]} for group in parameter_groups(net, 0.1))
        weights = {id(m.weight.base) for m in net.modules() if isinstance(m, decayed)}
        assert weights
        assert weights <= (without if name == "events" else with_decay)
