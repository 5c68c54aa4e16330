"""Methods that add experts or choose among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_moe.analysis.footprint import footprint
from flame_moe.continual.methods.seed import SEED, divergence
from flame_moe.data.store import Store
from flame_moe.errors import RecipeError
from flame_moe.nn.block import Block
from flame_moe.nn.columns import LowRankExperts
from flame_moe.nn.experts import ExpertPool, Joined
from flame_moe.nn.gating import Router
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.model import Flame
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.schema import Stage
from tests.methods import TWO, context_of, learned, moved_by
from tests.test_continual import bits, everyone
from tests.tiny import STREAM


def block_of(model: Flame) -> Block:
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block


def test_pools_that_are_joined_equal_one_pool_that_has_all_their_experts() -> None:
    small, large, both = (ExpertPool(e, 4, 6, 3, 0.0) for e in (2, 3, 5))
    with torch.no_grad():
        for name, p in both.named_parameters():
            p.copy_(torch.cat([small.get_parameter(name), large.get_parameter(name)]))
    for counts in ([2, 0, 3, 1, 4], [0, 0, 3, 1, 6], [5, 5, 0, 0, 0]):
        near = torch.randn(10, 3, 4)
        torch.testing.assert_close(Joined([small, large])(near, counts, 0), both(near, counts, 0))


def test_gate_columns_are_scored_side_by_side_and_only_new_ones_are_added() -> None:
    router = Router(4, 3, 2, "softmax")
    router.add_head(0)
    router.add_head(1, experts=5, combine="append")
    router.add_head(3, experts=9, combine="append")
    assert [len(head.gate) for head in (router.head(s) for s in (0, 1, 3))] == [3, 2, 4]
    x, mask = torch.randn(6, 1, 4), torch.ones(6, 1, dtype=torch.bool)
    router.eval()
    for cursor, stages in ((0, (0,)), (1, (0, 1)), (2, (0, 1)), (3, (0, 1, 3))):
        gate = torch.cat([router.head(s).gate for s in stages])
        expected = torch.softmax(x[:, 0] @ gate.T, dim=1)
        torch.testing.assert_close(router(x, mask, cursor).clean, expected)
    new = Router(4, 3, 2, "softmax")
    new.add_head(2, experts=7, combine="append")
    assert len(new.head(2).gate) == 7


def test_lifelong_moe_adds_experts_and_columns_and_keeps_the_old_ones(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "lifelong_moe", "experts": 3}, train={"weight_decay": 1.0})
    before, after = moved_by(learner, tiny_store, STREAM[2])
    for name, tensor in before.items():
        where = name.split(".")
        if where[2] in ("pool", "columns", "routers"):
            assert torch.equal(after[name], tensor), name
    reached = [n for n in before if n.split(".")[2] == "layers" and n.split(".")[3] == "vitals" and n.endswith("base")]
    assert reached
    assert all(not torch.equal(after[name], before[name]) for name in reached)
    for modality in ("vitals", "image", "notes"):
        router = block_of(learner.model).routers[modality]
        assert isinstance(router, Router)
        assert sum(len(head.gate) for head in router.read(2)) == 4 + 2 * 3
    assert any(not torch.equal(p, torch.zeros_like(p)) for n, p in after.items() if n.startswith("blocks.0.columns.2"))


def test_a_progressive_column_adds_what_earlier_columns_say_through_its_adapters(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM, {"name": "progressive", "experts": 3})
    block = block_of(learner.model.eval())
    z = Sequences(torch.randn(5, 4, 8), torch.ones(5, 4, dtype=torch.bool))
    for name, cursor in (("vitals", 2), ("image", 2), ("image", 1)):
        got, routing = block._mix_columns({name: z}, cursor)
        said: list[Tensor] = []
        for stage in range(cursor + 1):
            if not block.routes(name, stage):
                said.append(torch.zeros_like(z.x))
                continue
            column = block.columns[str(stage)] if stage else None
            pool = block.pool if column is None else column.pool
            assert isinstance(pool, ExpertPool)
            y = mixture({name: z}, block.route({name: z}, stage), pool, stage)[name]
            if column is not None:
                down, up = column.down, column.up
                assert isinstance(down, StackedLinear)
                assert isinstance(up, StackedLinear)
                y = y + up(torch.nn.functional.gelu(down(torch.cat(said, -1), stage)), stage)
            said.append(y)
        torch.testing.assert_close(got[name], said[-1])
        assert routing[name].clean.shape[1] == 3
    assert not block.routes("vitals", 1)


def test_low_rank_experts_equal_a_loop_over_steps(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM, {"name": "moral", "experts": 3, "rank": 2})
    block = block_of(learner.model.eval())
    z = Sequences(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert block.pool is not None
    frozen = mixture({"notes": z}, block.route({"notes": z}, 2), block.pool, 2)["notes"]
    first, second = block.columns["1"], block.columns["2"]
    assert isinstance(first, LowRankExperts)
    assert isinstance(second, LowRankExperts)
    assert first.a.base.any()
    expected = frozen.clone()
    for n in range(2):
        for t in range(3):
            x = z.x[n, t]
            scores = second.gate.base @ x
            assert len(scores) == 6
            best = scores.argsort(descending=True)[:2]
            weights = torch.softmax(scores[best], dim=0)
            for weight, i in zip(weights, best.tolist(), strict=True):
                owner, place = (first, i) if i < 3 else (second, i - 3)
                expected[n, t] += weight * (owner.a.base[place] @ (owner.b.base[place] @ x))
    torch.testing.assert_close(block._mix_columns({"notes": z}, 2)[0]["notes"], expected)


def test_low_rank_experts_change_nothing_before_they_are_trained(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "moral"})
    context = context_of(learner, tiny_store, ("days",))
    block = block_of(context.model.eval())
    z = Sequences(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert block.pool is not None
    plain = mixture({"vitals": z}, block.route({"vitals": z}, 1), block.pool, 1)
    torch.testing.assert_close(block._mix_columns({"vitals": z}, 1)[0]["vitals"], plain["vitals"], rtol=0, atol=0)


def test_the_divergence_of_gaussians_is_its_closed_form_and_grows_with_distance() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 1, generator=draw), 2.0 * torch.randn(4000, 1, generator=draw) + 3.0
    # KL(p||q) + KL(q||p) of N(0, 1) and N(3, 4): (1/4 + 4 + 9 (1 + 1/4)) / 2 - 1
    assert float(divergence([a, b])) == pytest.approx((0.25 + 4 + 9 * 1.25) / 2 - 1, rel=0.1)
    near = [torch.randn(200, 3, generator=draw) for _ in range(3)]
    far = [x + 2.0 * i for i, x in enumerate(near)]
    assert float(divergence(far)) > 5 * float(divergence(near)) > 0
    pairs = [float(divergence([far[i], far[j]])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(divergence(far)) == pytest.approx(float(np.mean(pairs)))
    assert float(divergence([near[0], near[0][:1]])) == 0.0


def test_seed_trains_the_expert_that_separates_best_and_no_other(tiny_store: Store) -> None:
    """Planted: all experts but one say the same of every sample."""
    learner = learned(tiny_store, TWO[:1], {"name": "seed"}, train={"weight_decay": 1.0})
    pool = block_of(learner.model).pool
    assert pool is not None
    with torch.no_grad():
        pool.fc2.base[[0, 1, 3]] = 0.0
    before, after = moved_by(learner, tiny_store, ("days",))
    assert isinstance(learner.method, SEED)
    assert learner.method.chosen == {1: (2,)}
    for name, tensor in before.items():
        if name.startswith("blocks.0.pool."):
            assert torch.equal(after[name][[0, 1, 3]], tensor[[0, 1, 3]]), name
        elif ".pool." not in name:
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(after["blocks.0.pool.fc1.base"][2], before["blocks.0.pool.fc1.base"][2])
    assert not torch.equal(after["blocks.0.pool.fc2_bias.copies.0"][2], before["blocks.0.pool.fc2_bias.copies.0"][2])


def test_a_separate_model_does_not_depend_on_what_was_learned_before(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "separate"})
    other = learned(tiny_store, (("stage",),), {"name": "separate"})
    for one in (learner, other):
        one.learn(tiny_store, Stage(tasks=("days",)))
    assert bits(everyone(learner, tiny_store)["days"]) == bits(everyone(other, tiny_store)["days"])
    assert "days" not in learner.model.heads
    assert "image" not in learner.model.paths
    own = learner.model.apart["days"]
    assert isinstance(own, Flame)
    size = sum(p.stored_parameters for p in footprint(learner.model))
    assert size == sum(t.numel() for t in learner.model.state_dict().values())
    assert size > sum(t.numel() for t in own.state_dict().values()) > 0


@pytest.mark.parametrize("kind", ["progressive", "moral", "lifelong_moe", "seed"])
def test_methods_of_experts_refuse_a_model_without_routers(tiny_store: Store, kind: str) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": kind}, model={"preset": "no_moe"})
    with pytest.raises(RecipeError, match=f"the method '{kind}' .* preset 'no_moe'"):
        learner.learn(tiny_store, Stage(tasks=("days",)))
