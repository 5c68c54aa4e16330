"""Encoders against plain loops, and the promise that absent values have no influence and no gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_moe.batch import ModalityBatch
from flame_moe.nn.encoders import ENCODERS, PatchEncoder, SeriesEncoder, TableEncoder
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.series import regular_grid
from flame_moe.nn.encoders.time_attention import TimeAttention, TimeEmbedding, time_attention
from flame_moe.schema import Modality
from tests.reference import naive_grid, naive_time_attention
from tests.tiny import BY_NAME, config, full_batch

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)


def series(n: int, length: int, channels: int, seed: int, *, density: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Values, sorted times and observed flags."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, length, channels, generator=generator)
    times = torch.rand(n, length, generator=generator).sort(1).values
    return values, times, torch.rand(n, length, channels, generator=generator) < density


def attend(scores: Tensor, values: Tensor, observed: Tensor) -> Tensor:
    """`time_attention` with scores (n, h, T, L) -> (n, h, T, C)."""
    z = time_attention(scores.flatten(1, 2).mT, values, observed)
    return z.unflatten(1, scores.shape[1:3])


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 2),
    steps=st.integers(1, 4),
    length=st.integers(1, 6),
    channels=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_factorised_time_attention_equals_the_expanded_form(
    n: int, heads: int, steps: int, length: int, channels: int, scale: float, density: float, seed: int
) -> None:
    values, _, observed = series(n, length, channels, seed, density=density)
    scores = scale * torch.randn(n, heads, steps, length, generator=torch.Generator().manual_seed(seed + 1))
    got = attend(scores, values, observed)
    assert torch.allclose(got, naive_time_attention(scores, values, observed), atol=1e-5, rtol=1e-4)


def test_a_channel_that_was_never_observed_reads_zero() -> None:
    values, _, observed = series(2, 5, 3, 0)
    observed[:, :, 1] = False
    assert not bool(time_attention(torch.randn(2, 5, 8), values, observed)[..., 1].any())


def test_scores_far_below_the_best_key_still_give_a_finite_mean() -> None:
    scores = torch.tensor([[[0.0], [-500.0], [-501.0]]], requires_grad=True)
    values = torch.tensor([[[1.0, 9.0], [9.0, 2.0], [9.0, 4.0]]])
    observed = torch.tensor([[[True, False], [False, True], [False, True]]])
    z = time_attention(scores, values, observed)
    z.sum().backward()
    assert float(z.detach()[0, 0, 0]) == pytest.approx(1.0)
    assert 2.0 <= float(z.detach()[0, 0, 1]) <= 4.0
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


@pytest.mark.parametrize("height", [0.0, 200.0])
def test_keys_that_are_not_there_give_no_gradient_however_high_they_score(height: float) -> None:
    values, _, observed = series(2, 5, 3, 0)
    observed[0] = False
    observed[1, 3:] = False
    scores = torch.randn(2, 5, 4)
    scores[1, 3:] += height
    scores.requires_grad_()
    time_attention(scores, values, observed).square().sum().backward()
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())
    assert not bool(scores.grad[0].any())
    assert not bool(scores.grad[1, 3:].any())


def test_time_embedding_is_linear_then_sines() -> None:
    embed = TimeEmbedding(4, stage=0)
    w, b = embed.weight.base[:, 0].tolist(), embed.bias.at(0).tolist()
    t = 0.3
    expected = [w[0] * t + b[0], *(math.sin(w[i] * t + b[i]) for i in (1, 2, 3))]
    assert embed(torch.tensor(t), 0).tolist() == pytest.approx(expected, abs=1e-5)


def test_heads_of_time_attention_are_concatenated_and_mapped() -> None:
    torch.manual_seed(0)
    net = TimeAttention(3, 8, 5, 2, 4, 0.0, stage=0)
    values, times, observed = series(2, 6, 3, 0)
    q = net.query(net.embed(net.grid, 0), 0)
    k = net.key(net.embed(times, 0), 0)
    scores = torch.stack([q[:, 2 * h : 2 * h + 2] @ k[:, :, 2 * h : 2 * h + 2].mT / math.sqrt(2) for h in (0, 1)], 1)
    z = naive_time_attention(scores, values, observed)
    ever = observed.any(1)[:, None, :].expand(2, 5, 3).float()
    expected = net.out(torch.cat([z[:, 0], z[:, 1], ever], -1), 0)
    assert torch.allclose(net(values, times, observed, 0), expected, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 3),
    length=st.integers(1, 8),
    channels=st.integers(1, 3),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
    late=st.booleans(),
)
def test_the_regular_grid_equals_a_plain_loop(
    n: int, length: int, channels: int, steps: int, seed: int, late: bool
) -> None:
    values, times, observed = series(n, length, channels, seed)
    if late:
        times = times * 1.5
        times[:, -1] = 1.0 if length == 1 else 2.0
    assert torch.equal(regular_grid(values, times, observed, steps), naive_grid(values, times, observed, steps))


def test_a_value_of_zero_is_observed_and_carried() -> None:
    values, times = torch.tensor([[[5.0], [0.0]]]), torch.tensor([[0.0, 0.5]])
    grid = regular_grid(values, times, torch.ones(1, 2, 1, dtype=torch.bool), 4)
    assert grid[0].tolist() == [[5.0, 1.0], [5.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def encoder(name: str, **changes: object) -> Encoder:
    torch.manual_seed(0)
    return ENCODERS[BY_NAME[name].kind](BY_NAME[name], config(**changes), 0).eval()


def dirty(part: ModalityBatch, garbage: float) -> ModalityBatch:
    """The batch with garbage in every cell that is absent: beyond a length, or not observed."""
    there = part.mask[..., None].expand_as(part.values) if part.observed is None else part.observed
    return part._replace(values=torch.where(there, part.values, garbage))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_the_content_of_absent_cells_has_no_influence_and_exactly_no_gradient(name: str, garbage: float) -> None:
    net, part = encoder(name), full_batch(5).modalities[name]
    clean, filled = net(part, 0), dirty(part, garbage)
    absent = torch.zeros_like(part.values, dtype=torch.bool) if name == "image" else ~torch.isfinite(filled.values)
    absent = (filled.values != part.values) | absent
    assert bool(absent.any())
    leaf = filled.values.clone().requires_grad_()
    x, mask = net(filled._replace(values=leaf), 0)
    assert torch.equal(x[mask], clean.x[clean.mask])
    x[mask].square().sum().backward()
    assert (leaf.grad is None) == (BY_NAME[name].kind == "codes")
    if leaf.grad is not None:
        assert not bool(leaf.grad[absent].any())
        assert bool(leaf.grad[~absent].any())
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name, m in BY_NAME.items() if m.has_times])
def test_times_of_padding_have_no_influence(name: str) -> None:
    net, part = encoder(name), full_batch(5).modalities[name]
    assert part.times is not None
    moved = part._replace(times=torch.where(part.mask, part.times, 0.9))
    assert torch.allclose(net(moved, 0).x, net(part, 0).x, atol=1e-6)


def test_a_modality_without_a_single_observed_cell_stays_finite() -> None:
    net, part = encoder("vitals").train(), full_batch(3).modalities["vitals"]
    assert part.observed is not None
    part.observed[1] = False
    x, _ = net(part, 0)
    x.square().sum().backward()
    assert bool(torch.isfinite(x).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)


def test_the_series_encoder_mixes_its_two_paths() -> None:
    net, part = encoder("vitals"), full_batch(4).modalities["vitals"]
    assert isinstance(net, SeriesEncoder)
    assert part.times is not None
    assert part.observed is not None
    irregular = net.irregular(part.values, part.times, part.observed, 0)
    regular = net.regular(regular_grid(part.values, part.times, part.observed, net.steps), 0)
    both = torch.cat([irregular.max(1).values, regular.max(1).values], -1)
    g = torch.sigmoid(net.mix(torch.relu(net.mix_hidden(both, 0)), 0))[:, :, None]
    assert torch.allclose(net(part, 0).x, g * irregular + (1 - g) * regular, atol=1e-6)


def test_patches_keep_their_steps_and_lengths() -> None:
    net, part = encoder("image"), full_batch(5).modalities["image"]
    assert isinstance(net, PatchEncoder)
    x, mask = net(part, 0)
    assert torch.equal(mask, part.mask)
    for i, length in enumerate(part.lengths.tolist()):
        for t in range(length):
            assert torch.allclose(x[i, t], net.project(part.values[i, t], 0), atol=1e-6)


@given(features=st.integers(1, 23), patches=st.integers(1, 30), preset=st.sampled_from(["residual", "paper"]))
@settings(deadline=None, max_examples=40)
def test_every_column_of_a_table_is_in_exactly_one_patch(features: int, patches: int, preset: str) -> None:
    modality = Modality(name="labs", kind="table", features=features)
    net = TableEncoder(modality, config(patches=patches, preset=preset), 0).eval()
    values = torch.randn(1, 1, features)
    part = ModalityBatch(torch.tensor([0]), values, torch.tensor([1]), None, torch.ones_like(values, dtype=torch.bool))
    before = net(part, 0).x[0]
    assert 1 <= len(before) <= min(patches, features)
    assert len(before) * math.ceil(features / len(before)) >= features
    touched = []
    for column in range(features):
        changed = values.clone()
        changed[0, 0, column] += 1.0
        moved = (net(part._replace(values=changed), 0).x[0] != before).any(1).nonzero().flatten().tolist()
        assert len(moved) == 1
        touched += moved
    assert touched == sorted(touched)
    assert set(touched) == set(range(len(before)))


def test_a_missing_cell_of_a_table_differs_from_one_at_the_mean() -> None:
    net = encoder("static")
    values = torch.zeros(1, 1, 2)
    part = ModalityBatch(torch.tensor([0]), values, torch.tensor([1]), None, torch.ones_like(values, dtype=torch.bool))
    missing = part._replace(observed=torch.tensor([[[True, False]]]))
    assert not torch.equal(net(part, 0).x, net(missing, 0).x)
