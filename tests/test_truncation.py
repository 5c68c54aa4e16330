"""Truncation: the identities of each mode on explicit inputs, and how ranks are chosen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_moe.continual.moments import Moment
from flame_moe.continual.spectra import Spectrum, by_budget, by_energy, by_inputs, by_singular_values
from flame_moe.continual.truncation import Mode, Plan, by_weight, fresh, truncate
from flame_moe.nn.slices import LowRank, Ragged, balanced, pack
from flame_moe.nn.stacked import StackedMatrix

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
quick = settings(deadline=None, max_examples=30)


def draw(shape: tuple[int, int], seed: int, n: int = 40) -> tuple[Tensor, Tensor]:
    """An update, and inputs with a mean and a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[1]
    mix = torch.randn(width, width, generator=generator).double() * torch.logspace(0, -3, width).double()
    inputs = torch.randn(n, width, generator=generator).double() @ mix.T + torch.randn(width, generator=generator)
    return torch.randn(shape, generator=generator).double(), inputs


def moment(inputs: list[Tensor]) -> Moment:
    """Of the inputs of each matrix of a stack, by the definition."""
    return Moment(
        torch.tensor([float(len(z)) for z in inputs]).double(),
        torch.stack([z.mean(0) for z in inputs]),
        torch.stack([z.T @ z / len(z) for z in inputs]),
    )


def mean_square(matrix: Tensor, inputs: Tensor) -> float:
    """E||matrix z||^2 by a loop over the inputs."""
    return float(np.mean([float((matrix @ z).square().sum()) for z in inputs]))


def spectrum(delta: Tensor, inputs: Tensor, *, centred: bool = False) -> Spectrum:
    return by_inputs(delta, inputs.mean(0), inputs.T @ inputs / len(inputs), centred=centred)


@given(shape=sizes, seed=st.integers(0, 99))
@quick
def test_activation_error_is_the_energy_of_the_tail_on_explicit_inputs(shape: tuple[int, int], seed: int) -> None:
    delta, inputs = draw(shape, seed)
    found = spectrum(delta, inputs)
    assert found.energy == pytest.approx(mean_square(delta, inputs), rel=1e-9)
    for r in range(min(shape) + 1):
        lost = delta - found.at(r).dense()
        assert found.error[r] == pytest.approx(mean_square(lost, inputs), rel=1e-6, abs=1e-9 * found.energy)


@given(shape=sizes, seed=st.integers(0, 99))
@quick
def test_activation_error_is_the_least_possible(shape: tuple[int, int], seed: int) -> None:
    """Eckart and Young for Delta C^(1/2): its singular values tell the least error of every rank."""
    delta, inputs = draw(shape, seed)
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    singular = torch.linalg.svdvals(delta @ root).square()
    found = spectrum(delta, inputs)
    for r in range(min(shape) + 1):
        assert found.error[r] == pytest.approx(float(singular[r:].sum()), rel=1e-5, abs=1e-9 * found.energy)


@given(shape=sizes, seed=st.integers(0, 99))
@quick
def test_activation_is_never_worse_than_weight_in_functional_error(shape: tuple[int, int], seed: int) -> None:
    delta, inputs = draw(shape, seed)
    aware, plain = spectrum(delta, inputs), by_singular_values(delta)
    for r in range(min(shape) + 1):
        by_svd = mean_square(delta - plain.at(r).dense(), inputs)
        assert aware.error[r] <= by_svd + 1e-9 * aware.energy


@given(shape=sizes, seed=st.integers(0, 99))
@quick
def test_equation_2_what_plain_truncation_loses_of_the_function(shape: tuple[int, int], seed: int) -> None:
    """E||(Delta - Delta_r) z||^2 = sum_{k > r} sigma_k^2 v_k^T C v_k."""
    delta, inputs = draw(shape, seed)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    c = inputs.T @ inputs / len(inputs)
    energies = s.square() * ((vh @ c) * vh).sum(1)
    plain = by_singular_values(delta)
    for r in range(len(s) + 1):
        lost = delta - plain.at(r).dense()
        assert plain.error[r] == pytest.approx(float(lost.square().sum()), abs=1e-9)
        assert mean_square(lost, inputs) == pytest.approx(float(energies[r:].sum()), abs=1e-8)
    assert float(u.square().sum()) == pytest.approx(len(s))


@given(shape=sizes, seed=st.integers(0, 99))
@quick
def test_the_bias_takes_the_mean_of_what_is_lost(shape: tuple[int, int], seed: int) -> None:
    delta, inputs = draw(shape, seed)
    plan = Plan(mode="activation", rank=1, centred=True)
    got = truncate({"w": delta}, plan, {"w": moment([inputs])}, biased=["w"])["w"]
    if got.ranks == (None,):
        return
    assert got.shift is not None
    assert isinstance(got.part, LowRank)
    lost = delta - got.part.dense()
    rest = torch.stack([lost @ z for z in inputs]) - got.shift
    assert torch.allclose(rest.mean(0), torch.zeros(shape[0]).double(), atol=1e-9)
    share = float(rest.square().sum(1).mean()) / mean_square(delta, inputs)
    assert got.functional_error == pytest.approx(share**0.5, abs=1e-6)
    plain = truncate({"w": delta}, Plan(mode="activation", rank=1), {"w": moment([inputs])})["w"]
    assert plain.functional_error is not None
    assert got.functional_error <= plain.functional_error + 1e-9
    assert plain.shift is None


@pytest.mark.parametrize(("rows", "width"), [(9, 4), (3, 6)])
def test_a_table_is_truncated_for_the_rows_that_are_read(rows: int, width: int) -> None:
    """The same as explicit one-hot inputs to the transposed map; a row that nobody reads has no say."""
    delta, _ = draw((rows, width), 3)
    picks = torch.randint(0, rows - 1, (50,), generator=torch.Generator().manual_seed(1))
    shares = torch.bincount(picks, minlength=rows).double() / 50
    found = by_inputs(delta, shares, shares)
    hot = torch.nn.functional.one_hot(picks, rows).double()
    for r in range(min(rows, width) + 1):
        lost = delta - found.at(r).dense()
        assert found.error[r] == pytest.approx(mean_square(lost.T, hot), abs=1e-9)
    turned = by_inputs(delta.T.contiguous(), hot.mean(0), hot.T @ hot / 50)
    assert np.allclose(found.error, turned.error, atol=1e-9)


def test_the_default_keeps_the_bits_of_a_plain_truncated_svd() -> None:
    delta = torch.randn(3, 14, 12)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    got = by_weight(2)(delta)
    assert isinstance(got, LowRank)
    assert torch.equal(got.a, (u[..., :2] * s[..., None, :2]).float())
    assert torch.equal(got.b, vh[..., :2, :].float())


@given(seed=st.integers(0, 99), share=st.floats(0.05, 0.999))
@quick
def test_an_energy_target_takes_the_smallest_rank_that_keeps_it(seed: int, share: float) -> None:
    delta, inputs = draw((20, 20), seed)
    found = spectrum(delta, inputs)
    (rank,) = by_energy([found], share)
    enough = [r for r in range(21) if found.error[r] <= (1 - share) * found.energy]
    # From rank 10 on, 20 x 20 numbers are no more than the factors.
    assert rank == (enough[0] if enough[0] < 10 else None)


def _no_factors(rank: int) -> LowRank:
    raise AssertionError("a choice of ranks needs no factors")


def line(shape: tuple[int, int], saved: list[float], worth: float = 1.0) -> Spectrum:
    """A spectrum whose directions save this much."""
    error = np.append(np.cumsum(np.array(saved)[::-1])[::-1], 0.0)
    return Spectrum(shape, _no_factors, error, float(error[0]), worth)


def lost(spectra: list[Spectrum], ranks: tuple[int | None, ...] | list[int | None]) -> float:
    return sum(s.worth * (0.0 if r is None else float(s.error[r])) for s, r in zip(spectra, ranks, strict=True))


def brute(spectra: list[Spectrum], budget: int) -> float:
    """The least error of all combinations of ranks that fit."""
    options = [[*(r for r in range(len(s.error)) if s.sensible(r) == r), None] for s in spectra]
    fits = [c for c in itertools.product(*options) if sum(s.cost(r) for s, r in zip(spectra, c, strict=True)) <= budget]
    return min(lost(spectra, c) for c in fits)


falling = st.lists(st.floats(0.0, 9.0, allow_subnormal=False), min_size=6, max_size=6).map(
    lambda x: sorted(x, reverse=True)
)


@given(saved=st.lists(falling, min_size=1, max_size=3), budget=st.integers(0, 60), worth=st.floats(0.1, 5.0))
@quick
def test_a_budget_is_spent_as_well_as_can_be_where_steps_cost_the_same(
    saved: list[list[float]], budget: int, worth: float
) -> None:
    """Matrices of one shape, no dense update fits: against all combinations."""
    spectra = [line((20, 20), [*s, *[0.0] * 14], worth if i else 1.0) for i, s in enumerate(saved)]
    ranks = by_budget(spectra, budget * 6)
    assert sum(s.cost(r) for s, r in zip(spectra, ranks, strict=True)) <= budget * 6
    assert lost(spectra, ranks) == pytest.approx(brute(spectra, budget * 6))


@given(saved=st.lists(falling, min_size=2, max_size=3), budget=st.integers(0, 130))
@quick
def test_a_budget_over_different_shapes_is_within_one_step_of_the_best(saved: list[list[float]], budget: int) -> None:
    shapes = [(6, 6), (6, 9), (12, 6)]
    spectra = [line(shape, s) for shape, s in zip(shapes, saved, strict=False)]
    ranks = by_budget(spectra, budget)
    assert sum(s.cost(r) for s, r in zip(spectra, ranks, strict=True)) <= budget
    step = max(s.cost(None) for s in spectra)
    assert lost(spectra, ranks) <= brute(spectra, max(0, budget - step)) + 1e-9
    assert lost(spectra, by_budget(spectra, sum(s.cost(None) for s in spectra))) == 0.0


def test_a_budget_is_not_spent_for_nothing() -> None:
    spectra = [line((20, 20), [5.0, 1.0, *[0.0] * 18]), line((20, 20), [0.0] * 20)]
    assert by_budget(spectra, 10_000) == [2, 0]


def test_a_budget_below_one_is_a_share_of_the_dense_updates() -> None:
    deltas = {"w": torch.randn(4, 16, 16), "v": torch.randn(10, 30)}
    dense = 4 * 16 * 16 + 10 * 30
    for budget, most in ((0.25, dense // 4), (700, 700), (0.001, 0)):
        got = truncate(deltas, Plan(keep="budget", budget=budget))
        stored = sum(t.numel() for k in got.values() if isinstance(k.part, tuple) for t in k.part if torch.is_tensor(t))
        assert stored <= most


def felt_alike(
    deltas: dict[str, Tensor], moments: dict[str, Moment], costs: dict[str, list[float]]
) -> dict[str, Tensor]:
    """Squared gradients with which an error in any output of matrix e of a weight costs costs[weight][e]."""
    found = {}
    for n, d in deltas.items():
        pairs = zip(costs[n], moments[n].second, strict=True)
        found[n] = torch.stack([torch.full((d.shape[-2],), c).double() * m.trace() for c, m in pairs])
    return found


@pytest.mark.parametrize("mode", ["activation", "loss"])
def test_a_shared_budget_goes_where_errors_cost_the_loss(mode: Mode) -> None:
    """Two experts with like updates and inputs, of which one is felt 99 times as much; a third is not felt at all."""
    deltas = {"w": torch.stack([torch.eye(12), torch.eye(12)]).double(), "v": 100 * torch.eye(12)[None].double()}
    moments = {"w": moment([draw((12, 12), 1, 500)[1], draw((12, 12), 2, 500)[1]])}
    moments["v"] = moment([draw((12, 12), 3, 500)[1]])
    squares = felt_alike(deltas, moments, {"w": [0.99, 0.01], "v": [0.0]})
    got = truncate(deltas, Plan(mode=mode, keep="budget", budget=24 * 4), moments, squares=squares)
    assert got["v"].ranks == (0,)
    first, second = got["w"].ranks
    assert first is not None
    assert second is not None
    assert first > second
    assert first + second == 4


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_loss_error_is_the_felt_energy_of_what_is_lost_and_the_least_possible(
    shape: tuple[int, int], seed: int
) -> None:
    delta, inputs = draw(shape, seed)
    felt = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)).double() + 0.05
    own = moment([inputs])
    found = by_inputs(delta, own.mean[0], own.second[0], felt=felt)
    plain = by_inputs(delta, own.mean[0], own.second[0])
    root = felt.sqrt()[:, None]
    best = torch.linalg.svdvals(root * (delta @ inputs.T) / len(inputs) ** 0.5).square()
    for rank in range(min(shape)):
        cost = mean_square(root * (delta - found.at(rank).dense()), list(inputs))
        assert cost == pytest.approx(float(found.error[rank]), rel=1e-6, abs=1e-9)
        assert cost == pytest.approx(float(best[rank:].sum()), rel=1e-6, abs=1e-9)
        assert cost <= mean_square(root * (delta - plain.at(rank).dense()), list(inputs)) + 1e-9
    torch.testing.assert_close(found.at(min(shape)).dense(), delta, atol=1e-8, rtol=1e-8)


def test_outputs_that_the_loss_does_not_feel_are_given_up_first() -> None:
    """A diagonal update of equal sizes: `activation` cannot tell outputs apart, `loss` keeps those that are felt."""
    deltas = {"w": torch.eye(6).double()[None]}
    moments = {"w": Moment(torch.tensor([100.0]).double(), torch.zeros(1, 6).double(), torch.eye(6)[None].double())}
    squares = {"w": torch.tensor([[0.0, 5.0, 0.0, 4.0, 0.0, 0.0]]).double()}
    kept = truncate(deltas, Plan(mode="loss", rank=2), moments, squares=squares)["w"].part
    assert isinstance(kept, LowRank)
    assert kept.dense()[0].diagonal().tolist() == pytest.approx([0, 1, 0, 1, 0, 0], abs=1e-9)


def test_a_table_keeps_the_columns_that_are_felt() -> None:
    deltas = {"w": torch.eye(4).double()[None, :, :3]}
    shares = torch.full((1, 4), 0.25).double()
    moments = {"w": Moment(torch.tensor([8.0]).double(), shares, shares)}
    squares = {"w": torch.tensor([[0.0, 7.0, 0.0]]).double()}
    kept = truncate(deltas, Plan(mode="loss", rank=1), moments, squares=squares)["w"].part
    assert isinstance(kept, LowRank)
    expected = torch.zeros(4, 3).double()
    expected[1, 1] = 1.0
    torch.testing.assert_close(kept.dense()[0], expected, atol=1e-9, rtol=0)


def test_a_matrix_that_saw_no_input_keeps_nothing_for_an_energy_and_its_largest_directions_for_a_rank() -> None:
    delta, inputs = draw((12, 12), 2)
    seen = moment([inputs, inputs])
    blind = Moment(torch.tensor([40.0, 0.0]), seen.mean, seen.second)
    deltas = {"w": torch.stack([delta, delta])}
    plan = Plan(mode="activation", keep="energy", energy=0.9)
    first, second = truncate(deltas, plan, {"w": blind})["w"].ranks
    assert first != 0
    assert second == 0
    got = truncate(deltas, Plan(mode="activation", rank=2), {"w": blind})["w"].part
    svd = by_weight(2)(delta)
    assert isinstance(got, LowRank)
    assert isinstance(svd, LowRank)
    assert torch.allclose(got.dense()[1], svd.dense())


def ragged() -> StackedMatrix:
    """A stack of four with an update of rank 1, nothing, dense, rank 2."""
    matrix = StackedMatrix(4, 7, 6)
    matrix.grow(1)
    a, b = torch.randn(7, 3), torch.randn(3, 6)
    parts = [LowRank(a[:, :1], b[:1]), None, torch.randn(7, 6), LowRank(a[:, 1:], b[1:])]
    matrix.compress(pack(parts, matrix.shape))
    return matrix


def test_experts_of_a_stack_may_have_different_ranks_and_only_live_numbers_are_stored() -> None:
    matrix = ragged()
    update = matrix.update()
    assert isinstance(update, Ragged)
    assert update.ranks == (1, 0, None, 2)
    expected = matrix.base.detach().clone()
    expected[0] += update.a[:, :1] @ update.b[:1]
    expected[2] += update.whole[0]
    expected[3] += update.a[:, 1:] @ update.b[1:]
    before = matrix.effective(1)
    assert torch.allclose(before, expected)
    matrix.commit()
    assert torch.equal(matrix.effective(1), before)
    assert torch.equal(matrix.effective(0), matrix.base)
    assert sum(b.numel() for b in matrix.buffers()) == 3 * (7 + 6) + 7 * 6
    twin = StackedMatrix(4, 7, 6)
    twin.restore(matrix.structure())
    twin.load_state_dict(matrix.state_dict(), strict=True)
    assert torch.equal(twin.effective(1), before)


def test_an_update_in_factors_trains_and_survives_a_restore() -> None:
    matrix = ragged()
    assert {n for n, p in matrix.named_parameters() if p.requires_grad} == {"delta_a", "delta_b", "delta_dense"}
    matrix.effective(1).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in matrix.active())
    assert matrix.base.grad is None
    twin = StackedMatrix(4, 7, 6)
    twin.restore(matrix.structure())
    twin.load_state_dict(matrix.state_dict(), strict=True)
    assert torch.equal(twin.effective(1), matrix.effective(1))
    with pytest.raises(RuntimeError, match="still being learned"):
        matrix.grow(2)


def test_a_cursor_keeps_its_bits_whatever_forms_later_updates_take() -> None:
    matrix = ragged()
    seen = {0: matrix.effective(0).clone(), 1: matrix.effective(1).detach().clone()}
    matrix.commit()
    for stage, rank in ((2, 1), (3, None), (4, 2)):
        matrix.grow(stage)
        with torch.no_grad():
            matrix.active()[0].copy_(torch.randn(4, 7, 6))
        matrix.compress(by_weight(rank)(matrix.update()))
        seen[stage] = matrix.effective(stage).detach().clone()
        matrix.commit()
        for cursor, before in seen.items():
            assert torch.equal(matrix.effective(cursor), before)


def test_a_fresh_low_rank_update_changes_nothing_and_can_train() -> None:
    matrix = StackedMatrix(2, 9, 8)
    matrix.grow(1)
    matrix.compress(fresh(matrix.shape, 2))
    assert torch.equal(matrix.effective(1), matrix.base)
    (torch.randn(5, 8) @ matrix.effective(1).mT).square().sum().backward()
    assert matrix.active()[0].grad is not None
    assert bool(matrix.active()[0].grad.any())
    assert torch.is_tensor(fresh(matrix.shape, 5))


def test_balancing_factors_changes_no_product() -> None:
    matrix = ragged()
    update = matrix.update()
    assert isinstance(update, Ragged)
    even = balanced(update)
    assert isinstance(even, Ragged)
    assert torch.allclose(even.dense(), update.dense(), atol=1e-6)
    assert torch.allclose(even.a.norm(dim=0), even.b.norm(dim=1))
    flat = balanced(LowRank(torch.zeros(2, 5, 3), torch.randn(2, 3, 4)))
    assert isinstance(flat, LowRank)
    assert bool(torch.isfinite(flat.b).all())


@pytest.mark.parametrize("rank", [2, 9])
def test_a_base_may_be_cut_to_factors_and_grow_on(rank: int) -> None:
    matrix = StackedMatrix(3, 12, 10)
    u, s, vh = torch.linalg.svd(matrix.base.detach().double(), full_matrices=False)
    cut = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
    matrix.base.requires_grad_(False)
    matrix.cut_base(by_weight(rank))
    before = matrix.effective(0).clone()
    stored = sum(t.numel() for t in matrix.state_dict().values())
    if rank == 9:
        # The factors would cost 9 * 22 of 120 numbers.
        assert matrix.stages == ()
        assert stored == 3 * 12 * 10
    else:
        assert torch.allclose(before.double(), cut, atol=1e-6)
        assert stored == 3 * 2 * (12 + 10)
    matrix.grow(1)
    assert torch.equal(matrix.effective(1), before)
    with torch.no_grad():
        matrix.active()[0].normal_()
    matrix.commit(by_weight(1))
    assert torch.equal(matrix.effective(0), before)
    twin = StackedMatrix(3, 12, 10)
    twin.restore(matrix.structure())
    twin.load_state_dict(matrix.state_dict(), strict=True)
    assert all(torch.equal(twin.effective(c), matrix.effective(c)) for c in (0, 1))
