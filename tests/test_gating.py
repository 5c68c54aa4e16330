"""Routing, one test per equation: gates, noisy top-k, load, balance, interaction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_moe.nn.gating import GATES, Router, Routing, choose, laplace_logits, noisy_top_k
from flame_moe.nn.losses import balance_loss, interaction_loss, squared_variation
from flame_moe.nn.pooling import last_step, masked_mean, temporal_attention_pool
from tests.reference import naive_interaction, normal_cdf


def logits(n: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(seed))


def router(gate: str = "laplace", experts: int = 4, k: int = 2, *, zero: bool = False) -> Router:
    torch.manual_seed(0)
    made = Router(6, experts, k, gate, zero=zero)
    made.add_head(0)
    return made


def test_equation_1_temporal_attention_pooling() -> None:
    x, query = torch.randn(2, 4, 6), torch.randn(6)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    for i, length in enumerate((4, 2)):
        scores = [float(x[i, t] @ query) / math.sqrt(6) for t in range(length)]
        total = sum(math.exp(s) for s in scores)
        expected = sum(math.exp(s) / total * x[i, t] for t, s in enumerate(scores))
        assert torch.allclose(temporal_attention_pool(x, mask, query)[i], torch.as_tensor(expected), atol=1e-6)


def test_pooling_one_step_is_the_identity() -> None:
    x = torch.randn(3, 1, 6)
    assert torch.equal(temporal_attention_pool(x, torch.ones(3, 1, dtype=torch.bool), torch.randn(6)), x[:, 0])


def test_readouts_see_only_steps_that_exist() -> None:
    x = torch.randn(2, 4, 6)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert torch.equal(last_step(x, mask), torch.stack([x[0, 3], x[1, 1]]))
    assert torch.allclose(masked_mean(x, mask), torch.stack([x[0].mean(0), x[1, :2].mean(0)]), atol=1e-6)


@pytest.mark.parametrize("gate", list(GATES))
def test_gates_are_their_closed_forms(gate: str) -> None:
    x, w = torch.randn(3, 6), torch.randn(4, 6)
    forms = {
        "softmax": lambda a, b: float(a @ b),
        "laplace": lambda a, b: -math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))),
        "gaussian": lambda a, b: -sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)),
    }
    expected = torch.tensor([[forms[gate](a, b) for b in w] for a in x])
    assert torch.allclose(GATES[gate](x, w), expected, atol=1e-5)


def test_the_laplace_gate_has_a_finite_gradient_at_distance_zero() -> None:
    w = torch.randn(4, 6, requires_grad=True)
    x = w.detach()[:2].clone().requires_grad_()
    laplace_logits(x, w).sum().backward()
    for tensor in (x, w):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())


@given(n=st.integers(1, 5), experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_choosing_all_experts_is_a_softmax(n: int, experts: int, seed: int) -> None:
    clean = logits(n, experts, seed)
    routing = noisy_top_k(clean, None, experts)
    assert torch.allclose(routing.sparse(), torch.softmax(clean, 1), atol=1e-6)
    assert torch.equal(routing.load, torch.full((experts,), float(n)))


@given(n=st.integers(1, 5), experts=st.integers(2, 6), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_vanishing_noise_is_a_hard_top_k(n: int, experts: int, k: int, seed: int) -> None:
    k, clean = min(k, experts), logits(n, experts, seed)
    hard = noisy_top_k(clean, None, k)
    soft = noisy_top_k(clean, torch.full_like(clean, 1e-9), k)
    assert torch.equal(hard.chosen, clean.topk(k).indices)
    assert torch.equal(soft.chosen, hard.chosen)
    assert torch.allclose(soft.gates, hard.gates, atol=1e-6)
    assert torch.allclose(soft.load, hard.load, atol=1e-4)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=7), st.integers(1, 7))
def test_ties_go_to_the_lower_expert(row: list[float], k: int) -> None:
    k = min(k, len(row))
    chosen = noisy_top_k(torch.tensor([row]), None, k).chosen[0].tolist()
    assert chosen == sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


@given(n=st.integers(1, 5), experts=st.integers(1, 6), k=st.integers(1, 6), noisy=st.booleans())
def test_rows_of_gates_sum_to_one_over_k_distinct_experts(n: int, experts: int, k: int, noisy: bool) -> None:
    k, clean = min(k, experts), 30 * logits(n, experts)
    routing = noisy_top_k(clean, torch.full_like(clean, 0.5) if noisy else None, k)
    assert torch.allclose(routing.gates.sum(1), torch.ones(n), atol=1e-6)
    assert all(len(set(row)) == k for row in routing.chosen.tolist())
    assert torch.allclose(routing.clean.sum(1), torch.ones(n), atol=1e-6)


def test_an_underflowing_gate_still_has_its_expert() -> None:
    routing = noisy_top_k(torch.tensor([[0.0, -1e4, -2e4]]), None, 2)
    assert routing.chosen.tolist() == [[0, 1]]
    assert routing.load.tolist() == [1.0, 1.0, 0.0]


def test_the_load_of_a_draw_follows_its_equation() -> None:
    clean, sigma, k = logits(5, 4), torch.rand(5, 4) + 0.5, 2
    torch.manual_seed(1)
    got = noisy_top_k(clean, sigma, k).load
    torch.manual_seed(1)
    noisy = clean + sigma * torch.randn_like(clean)
    expected = [0.0] * 4
    for n in range(5):
        ranked = sorted(noisy[n].tolist(), reverse=True)
        for e in range(4):
            threshold = ranked[k] if float(noisy[n, e]) >= ranked[k - 1] else ranked[k - 1]
            expected[e] += normal_cdf((float(clean[n, e]) - threshold) / float(sigma[n, e]))
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_load_estimates_how_often_an_expert_is_chosen() -> None:
    clean, sigma = logits(1, 5).expand(20000, -1), torch.rand(1, 5, generator=torch.Generator().manual_seed(2)) + 0.5
    torch.manual_seed(0)
    routing = noisy_top_k(clean, sigma.expand(20000, -1), 2)
    counted = torch.zeros_like(clean).scatter(1, routing.chosen, 1.0).mean(0)
    assert torch.allclose(routing.load / 20000, counted, atol=0.02)
    assert float(routing.load.sum()) == pytest.approx(20000 * 2, rel=0.02)


def test_the_load_is_differentiable_in_logits_and_noise() -> None:
    clean = logits(6, 4).requires_grad_()
    sigma = torch.full((6, 4), 0.7, requires_grad=True)
    noisy_top_k(clean, sigma, 2).load.square().sum().backward()
    for tensor in (clean, sigma):
        assert tensor.grad is not None
        assert bool(tensor.grad.any())
        assert bool(torch.isfinite(tensor.grad).all())


def test_noise_only_while_training() -> None:
    made, x, mask = router(), torch.randn(32, 3, 6), torch.ones(32, 3, dtype=torch.bool)
    torch.manual_seed(0)
    first, second = made.train()(x, mask, 0), made(x, mask, 0)
    assert not torch.equal(first.gates, second.gates)
    made.eval()
    state = torch.get_rng_state()
    assert torch.equal(made(x, mask, 0).gates, made(x, mask, 0).gates)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gate", list(GATES))
def test_routing_is_in_float32_under_autocast(gate: str) -> None:
    made, x, mask = router(gate).eval(), torch.randn(8, 3, 6), torch.ones(8, 3, dtype=torch.bool)
    plain = made(x, mask, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x, mask, 0)
    assert cast.gates.dtype == torch.float32
    assert torch.equal(cast.gates, plain.gates)
    assert torch.equal(cast.chosen, plain.chosen)


def test_a_cursor_reads_the_newest_head_that_is_not_younger() -> None:
    made = router().eval()
    made.add_head(2)
    assert made.head(0) is made.head(1)
    assert made.head(2) is made.head(7)
    assert made.head(1) is not made.head(2)


def test_squared_variation_is_its_formula() -> None:
    v = torch.tensor([1.0, 2.0, 6.0])
    mean, variance = 3.0, (4.0 + 1.0 + 9.0) / 2
    assert float(squared_variation(v)) == pytest.approx(variance / mean**2)
    assert float(squared_variation(torch.tensor([5.0]))) == 0.0


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize(("n", "experts", "k"), [(1, 4, 2), (6, 1, 1), (6, 4, 4), (2, 6, 1), (1, 1, 1)])
@pytest.mark.parametrize("zero", [True, False])
def test_the_balance_loss_and_its_gradient_are_always_finite(
    gate: str, n: int, experts: int, k: int, zero: bool
) -> None:
    made, x = router(gate, experts, k, zero=zero).train(), torch.randn(n, 3, 6, requires_grad=True)
    loss = balance_loss([made(x, torch.ones(n, 3, dtype=torch.bool), 0)])
    assert bool(torch.isfinite(loss))
    if loss.requires_grad:
        loss.backward()
    gradients = [p.grad for p in (*made.parameters(), x) if p.grad is not None]
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_a_balanced_router_has_no_balance_loss() -> None:
    chosen = torch.tensor([[0], [1], [2]])
    even = Routing(chosen, torch.ones(3, 1), torch.full((3, 3), 1 / 3), torch.ones(3))
    assert float(balance_loss([even])) == pytest.approx(0.0, abs=1e-9)
    lone = Routing(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), even.clean, torch.tensor([3.0, 0.0, 0.0]))
    assert float(balance_loss([lone])) == pytest.approx(6.0, rel=1e-5)


def test_balance_losses_of_several_routers_add_up_whatever_they_choose_from() -> None:
    routings = [noisy_top_k(logits(3 + m, experts, m), None, 2) for m, experts in enumerate((4, 4, 6))]
    for some in (routings[:1], routings[:2], routings):
        alone = [squared_variation(r.sparse().sum(0)) + squared_variation(r.load) for r in some]
        torch.testing.assert_close(balance_loss(some), torch.stack(alone).sum())


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("training", [True, False])
def test_modalities_choose_together_as_they_would_alone(gate: str, training: bool) -> None:
    """Of like and unlike kinds; without noise, whose numbers are drawn in another order, and with its scales."""
    routers = [router(gate, 4, 2), router(gate, 4, 2), router(gate, 6, 2), router(gate, 4, 3)]
    asked = []
    for i, made in enumerate(routers):
        made.train(training)
        x = torch.randn(2 + i, 3, 6, generator=torch.Generator().manual_seed(i))
        asked.append(made.scores(x, torch.ones(2 + i, 3, dtype=torch.bool), 0))
    if training:
        asked = [s._replace(noise=torch.full_like(s.clean, -1e9)) for s in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        together, alone = choose(asked), [choose([s])[0] for s in asked]
    for one, other in zip(together, alone, strict=True):
        for got, want in zip(one, other, strict=True):
            torch.testing.assert_close(got, want)
    assert [tuple(r.chosen.shape) for r in together] == [(2, 2), (3, 2), (4, 2), (5, 3)]


@settings(deadline=None)
@given(modalities=st.integers(2, 5), experts=st.integers(2, 6), clean=st.booleans(), seed=st.integers(0, 99))
def test_the_interaction_loss_is_the_mean_cosine_of_pairs(
    modalities: int, experts: int, clean: bool, seed: int
) -> None:
    routings = [noisy_top_k(logits(3 + m, experts, seed + m), None, 2) for m in range(modalities)]
    expected = naive_interaction([(r.clean if clean else r.sparse()).mean(0) for r in routings])
    assert float(interaction_loss(routings, "spread", clean=clean)) == pytest.approx(expected, abs=1e-5)
    assert float(interaction_loss(routings, "concentrate", clean=clean)) == pytest.approx(-expected, abs=1e-5)
    assert interaction_loss(routings, "none", clean=clean) == 0.0


def test_one_modality_has_nobody_to_interact_with() -> None:
    assert interaction_loss([noisy_top_k(logits(3, 4), None, 2)], "spread") == 0.0


@pytest.mark.parametrize(("mode", "falls"), [("spread", True), ("concentrate", False)])
def test_following_the_interaction_loss_spreads_or_concentrates(mode: str, falls: bool) -> None:
    a, b = logits(8, 4, 1).requires_grad_(), logits(8, 4, 2).requires_grad_()

    def overlap() -> Tensor:
        pair = [noisy_top_k(x, None, 2) for x in (a, b)]
        return torch.as_tensor(interaction_loss(pair, "spread")).detach()

    before = overlap()
    pair = [noisy_top_k(x, None, 2) for x in (a, b)]
    torch.as_tensor(interaction_loss(pair, mode)).backward()
    with torch.no_grad():
        for x in (a, b):
            assert x.grad is not None
            x -= 5.0 * x.grad
    assert bool(overlap() < before) is falls


@pytest.mark.parametrize("combine", ["own", "mean", "sum", "max"])
def test_heads_up_to_the_cursor_are_combined_as_said(combine: str) -> None:
    """Clean logits head by head; later heads have no say, and a task of the first stage reads its head alone."""
    made = Router(6, 4, 2, "softmax").eval()
    for stage in (0, 2, 5):
        made.add_head(stage, combine=combine)
    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    logits = {}
    for stage in (0, 2):
        head = made.head(stage)
        pooled = temporal_attention_pool(x, mask, head.query)
        logits[stage] = torch.stack([torch.stack([(z * w).sum() for w in head.gate]) for z in pooled])
    both = torch.stack(list(logits.values()))
    expected = {"own": both[1], "mean": both.mean(0), "sum": both.sum(0), "max": both.max(0).values}[combine]
    assert torch.allclose(made(x, mask, 4).clean, expected.softmax(1), atol=1e-6)
    assert torch.allclose(made(x, mask, 1).clean, logits[0].softmax(1), atol=1e-6)


def test_a_counted_load_has_no_gradient_and_is_the_count() -> None:
    made = Router(6, 4, 2, "laplace").train()
    made.add_head(0, load="count")
    routing = made(torch.randn(9, 5, 6), torch.ones(9, 5, dtype=torch.bool), 0)
    assert not routing.load.requires_grad
    assert routing.load.tolist() == torch.bincount(routing.chosen.flatten(), minlength=4).tolist()
