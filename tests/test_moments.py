"""Second moments of inputs: what a naive loop over samples, steps and experts sees, and nothing of padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.continual.moments import Moment, gather
from flame_moe.nn.encoders.convolution import StackedConv
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix
from tests.tiny import EVERYTHING, batch_of, flame, full_batch, sample


def naive(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and second moment of single inputs, one after the other."""
    mean, second = torch.zeros_like(rows[0]).double(), torch.zeros(len(rows[0]), len(rows[0])).double()
    for z in rows:
        mean += z.double()
        second += torch.outer(z.double(), z.double())
    return mean / len(rows), second / len(rows)


def close(moment: Moment, which: int, rows: list[Tensor]) -> None:
    mean, second = naive(rows)
    assert int(moment.seen[which]) == len(rows)
    assert torch.allclose(moment.mean[which], mean, atol=1e-5)
    assert torch.allclose(moment.second[which], second, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> Flame:
    return flame(width=8)


@pytest.fixture(scope="module")
def batches() -> list[FlexiBatch]:
    """Ragged samples, some without some modalities."""
    generator = np.random.default_rng(5)
    names = EVERYTHING.modalities
    some = [sample(i, generator, [n for j, n in enumerate(names) if (i + j) % 3]) for i in range(7)]
    return [batch_of(some[:4]), batch_of(some[4:])]


@pytest.fixture(scope="module")
def moments(model: Flame, batches: list[FlexiBatch]) -> dict[str, Moment]:
    return gather(model, batches, 0)


def singles(batches: list[FlexiBatch], name: str) -> Iterator[tuple[FlexiBatch, int, int]]:
    """Batch, row and length of every sequence of a modality."""
    for batch in batches:
        part = batch.modalities[name]
        for row, length in enumerate(part.lengths.tolist()):
            yield batch, row, length


def test_every_matrix_is_seen(model: Flame, moments: dict[str, Moment]) -> None:
    every = {name for name, m in model.named_modules() if isinstance(m, StackedMatrix)}
    assert set(moments) == every


def test_a_linear_map_sees_the_steps_that_exist(batches: list[FlexiBatch], moments: dict[str, Moment]) -> None:
    rows = [b.modalities["image"].values[i, t] for b, i, n in singles(batches, "image") for t in range(n)]
    close(moments["paths.image.encoder.project.weight"], 0, rows)


def test_each_map_of_a_table_sees_its_own_columns(batches: list[FlexiBatch], moments: dict[str, Moment]) -> None:
    found = moments["paths.static.encoder.weight"]
    for p in range(2):
        rows = []
        for batch, i, _ in singles(batches, "static"):
            part = batch.modalities["static"]
            assert part.observed is not None
            seen = bool(part.observed[i, 0, p])
            rows.append(torch.tensor([float(part.values[i, 0, p]) if seen else 0.0, float(seen)]))
        close(found, p, rows)


def test_a_table_of_embeddings_counts_how_often_a_row_is_read(
    batches: list[FlexiBatch], moments: dict[str, Moment]
) -> None:
    codes = [int(b.modalities["events"].values[i, t, 1]) for b, i, n in singles(batches, "events") for t in range(n)]
    found = moments["paths.events.encoder.embed_code.weight"]
    assert found.one_hot
    assert int(found.seen[0]) == len(codes)
    assert found.second[0].tolist() == pytest.approx([codes.count(r) / len(codes) for r in range(7)])


def test_keys_see_the_times_at_which_something_was_observed(model: Flame, batches: list[FlexiBatch]) -> None:
    path = model.paths["vitals"].encoder.irregular
    found = gather(model, batches, 0)["paths.vitals.encoder.irregular.key.weight"]
    rows = []
    for batch, i, length in singles(batches, "vitals"):
        part = batch.modalities["vitals"]
        assert part.times is not None
        assert part.observed is not None
        for t in range(length):
            if bool(part.observed[i, t].any()):
                rows.append(path.embed(part.times[i, t], 0).detach())
    close(found, 0, rows)


@pytest.mark.parametrize("preset", ["residual", "paper", "dense"])
def test_an_expert_sees_only_the_steps_that_are_routed_to_it(preset: str, batches: list[FlexiBatch]) -> None:
    """Against each sequence alone, without padding, expert by expert."""
    model = flame(preset=preset)
    found = gather(model, batches, 0)
    block, pool = model.blocks[0], model.blocks[0].pool
    seen: dict[str, list[list[Tensor]]] = {n: [[] for _ in range(pool.experts)] for n in ("conv", "fc1", "fc2")}
    with torch.no_grad():
        for batch in batches:
            for name in batch.modalities:
                x, mask = model.encode(name, batch.modalities[name], 0)
                for i in range(len(x)):
                    # A step of a type without events is missing in the middle, so the mask is no prefix.
                    a, m = x[i : i + 1], mask[i : i + 1]
                    layer = block.layers[name]
                    attended = layer.attention(layer.before(a, 0), m, 0)
                    z = layer.between(a + attended if model.preset.residual else attended, 0)
                    chosen = range(2) if preset == "dense" else block.routers[name](z, m, 0).chosen[0].tolist()
                    padded = F.pad(z[0].masked_fill(~m[0][:, None], 0.0), (0, 0, 1, 1))
                    for e in chosen:
                        for t in [t for t in range(z.shape[1]) if bool(m[0, t])]:
                            near = padded[t : t + 3].flatten()
                            c = F.gelu(pool.conv.base[e] @ near + pool.conv_bias.at(0)[e])
                            gain, shift = pool.norm_weight.at(0)[e], pool.norm_bias.at(0)[e]
                            h = F.layer_norm(padded[t + 1] + c, (8,), gain, shift)
                            q = F.gelu(pool.fc1.base[e] @ h + pool.fc1_bias.at(0)[e])
                            for n, z_n in (("conv", near), ("fc1", h), ("fc2", q)):
                                seen[n][e].append(z_n)
    for n, by_expert in seen.items():
        for e, rows in enumerate(by_expert):
            moment = found[f"blocks.0.pool.{n}"]
            if rows:
                close(moment, e, rows)
            else:
                assert int(moment.seen[e]) == 0


@pytest.mark.parametrize(("axes", "stride", "kernel"), [(1, 1, 3), (1, 2, 5), (2, 1, 3), (2, 2, 3), (2, 1, 1)])
def test_a_convolution_is_a_matrix_on_what_it_is_said_to_see(axes: int, stride: int, kernel: int) -> None:
    conv = StackedConv(3, 4, kernel, axes=axes, stride=stride, stage=0)
    x = torch.randn(2, 3, *(9, 8)[:axes])
    got = conv.unfolded(x) @ conv.weight.effective(0).T
    assert torch.allclose(got, conv(x, 0).flatten(2).mT, atol=1e-5)


def test_padding_changes_no_moment(model: Flame) -> None:
    whole = full_batch(6)
    generator = np.random.default_rng(0)
    apart = [batch_of([sample(i, generator, EVERYTHING.modalities)]) for i in range(6)]
    one, two = gather(model, [whole], 0), gather(model, apart, 0)
    for name in one:
        # The reference grid of a time attention is read once per batch, not once per sample.
        if "query" in name or "embed" in name:
            continue
        assert torch.equal(one[name].seen, two[name].seen), name
        assert torch.allclose(one[name].second, two[name].second, atol=1e-5), name


def test_gathering_leaves_no_trace(model: Flame, batches: list[FlexiBatch]) -> None:
    with torch.no_grad():
        before = model(batches[0], 0).logits
    model.train()
    gather(model, batches, 0)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batches[0], 0).logits, before)
    assert all(m.observer is None for m in model.modules() if isinstance(m, StackedMatrix))


def test_only_the_named_matrices_are_watched(model: Flame, batches: list[FlexiBatch]) -> None:
    assert set(gather(model, batches, 0, ["blocks.0.pool.fc1"])) == {"blocks.0.pool.fc1"}
