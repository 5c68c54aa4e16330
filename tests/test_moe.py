"""Dispatch against a plain loop, and what every router, expert, encoder and block must do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flame_moe.batch import ModalityBatch
from flame_moe.nn.attention import SelfAttention
from flame_moe.nn.block import PRESETS, Block
from flame_moe.nn.encoders import ENCODERS
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.fusion import Head
from flame_moe.nn.gating import GATES, Router, Routing, noisy_top_k
from flame_moe.nn.grouped import apply_experts
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.nn.pooling import READOUTS
from flame_moe.nn.stacked import growables
from tests.reference import naive_mixture
from tests.tiny import BY_NAME, EVERYTHING, config, full_batch

WIDTH = 6


def sequences(n: int, steps: int, seed: int, *, garbage: bool = True) -> Sequences:
    """Random ragged sequences; what stands on padding is arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (n,), generator=generator)
    lengths[0] = steps
    mask = torch.arange(steps)[None] < lengths[:, None]
    x = torch.randn(n, steps, WIDTH, generator=generator)
    return Sequences(x if garbage else x.masked_fill(~mask[..., None], 0.0), mask)


def compare(inputs: dict[str, Sequences], routings: dict[str, Routing], pool: ExpertPool) -> None:
    """Outputs, input gradients and weight gradients of the fast and the naive mixture agree."""

    def run(mix: Callable[..., dict[str, Tensor]]) -> list[Tensor]:
        pool.zero_grad()
        leaves = {name: s.x.clone().requires_grad_() for name, s in inputs.items()}
        gates = {name: r.gates.clone().requires_grad_() for name, r in routings.items()}
        ready = {name: Sequences(leaves[name], s.mask) for name, s in inputs.items()}
        routed = {name: r._replace(gates=gates[name]) for name, r in routings.items()}
        out = mix(ready, routed, pool, 0)
        real = {name: y.masked_fill(~inputs[name].mask[..., None], 0.0) for name, y in out.items()}
        torch.cat([(y * y.cos()).flatten() for y in real.values()]).sum().backward()
        found = [*real.values(), *(x.grad for x in leaves.values()), *(g.grad for g in gates.values())]
        found += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in pool.parameters()]
        assert all(t is not None for t in found)
        return [t.detach() for t in found if t is not None]

    for fast, slow in zip(run(mixture), run(naive_mixture), strict=True):
        assert torch.allclose(fast, slow, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    gate=st.sampled_from(sorted(GATES)),
    experts=st.integers(1, 6),
    k=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 5]),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_batched_dispatch_equals_a_loop_over_samples_and_experts(
    gate: str, experts: int, k: int, kernel: int, shapes: list[tuple[int, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    pool = ExpertPool(experts, WIDTH, 7, kernel, 0.0)
    inputs = {f"m{i}": sequences(n, steps, seed + i) for i, (n, steps) in enumerate(shapes)}
    routings = {}
    for name, s in inputs.items():
        router = Router(WIDTH, experts, min(k, experts), gate)
        router.add_head(0)
        with torch.no_grad():
            routings[name] = router(s.x, s.mask, 0)
    compare(inputs, routings, pool)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1)])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 5), (5, 1), (3, 2)])
def test_edge_sizes_dispatch_like_any_other(shape: tuple[int, int], experts: int, k: int) -> None:
    torch.manual_seed(0)
    inputs = {"a": sequences(*shape, seed=1)}
    compare(inputs, {"a": noisy_top_k(torch.randn(shape[0], experts), None, k)}, ExpertPool(experts, WIDTH, 7, 3, 0.0))


def test_experts_that_nobody_chose_get_no_gradient() -> None:
    pool = ExpertPool(4, WIDTH, 7, 3, 0.0)
    inputs = {"a": sequences(3, 4, seed=1)}
    routing = noisy_top_k(torch.tensor([[0.0, 9.0, 0.0, 8.0]]).expand(3, -1), None, 2)
    mixture(inputs, {"a": routing}, pool, 0)["a"].sum().backward()
    assert pool.conv.base.grad is not None
    assert [bool(g.any()) for g in pool.conv.base.grad] == [False, True, False, True]


def test_each_expert_runs_once_whatever_the_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("flame_moe.nn.moe.apply_experts", lambda *args: calls.append(1) or apply_experts(*args))
    inputs = {name: sequences(3, 4, seed=i) for i, name in enumerate("abc")}
    mixture(
        inputs, {name: noisy_top_k(torch.randn(3, 4), None, 2) for name in inputs}, ExpertPool(4, WIDTH, 7, 3, 0.0), 0
    )
    assert len(calls) == 1


def test_padding_reaches_no_expert() -> None:
    torch.manual_seed(0)
    pool, clean, dirty = ExpertPool(3, WIDTH, 7, 3, 0.0), sequences(4, 6, 1, garbage=False), sequences(4, 6, 1)
    dirty = Sequences(torch.where(dirty.mask[..., None], dirty.x, float("nan")), dirty.mask)
    routing = {"a": noisy_top_k(torch.randn(4, 3), None, 2)}
    x = dirty.x.clone().requires_grad_()
    one = mixture({"a": clean}, routing, pool, 0)["a"]
    two = mixture({"a": Sequences(x, dirty.mask)}, routing, pool, 0)["a"]
    assert torch.equal(one[clean.mask], two[clean.mask])
    two[clean.mask].sum().backward()
    assert x.grad is not None
    assert not bool(x.grad[~dirty.mask].any())


class Piece(nn.Module):
    """Anything of the network as one call on ragged sequences of width 8."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Sequences], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, s: Sequences) -> Tensor:
        return self.call(self.inner, s)


def _router(gate: str) -> Piece:
    router = Router(8, 4, 2, gate)
    router.add_head(0)

    def call(module: nn.Module, s: Sequences) -> Tensor:
        routing = module(s.x, s.mask, 0)
        return routing.sparse() + routing.load.mean()

    return Piece(router, call)


def _pool(kernel: int) -> Piece:
    def call(module: nn.Module, s: Sequences) -> Tensor:
        assert isinstance(module, ExpertPool)
        chosen = torch.arange(4).expand(len(s.x), 4)
        routing = Routing(chosen, torch.full((len(s.x), 4), 0.25), torch.empty(0), torch.empty(0))
        return masked(mixture({"a": s}, {"a": routing}, module, 0)["a"], s.mask)

    return Piece(ExpertPool(4, 8, 8, kernel, 0.0), call)


def _block(preset: str) -> Piece:
    block = Block(config(preset=preset, dropout=0.0, top_k=4))
    block.add_modality("a", 0)
    block.add_router_head("a", 0)
    return Piece(block, lambda module, s: masked(module({"a": s}, 0)[0]["a"].x, s.mask))


def _head(readout: str) -> Piece:
    task = EVERYTHING.model_copy(update={"modalities": ("a", "b")})
    head = Head(task, 8, readout, 0.0)
    return Piece(head, lambda module, s: module({"a": s}, {"a": torch.arange(len(s.x))}, len(s.x)))


PIECES: dict[str, Callable[[], Piece]] = {
    **{f"router {gate}": lambda gate=gate: _router(gate) for gate in GATES},
    **{f"experts kernel {k}": lambda k=k: _pool(k) for k in (1, 3)},
    "attention": lambda: Piece(SelfAttention(8, 2, 0.0, stage=0), lambda m, s: masked(m(s.x, s.mask, 0), s.mask)),
    **{f"block {preset}": lambda preset=preset: _block(preset) for preset in PRESETS},
    **{f"head {readout}": lambda readout=readout: _head(readout) for readout in READOUTS},
}


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask[..., None], 0.0)


def ragged() -> Sequences:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 5, 8, generator=generator)
    return Sequences(x, torch.arange(5)[None] < torch.tensor([5, 1, 3, 4])[:, None])


@pytest.fixture(params=list(PIECES))
def piece(request: pytest.FixtureRequest) -> Piece:
    torch.manual_seed(0)
    return PIECES[request.param]().eval()


def test_every_piece_is_finite_and_deterministic_in_evaluation(piece: Piece) -> None:
    first, second = piece(ragged()), piece(ragged())
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)


def test_no_piece_sees_padding(piece: Piece) -> None:
    s = ragged()
    other = Sequences(torch.where(s.mask[..., None], s.x, 100.0), s.mask)
    longer = Sequences(torch.cat([s.x, torch.full((4, 2, 8), -7.0)], 1), torch.cat([s.mask, s.mask.new_zeros(4, 2)], 1))
    base = piece(s)
    assert torch.allclose(piece(other), base, atol=1e-6)
    long = piece(longer)
    assert torch.allclose(long[:, : base.shape[1]] if long.ndim == 3 else long, base, atol=1e-5)


def test_no_piece_sees_a_gap_between_steps(piece: Piece) -> None:
    """Event types that a sample lacks are gaps, not padding at the end."""
    x, mask = ragged()
    mask = mask.clone()
    mask[0, 1], mask[2, 0], mask[3, 2] = False, False, False
    base = piece(Sequences(x, mask))
    other = Sequences(torch.where(mask[..., None], x, -50.0), mask)
    assert torch.allclose(piece(other), base, atol=1e-6)


def test_the_last_step_is_the_last_that_exists() -> None:
    x, mask = ragged()
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(READOUTS["last"](x, mask, None), x[[0, 1, 2, 3], [2, 0, 4, 4]])


def test_gradients_reach_every_parameter_of_every_piece(piece: Piece) -> None:
    piece.train()
    torch.manual_seed(1)
    out = piece(ragged())
    (out * torch.randn(out.shape)).sum().backward()
    dead = [name for name, p in piece.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []


def test_every_piece_saves_and_loads(piece: Piece) -> None:
    torch.manual_seed(9)
    fresh = copy.deepcopy(piece)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.uniform_(-1, 1)
    assert not torch.equal(fresh(ragged()), piece(ragged()))
    fresh.load_state_dict(piece.state_dict(), strict=True)
    assert torch.equal(fresh(ragged()), piece(ragged()))


@pytest.fixture(params=list(BY_NAME))
def encoder(request: pytest.FixtureRequest) -> tuple[nn.Module, ModalityBatch]:
    modality = BY_NAME[request.param]
    torch.manual_seed(0)
    return ENCODERS[modality.kind](modality, config(), 0).eval(), full_batch(4).modalities[modality.name]


def test_there_is_an_encoder_for_every_kind() -> None:
    """All but `tokens`, which needs a pre-trained model and is tested beside one."""
    assert {m.kind for m in BY_NAME.values()} | {"tokens"} == set(ENCODERS)


def test_every_encoder_gives_sequences_of_the_models_width(encoder: tuple[nn.Module, ModalityBatch]) -> None:
    net, part = encoder
    x, mask = net(part, 0)
    assert x.shape[0] == len(part.rows)
    assert x.shape[2] == 8
    assert mask.shape == x.shape[:2]
    assert mask.dtype == torch.bool
    assert bool(mask.any(1).all())
    assert bool(torch.isfinite(x).all())
    assert torch.equal(net(part, 0).x, x)


def test_gradients_reach_every_parameter_of_every_encoder(encoder: tuple[nn.Module, ModalityBatch]) -> None:
    net, part = encoder
    x, mask = net.train()(part, 0)
    (x[mask] * torch.randn(x[mask].shape)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_every_weight_of_an_encoder_can_grow(encoder: tuple[nn.Module, ModalityBatch]) -> None:
    net, _ = encoder
    growing = {id(p) for _, part in growables(net) for p in part.parameters()}
    assert {id(p) for p in net.parameters()} == growing


def test_every_encoder_saves_and_loads(encoder: tuple[nn.Module, ModalityBatch]) -> None:
    net, part = encoder
    fresh = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.uniform_(-1, 1)
    assert not torch.equal(fresh(part, 0).x, net(part, 0).x)
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(fresh(part, 0).x, net(part, 0).x)
