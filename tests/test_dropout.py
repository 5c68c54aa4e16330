"""Dropout from cheap bits drops at its rate, keeps the expectation and follows PyTorch's generator."""

from __future__ import annotations

import pytest
import torch

from flame_moe.nn.dropout import dropout, keep_bits, keep_mask, scale_of


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.8])
def test_the_share_dropped_is_the_rate_and_the_mean_stays(rate: float) -> None:
    torch.manual_seed(0)
    mask = keep_mask(torch.Size([400_001]), rate, torch.zeros(1))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=1e-4)
    assert float((mask == 0).float().mean()) == pytest.approx(rate, abs=4e-3)
    assert float(mask.mean()) == pytest.approx(1.0, abs=1e-2)


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = keep_bits(torch.Size([400_000]), 0.3, torch.device("cpu")).float() - 0.7
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 2e-3


def test_everything_or_nothing_is_dropped_at_the_ends() -> None:
    x = torch.ones(7, 3)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x
    assert not bool(dropout(x, 1.0).any())
    assert scale_of(1.0) == 1.0
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)


def test_the_generator_decides_and_the_gradient_is_the_mask() -> None:
    x = torch.randn(11, 5, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.4))
    first.sum().backward()
    torch.manual_seed(3)
    assert x.grad is not None
    assert torch.equal(x.grad, keep_mask(x.shape, 0.4, x))
