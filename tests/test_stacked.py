"""Weights that grow: paper Eq. 3-4 and the promises that make forgetting impossible."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flame_moe.continual.truncation import by_weight
from flame_moe.nn.layers import StackedLinear, StackedNorm
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import StackedMatrix, StageVector, growables

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6)) | st.tuples(*[st.integers(1, 4)] * 3)


def learn(matrix: StackedMatrix, stage: int, rank: int | None, seed: int = 0) -> Tensor:
    """One stage: a random update, committed; returns the update."""
    generator = torch.Generator().manual_seed(1000 * seed + stage)
    matrix.grow(stage)
    assert matrix.delta is not None
    update = torch.randn(matrix.base.shape, generator=generator)
    with torch.no_grad():
        matrix.delta.copy_(update)
    matrix.commit(by_weight(rank))
    return update


@given(shape=shapes, stage=st.integers(1, 9))
@settings(deadline=None)
def test_appending_a_stage_changes_nothing_until_it_is_trained(shape: tuple[int, ...], stage: int) -> None:
    matrix = StackedMatrix(*shape)
    before = matrix.effective(stage).clone()
    matrix.grow(stage)
    for cursor in (0, stage - 1, stage, stage + 1):
        assert torch.equal(matrix.effective(cursor), before)
    matrix.commit(by_weight(1))
    assert torch.equal(matrix.effective(stage), before)
    assert matrix.stages == ()
    assert set(matrix.state_dict()) == {"base"}


@given(shape=shapes, extra=st.integers(0, 3))
@settings(deadline=None)
def test_a_rank_of_at_least_the_smaller_side_is_lossless(shape: tuple[int, ...], extra: int) -> None:
    matrix = StackedMatrix(*shape)
    full = matrix.base + learn(matrix, 1, min(shape[-2:]) + extra)
    assert torch.equal(matrix.effective(1), full)


def test_equation_4_base_plus_slices_up_to_the_cursor() -> None:
    matrix = StackedMatrix(3, 12, 10)
    for stage in (1, 2, 5):
        learn(matrix, stage, 2)
    assert torch.equal(matrix.effective(0), matrix.base)
    for cursor, stages in ((1, (1,)), (2, (1, 2)), (4, (1, 2)), (5, (1, 2, 5)), (9, (1, 2, 5))):
        slices = [matrix.slice(s) for s in stages]
        assert all(isinstance(part, LowRank) for part in slices)
        expected = matrix.base + sum(part.a @ part.b for part in slices if isinstance(part, LowRank))
        assert torch.allclose(matrix.effective(cursor), expected, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 2, None])
def test_a_cursor_reads_the_same_bits_after_every_later_stage(rank: int | None) -> None:
    matrix = StackedMatrix(2, 9, 8)
    seen = {0: matrix.effective(0).clone()}
    for stage in range(1, 5):
        learn(matrix, stage, rank)
        seen[stage] = matrix.effective(stage).clone()
        for cursor, before in seen.items():
            assert torch.equal(matrix.effective(cursor), before)


def test_an_update_in_progress_is_read_only_by_its_own_stage() -> None:
    matrix = StackedMatrix(4, 3)
    matrix.grow(2)
    assert matrix.delta is not None
    with torch.no_grad():
        matrix.delta.fill_(1.0)
    assert torch.equal(matrix.effective(1), matrix.base)
    assert torch.equal(matrix.effective(2), matrix.base + 1.0)


def test_only_the_update_gets_a_gradient() -> None:
    matrix = StackedMatrix(4, 3)
    learn(matrix, 1, 1)
    matrix.grow(2)
    (torch.randn(5, 3) @ matrix.effective(2).T).square().sum().backward()
    assert matrix.delta is not None
    assert matrix.delta.grad is not None
    assert bool(matrix.delta.grad.any())
    assert [name for name, p in matrix.named_parameters() if p.grad is not None] == ["delta"]
    assert not any(b.requires_grad for b in matrix.buffers())


@given(out=st.integers(4, 12), width=st.integers(4, 12), rank=st.integers(1, 3))
@settings(deadline=None)
def test_a_slice_costs_r_times_m_plus_n_or_less(out: int, width: int, rank: int) -> None:
    matrix = StackedMatrix(out, width)
    learn(matrix, 1, rank)
    stored = sum(b.numel() for b in matrix.buffers())
    assert stored == min(rank * (out + width), out * width)


def test_a_stage_that_left_the_weight_alone_costs_nothing() -> None:
    matrix = StackedMatrix(6, 5)
    learn(matrix, 1, 0)
    assert matrix.stages == ()
    learn(matrix, 4, 2)
    assert matrix.stages == (4,)
    assert sum(t.numel() for t in matrix.state_dict().values()) == 6 * 5 + 2 * (6 + 5)
    with pytest.raises(KeyError):
        matrix.slice(1)


@given(seed=st.integers(0, 50), rank=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_equation_3_the_error_of_a_commit_is_the_energy_of_the_tail(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = StackedMatrix(2, 16, 14)
    matrix.grow(1)
    assert matrix.delta is not None
    with torch.no_grad():
        matrix.delta.copy_(torch.randn(2, 16, 14, generator=generator))
    singular = torch.linalg.svdvals(matrix.delta.detach().double())
    tail = (singular[:, rank:].square().sum() / singular.square().sum()).sqrt()
    error = matrix.commit(by_weight(rank))
    assert error == pytest.approx(float(tail), rel=1e-4)


def test_rank_zero_reports_that_everything_was_lost() -> None:
    matrix = StackedMatrix(6, 5)
    matrix.grow(1)
    assert matrix.delta is not None
    with torch.no_grad():
        matrix.delta.fill_(1.0)
    assert matrix.commit(by_weight(0)) == 1.0


class Pair(nn.Module):
    """Two layers around a norm, to save and restore as one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = (
            StackedLinear(6, 8, stage=0),
            StackedNorm(8, stage=0),
            StackedLinear(8, 6, stage=0),
        )

    def forward(self, x: Tensor, cursor: int) -> Tensor:
        return self.two(self.norm(self.one(x, cursor), cursor), cursor)


def trained_pair() -> Pair:
    torch.manual_seed(3)
    pair = Pair()
    for stage in (1, 2):
        for _, part in growables(pair):
            part.grow(stage)
        with torch.no_grad():
            for parameter in pair.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        for _, part in growables(pair):
            part.commit(by_weight(1 if stage == 1 else None))
    return pair


CHANGES = {
    "write to the base": lambda m: m.base.mul_(2.0),
    "write to a slice": lambda m: m.get_buffer("slice1_a").mul_(2.0),
    "load_state_dict": lambda m: m.load_state_dict({k: t * 2 for k, t in m.state_dict().items()}),
    "load_state_dict by assignment": lambda m: m.load_state_dict(
        {k: t * 2 for k, t in m.state_dict().items()}, assign=True
    ),
    "another type": lambda m: m.double(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_cache_is_never_stale(change: str) -> None:
    matrix = StackedMatrix(9, 8)
    learn(matrix, 1, 2)
    matrix.effective(1)
    with torch.no_grad():
        CHANGES[change](matrix)
    part = matrix.slice(1)
    assert isinstance(part, LowRank)
    assert torch.equal(matrix.effective(1), matrix.base + part.a @ part.b)


def test_a_copy_shares_nothing_with_its_original() -> None:
    matrix = StackedMatrix(9, 8)
    learn(matrix, 1, 2)
    before = matrix.effective(1).clone()
    twin = copy.deepcopy(matrix)
    with torch.no_grad():
        twin.base.add_(1.0)
    assert torch.equal(matrix.effective(1), before)
    assert not torch.equal(twin.effective(1), before)


def test_what_was_read_while_predicting_can_be_trained_through_later() -> None:
    matrix = StackedMatrix(9, 8)
    learn(matrix, 1, 2)
    with torch.inference_mode():
        matrix.effective(1)
    x = torch.randn(3, 8, requires_grad=True)
    (x @ matrix.effective(1).T).sum().backward()
    assert x.grad is not None


def test_the_cache_is_no_part_of_the_state() -> None:
    matrix = StackedMatrix(9, 8)
    learn(matrix, 1, 2)
    before = set(matrix.state_dict())
    matrix.effective(1)
    assert set(matrix.state_dict()) == before == {"base", "slice1_a", "slice1_b"}


def test_structure_and_state_dict_bring_everything_back() -> None:
    pair, fresh = trained_pair(), Pair()
    structures = {name: part.structure() for name, part in growables(pair)}
    for name, part in growables(fresh):
        part.restore(structures[name])
    fresh.load_state_dict(pair.state_dict(), strict=True)
    x = torch.randn(4, 6)
    for cursor in (0, 1, 2, 7):
        assert torch.equal(fresh(x, cursor), pair(x, cursor))
    assert not any(p.requires_grad for p in fresh.parameters())


def test_an_update_in_progress_survives_a_restore() -> None:
    matrix, fresh = StackedMatrix(4, 3), StackedMatrix(4, 3)
    matrix.grow(1)
    assert matrix.delta is not None
    with torch.no_grad():
        matrix.delta.fill_(0.5)
    fresh.restore(matrix.structure())
    fresh.load_state_dict(matrix.state_dict(), strict=True)
    assert torch.equal(fresh.effective(1), matrix.effective(1))


def test_small_vectors_have_one_copy_per_stage_that_changed_them() -> None:
    vector = StageVector(torch.arange(3.0))
    vector.grow(1)
    assert torch.equal(vector.at(1), vector.at(0))
    vector.commit(by_weight(1))
    assert vector.structure() == {"stages": [0]}
    vector.grow(2)
    with torch.no_grad():
        vector.at(2).add_(1.0)
    vector.commit(by_weight(1))
    assert torch.equal(vector.at(1), torch.arange(3.0))
    assert torch.equal(vector.at(2), torch.arange(3.0) + 1.0)
    assert torch.equal(vector.at(9), vector.at(2))
    assert not any(p.requires_grad for p in vector.parameters())


def test_only_the_newest_copy_of_a_vector_trains() -> None:
    vector = StageVector(torch.ones(3))
    vector.grow(1)
    assert [name for name, p in vector.named_parameters() if p.requires_grad] == ["copies.1"]


def test_stages_come_in_order_and_one_at_a_time() -> None:
    matrix = StackedMatrix(4, 3)
    learn(matrix, 3, None)
    with pytest.raises(RuntimeError, match="does not come after stage 3"):
        matrix.grow(2)
    matrix.grow(4)
    with pytest.raises(RuntimeError, match="still being learned"):
        matrix.grow(5)
