"""The pool's own forward and backward pass against autograd on the simple form: dropout, blocks, frozen parts, bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.nn import grouped
from flame_moe.nn.blocks import block_size, by_blocks
from flame_moe.nn.dropout import keep_bits, scale_of
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import Routing, noisy_top_k
from flame_moe.nn.grouped import Rows, Weights, apply_experts
from flame_moe.nn.moe import Sequences, mixture, plan

WIDTH, HIDDEN, EXPERTS = 6, 7, 3


def simple(x: Tensor, gates: Tensor, w: Weights, rows: Rows, keep: Tensor) -> Tensor:
    """Row by row what `apply_experts` does, by autograd; `keep` (R, H) multiplies the hidden activations."""
    expert = rows.expert.tolist()
    said = []
    for r, e in enumerate(expert):
        near = x[rows.near[r]]
        z = near[len(near) // 2] + F.gelu(w.conv[e] @ near.flatten() + w.conv_bias[e])
        h = F.layer_norm(z, z.shape, w.gain[e], w.shift[e])
        q = F.gelu(w.fc1[e] @ h + w.fc1_bias[e]) * keep[r]
        said.append(w.fc2[e] @ q + w.fc2_bias[e])
    weighed = zip(rows.back, gates, strict=True)
    return torch.stack([(torch.stack([said[r] for r in own]) * g[:, None]).sum(0) for own, g in weighed])


def example(*shapes: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, ExpertPool, Rows]:
    """Packed steps with a row of zeros, gates, pool and rows of some modalities."""
    torch.manual_seed(seed)
    pool = ExpertPool(EXPERTS, WIDTH, HIDDEN, 3, 0.0)
    routings = [noisy_top_k(torch.randn(n, EXPERTS), None, 2) for n, _ in shapes]
    rows, gates = plan(shapes, routings, EXPERTS, 3)
    x = torch.cat([torch.randn(sum(n * t for n, t in shapes), WIDTH), torch.zeros(1, WIDTH)])
    return x, gates, pool, rows


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("floats", [1 << 20, 1])
def test_values_and_gradients_equal_autograd_with_dropout_and_in_any_blocks(
    rate: float, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_FLOATS", floats)
    x, gates, pool, rows = example((9, 5), (4, 1), (30, 2))
    assert floats > 1 or len(rows.place) > 128, "several blocks"
    leaves = [t.detach().clone().requires_grad_() for t in (x, gates, *pool.weights(0))]
    other = [t.detach().clone().requires_grad_() for t in leaves]
    torch.manual_seed(5)
    fast = apply_experts(leaves[0], leaves[1], [Weights(*leaves[2:])], rows, rate)
    torch.manual_seed(5)
    keep = torch.ones(len(rows.place), HIDDEN)
    if rate:
        sizes = [
            block.end - block.start
            for block in grouped._blocks(rows.counts.tolist(), Weights(*(t[0] for t in leaves[2:])))
        ]
        bits = [keep_bits(torch.Size([size, HIDDEN]), rate, x.device) for size in sizes]
        keep = torch.cat(bits).float() * scale_of(rate)
    slow = simple(other[0], other[1], Weights(*other[2:]), rows, keep)
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)
    for out in (fast, slow):
        (out * out.cos()).sum().backward()
    for mine, theirs in zip(leaves, other, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        grad = theirs.grad if mine is not leaves[0] else torch.cat([theirs.grad[:-1], torch.zeros(1, WIDTH)])
        torch.testing.assert_close(mine.grad, grad, atol=5e-5, rtol=1e-3)


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same() -> None:
    x, gates, pool, rows = example((5, 4))
    free = [t.detach().clone().requires_grad_() for t in pool.weights(0)]
    apply_experts(x, gates, [Weights(*free)], rows, 0.0).sum().backward()
    some = [t.detach().clone().requires_grad_(i in (2, 6)) for i, t in enumerate(pool.weights(0))]
    apply_experts(x, gates, [Weights(*some)], rows, 0.0).sum().backward()
    for i, (one, all_) in enumerate(zip(some, free, strict=True)):
        assert (one.grad is not None) == (i in (2, 6))
        if one.grad is not None and all_.grad is not None:
            torch.testing.assert_close(one.grad, all_.grad)


def test_less_is_kept_for_the_way_back_than_by_autograd() -> None:
    x, gates, pool, rows = example((40, 8))

    def kept(run: object) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert callable(run)
            out = run()
        assert out.requires_grad
        return sum(seen.values())

    near = x[rows.near]
    mine = kept(lambda: apply_experts(x, gates, pool.sets(0), rows, 0.1))
    theirs = kept(lambda: pool(near.requires_grad_(), rows.counts.tolist(), 0))
    assert mine < 0.5 * theirs


def test_autocast_computes_in_bf16_and_leaves_the_routing_alone() -> None:
    torch.manual_seed(0)
    pool = ExpertPool(EXPERTS, 32, 32, 3, 0.0)
    s = Sequences(torch.randn(6, 5, 32), torch.ones(6, 5, dtype=torch.bool))
    routing: Routing = noisy_top_k(torch.randn(6, EXPERTS), None, 2)
    full = mixture({"a": s}, {"a": routing}, pool, 0)["a"]
    with torch.autocast("cpu", torch.bfloat16):
        half = mixture({"a": s}, {"a": routing}, pool, 0)["a"]
    assert half.dtype == torch.bfloat16
    assert 0 < float((half.detach().float() - full.detach()).abs().max()) < 0.05
    half.float().sum().backward()
    assert pool.conv.base.grad is not None
    assert pool.conv.base.grad.dtype == torch.float32


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("shapes", [[(9, 5), (4, 1)], [(40, 9), (30, 3)], [(1, 1)], [(50, 1)]])
@pytest.mark.parametrize("crowded", [False, True])
def test_blocks_of_one_expert_each_say_the_same(pools: int, shapes: list[tuple[int, int]], crowded: bool) -> None:
    torch.manual_seed(0)
    made = [ExpertPool(EXPERTS, WIDTH, HIDDEN, 3, 0.0) for _ in range(pools)]
    logits = [torch.randn(n, EXPERTS * pools) for n, _ in shapes]
    if crowded:  # the first two take all, the others nothing
        logits = [x + torch.tensor([9.0, 9.0, *[0.0] * (EXPERTS * pools - 2)]) for x in logits]
    routings = [noisy_top_k(x, None, 2) for x in logits]
    rows, gates = plan(shapes, routings, EXPERTS * pools, 3)
    x = torch.cat([torch.randn(sum(n * t for n, t in shapes), WIDTH), torch.zeros(1, WIDTH)])
    found = []
    for run in (apply_experts, by_blocks):
        leaves = [t.detach().clone().requires_grad_() for t in (x, gates, *(t for p in made for t in p.weights(0)))]
        sets = [Weights(*leaves[2 + 8 * i : 10 + 8 * i]) for i in range(pools)]
        out = run(leaves[0], leaves[1], sets, rows, 0.0)
        (out * out.cos()).sum().backward()
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]
        grads[0] = torch.cat([grads[0][:-1], torch.zeros(1, WIDTH)])
        found.append([out.detach(), *grads])
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=5e-5, rtol=1e-3)


def test_blocks_drop_as_many_as_they_should_and_leave_what_is_frozen() -> None:
    x, gates, pool, rows = example((200, 5))
    free = [t.detach().clone().requires_grad_(i in (2, 6)) for i, t in enumerate(pool.weights(0))]
    torch.manual_seed(1)
    said = torch.stack([by_blocks(x, gates, [Weights(*free)], rows, 0.3).detach() for _ in range(200)])
    plain = by_blocks(x, gates, [Weights(*free)], rows, 0.0)
    found = plain.detach()
    assert float((said.mean(0) - found).abs().mean()) < 0.1 * float((said[0] - found).abs().mean())
    plain.sum().backward()
    assert [t.grad is not None for t in free] == [i in (2, 6) for i in range(8)]


@pytest.mark.parametrize("count", [1, 31, 500, 36_864])
@pytest.mark.parametrize("experts", [1, 5, 64])
def test_blocks_are_enough_for_any_shares(count: int, experts: int) -> None:
    size = block_size(count, experts)
    for counts in (
        [count] + [0] * (experts - 1),
        [count // experts] * (experts - 1) + [count - count // experts * (experts - 1)],
    ):
        assert sum(-(-c // size) for c in counts) <= count // size + experts
