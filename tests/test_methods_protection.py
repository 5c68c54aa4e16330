"""That each method's protection reaches the weights: penalties, memories, distillation, subspaces, factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_moe.continual import Learner
from flame_moe.continual.methods import make_method
from flame_moe.continual.methods.distillation import distillation, readable
from flame_moe.continual.methods.gpm import GPM
from flame_moe.continual.methods.inflora import InfLoRA
from flame_moe.continual.methods.lora import ranks_within, stored_by_flame
from flame_moe.continual.methods.quadratic import Quadratic
from flame_moe.continual.subspace import Subspaces, extended, free_directions
from flame_moe.continual.truncation import Plan
from flame_moe.data.loader import make_batch
from flame_moe.data.store import Store
from flame_moe.errors import RecipeError
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.schema import MethodConfig, Stage, Task
from flame_moe.training.hooks import Seen
from tests.methods import TWO, context_of, learned, stopped
from tests.tiny import STREAM


def by_hand(learner: Learner, store: Store, kind: str) -> dict[str, Tensor]:
    """Importances for 'death', one training sample after the other, from the definition."""
    model, task = learner.model, learner.tasks["death"]
    indices = store.indices("death", "train", modalities=task.modalities)
    shared = {n: p for n, p in model.named_parameters() if not n.startswith("heads.")}
    total = {name: torch.zeros_like(p) for name, p in shared.items()}
    model.eval().requires_grad_(True)
    for index in indices:
        batch = make_batch(store, learner.preprocessor, task, [index])
        z = model(batch, 0).logits[0, 0]
        sign = 2 * float(batch.target[0, 0]) - 1
        value = torch.log1p(torch.exp(-sign * z)) if kind == "ewc" else z**2
        model.zero_grad(set_to_none=True)
        value.backward()
        for name, p in shared.items():
            if p.grad is not None:
                total[name] += (p.grad**2 if kind == "ewc" else p.grad.abs()) / len(indices)
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return total


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_the_gradient_of_the_penalty_is_importance_times_distance(tiny_store: Store, kind: str) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": kind, "strength": 7.0})
    expected = by_hand(learner, tiny_store, kind)
    context = context_of(learner, tiny_store, ("days",))
    model = context.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = learner.method.penalty(model, [])
    assert penalty is not None
    assert penalty.item() == 0.0
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    penalty = learner.method.penalty(model, [])
    assert penalty is not None
    penalty.backward()
    kinds = set()
    for name, p in model.named_parameters():
        if name in expected and bool(expected[name].any()):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, 7.0 * expected[name] * (p.detach() - start[name]), rtol=1e-3, atol=1e-6)
            kinds.add("matrix" if name.endswith("base") else "router" if "routers" in name else "vector")
        elif name not in expected:
            assert p.grad is None, name
    assert kinds == {"matrix", "router", "vector"}


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_importance_runs_over_stages_with_decay(tiny_store: Store, kind: str) -> None:
    kept = {}
    for decay in (0.0, 0.5):
        learner = learned(tiny_store, TWO[:1], {"name": kind, "decay": decay, "samples": 8})
        assert isinstance(learner.method, Quadratic)
        first = {n: t.clone() for n, t in learner.method.importance.items()}
        context = context_of(learner, tiny_store, ("days",))
        learner.method.conclude(context)
        kept[decay] = (first, learner.method.importance)
    (first, without), (_, with_decay) = kept[0.0], kept[0.5]
    for name, tensor in without.items():
        torch.testing.assert_close(with_decay[name], tensor + 0.5 * first.get(name, torch.zeros_like(tensor)))


def test_a_strong_penalty_holds_the_weights_and_none_does_not(tiny_store: Store) -> None:
    moved = {}
    for strength in (0.0, 1e6):
        learner = learned(tiny_store, TWO[:1], {"name": "ewc", "strength": strength, "samples": 8})
        before = {n: p.clone() for n, p in learner.model.named_parameters()}
        weights = learner.method.importance
        learner.learn(tiny_store, Stage(tasks=TWO[1]))
        after = dict(learner.model.named_parameters())
        moved[strength] = sum(float((weights[n] * (after[n] - before[n]) ** 2).sum()) for n in weights)
    assert moved[1e6] < 0.3 * moved[0.0]


def test_replay_remembers_within_its_budget_and_trains_on_nothing_else(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "replay", "memory": 7})
    memory = {name: set(ids) for name, ids in learner.method.memory.items()}
    assert {name: len(ids) for name, ids in memory.items()} == {"death": 4, "stage": 3}
    for name, ids in memory.items():
        task = learner.tasks[name]
        train = tiny_store.indices(name, "train", modalities=task.modalities)
        assert ids <= set(tiny_store.ids(train))
    seen = stopped(learner, monkeypatch, tiny_store, STREAM[2])
    assert [s.problem.task.name for s in seen[:-1]] == list(STREAM[2])
    assert set(seen[-1].batch.ids) <= memory[seen[-1].problem.task.name]
    assert seen[-1].problem.cursor == learner.cursor(seen[-1].problem.task.name)
    learner.learn(tiny_store, Stage(tasks=STREAM[2]))
    assert {name: len(ids) for name, ids in learner.method.memory.items()} == {
        "death": 2,
        "stage": 2,
        "days": 2,
        "codes": 1,
    }
    assert all(set(learner.method.memory[name]) <= memory[name] for name in memory)


def test_joint_training_sees_every_task_so_far_in_every_step(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "joint"})
    seen = stopped(learner, monkeypatch, tiny_store, STREAM[2])
    assert [(s.problem.task.name, s.problem.cursor) for s in seen] == [
        ("death", 0),
        ("stage", 1),
        ("days", 2),
        ("codes", 2),
    ]
    record = learner.learn(tiny_store, Stage(tasks=STREAM[2]))
    assert set(record.history[0]["val"]) == {"death", "stage", "days", "codes"}


def test_distillation_is_the_divergence_of_softened_predictions() -> None:
    def kl(p: Any, q: Any) -> float:
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))

    def soft(z: Any, t: float) -> Any:
        e = np.exp(np.array(z) / t)
        return e / e.sum()

    student, teacher = (
        torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]]),
        torch.tensor([[0.3, 1.0, 2.0], [0.1, 1.0, 2.0]]),
    )
    many = Task(name="x", kind="multiclass", modalities=("static",), classes=("a", "b", "c"))
    expected = np.mean(
        [4 * kl(soft(t, 2.0), soft(s, 2.0)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    )
    assert float(distillation(many, student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)
    labels = many.model_copy(update={"kind": "multilabel"})
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = np.mean([kl(soft([t, 0.0], 1.0), soft([s, 0.0], 1.0)) for s, t in pairs])
    assert float(distillation(labels, student, teacher, 1.0)) == pytest.approx(expected, rel=1e-5)
    value = many.model_copy(update={"kind": "regression"})
    assert float(distillation(value, student, teacher, 2.0)) == pytest.approx(float((student - teacher).pow(2).mean()))


def test_an_old_task_is_asked_about_the_samples_that_have_its_modalities(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO, {"name": "lwf"})
    indices = tiny_store.indices("days", "train", modalities=("vitals", "image"))[:30]
    batch = make_batch(tiny_store, learner.preprocessor, learner.tasks["days"], indices)
    part = readable(batch, learner.tasks["death"])
    assert part is not None
    assert list(part.modalities) == ["vitals"]
    assert part.ids == tuple(batch.ids[i] for i in batch.modalities["vitals"].rows.tolist())
    assert 0 < part.size < batch.size
    alone = learner.tasks["death"].model_copy(update={"modalities": ("vitals",)})
    straight = make_batch(
        tiny_store, learner.preprocessor, alone, [i for i in indices if tiny_store.present("vitals")[i]]
    )
    learner.model.eval()
    torch.testing.assert_close(learner.model(part, 0).logits, learner.model(straight, 0).logits, rtol=1e-4, atol=1e-5)
    assert readable(batch, learner.tasks["death"].model_copy(update={"modalities": ("static",)})) is None


def test_learning_without_forgetting_pulls_back_to_the_model_before_the_stage(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "lwf"})
    context = context_of(learner, tiny_store, ("days",))
    model = context.model.eval()
    problem = context.problems["days"]
    batch = next(iter(problem.train.batches(None)))
    seen = [Seen(problem, batch, model(batch, 1), torch.zeros(()))]
    at_start = learner.method.penalty(model, seen)
    assert at_start is not None
    assert at_start.item() == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    away = learner.method.penalty(model, seen)
    assert away is not None
    away.backward()
    assert away.item() > 0
    assert model.blocks[0].pool.fc1.base.grad.any()
    learner.method.conclude(context)
    assert learner.method.penalty(model, seen) is None


@pytest.fixture(scope="module")
def subspace_inputs() -> tuple[Tensor, Tensor]:
    """Inputs (n, 6) in four directions, one of them weak, and their second moment."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(200, 4, generator=draw) * torch.tensor([3.0, 2.0, 1.0, 0.01])
    z = z @ torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q[:4]
    return z, z.T @ z / len(z)


def test_a_basis_takes_as_few_directions_as_hold_the_energy(subspace_inputs: tuple[Tensor, Tensor]) -> None:
    z, second = subspace_inputs
    singular = torch.linalg.svdvals(z).square()
    for threshold in (0.5, 0.9, 0.99, 0.99999999):
        basis = extended(torch.zeros(6, 0), second, threshold)
        shares = singular.cumsum(0) / singular.sum()
        assert basis.shape[1] == int((shares < threshold).sum()) + 1
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=1e-5, atol=1e-5)
        held = (z @ basis).square().sum() / z.square().sum()
        assert float(held) >= threshold - 1e-5
    first = torch.eye(6)[:, :2]
    both = extended(first, second, 0.99)
    assert torch.equal(both[:, :2], first)
    torch.testing.assert_close(both.T @ both, torch.eye(both.shape[1]), rtol=1e-5, atol=1e-5)
    assert float((z @ both).square().sum() / z.square().sum()) >= 0.99 - 1e-5


def test_a_basis_of_all_energy_takes_no_direction_twice(subspace_inputs: tuple[Tensor, Tensor]) -> None:
    """Beside what the basis holds, inputs reach two directions; the other eigenvectors are of rounding."""
    first = torch.eye(6)[:, :2]
    z = subspace_inputs[0] * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    whole = extended(first, z.T @ z, 1.0)
    assert whole.shape[1] == 4
    torch.testing.assert_close(whole.T @ whole, torch.eye(4), rtol=1e-5, atol=1e-5)


def test_nothing_moves_where_all_directions_are_protected(subspace_inputs: tuple[Tensor, Tensor]) -> None:
    matrix = StackedMatrix(5, 6)
    basis = torch.linalg.qr(subspace_inputs[1]).Q
    onto = Subspaces({"w|0": basis}).projector("w", matrix)
    assert onto is not None
    change = torch.randn(5, 6)
    assert torch.equal(change - change @ onto, torch.zeros(5, 6))
    part = Subspaces({"w|0": basis[:, :4]}).projector("w", matrix)
    moved = Subspaces({"w|0": basis[:, :4].T.contiguous().T}).projector("w", matrix)
    assert part is not None
    assert moved is not None
    assert torch.equal(part, moved), "whatever the order in memory"


def test_free_directions_avoid_the_basis_and_follow_the_inputs(subspace_inputs: tuple[Tensor, Tensor]) -> None:
    z, second = subspace_inputs
    basis = torch.eye(6)[:, :2]
    rows = free_directions(basis, second, 2)
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=1e-5, atol=1e-5)
    assert float((rows @ basis).abs().max()) < 1e-6
    left = torch.linalg.svd(z - z @ basis @ basis.T).Vh[:2]
    torch.testing.assert_close((rows @ left.T).abs(), torch.eye(2), rtol=1e-3, atol=1e-3)
    short = free_directions(torch.eye(6)[:, :5], second, 3)
    assert torch.equal(short[1:], torch.zeros(2, 6))
    torch.testing.assert_close(short[0].abs(), torch.eye(6)[5], rtol=1e-5, atol=1e-5)


def _outside_of(spaces: Subspaces, name: str, part: StackedMatrix, change: Tensor) -> float:
    """Largest entry of a change along any protected direction, as a share of its largest entry or, where that is
    rounding itself, of what a thousandth of the weight would be."""
    worst = 0.0
    for which, matrix in enumerate(change.reshape(-1, *change.shape[-2:])):
        basis = spaces.bases.get(f"{name}|{which}")
        if basis is not None:
            worst = max(worst, float((matrix @ basis).abs().max()) if basis.shape[1] else 0.0)
    return worst / max(float(change.abs().max()), 1e-3 * float(part.base.abs().max()))


def test_gradient_projection_moves_weights_only_where_old_inputs_are_not(tiny_store: Store) -> None:
    """With strong decay and AdamW, neither of which respects a projected gradient."""
    stages = (("block",), ("death",), ("dose", "days"))
    learner = learned(tiny_store, stages[:2], {"name": "gpm"}, train={"weight_decay": 1.0})
    assert isinstance(learner.method, GPM)
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    spaces = Subspaces(learner.method.spaces.bases)
    learner.learn(tiny_store, Stage(tasks=stages[2]))
    moved, projected = set(), 0
    for name, part in growables(learner.model):
        if isinstance(part, StackedMatrix) and f"{name}.base" in before:
            change = part.base - before[f"{name}.base"]
            rows = spaces.rows(name)
            if rows is not None:
                assert not change[rows > 0].any()
            else:
                assert _outside_of(spaces, name, part, change) < 1e-3, name
                projected += f"{name}|0" in spaces.bases
            moved |= {name} if change.any() else set()
    assert "blocks.0.pool.fc1" in moved
    assert projected > 5
    for name, p in learner.model.named_parameters():
        if name in before and not name.endswith(".base"):
            assert torch.equal(p, before[name]), name


def test_gradients_are_projected_before_the_optimizer_sees_them(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "gpm"})
    assert isinstance(learner.method, GPM)
    context = context_of(learner, tiny_store, ("days",))
    part = context.model.get_submodule("blocks.0.pool.fc1")
    assert isinstance(part, StackedMatrix)
    raw = torch.randn(part.shape)
    part.base.grad = raw.clone()
    learner.method.adjust_gradients(context.model)
    assert part.base.grad is not None
    for which in range(part.matrices):
        m = learner.method.spaces.bases[f"blocks.0.pool.fc1|{which}"]
        torch.testing.assert_close(part.base.grad[which], raw[which] - raw[which] @ m @ m.T, rtol=1e-4, atol=1e-5)


def test_inflora_trains_one_factor_in_directions_free_of_earlier_inputs(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "inflora"})
    assert isinstance(learner.method, InfLoRA)
    spaces = Subspaces(learner.method.spaces.bases)
    context = context_of(learner, tiny_store, STREAM[2])
    trainable = {n for n, p in context.model.named_parameters() if p.requires_grad}
    assert "blocks.0.pool.fc1.delta_a" in trainable
    assert not any(name.endswith("delta_b") for name in trainable)
    designed = context.model.get_parameter("blocks.0.pool.fc1.delta_b").clone()
    learner = learned(tiny_store, STREAM[:2], {"name": "inflora"})
    learner.learn(tiny_store, Stage(tasks=STREAM[2]))
    part = learner.model.get_submodule("blocks.0.pool.fc1")
    assert isinstance(part, StackedMatrix)
    update = part.slice(2)
    assert isinstance(update, LowRank)
    assert torch.equal(update.b, designed)
    checked = 0
    for name, matrix in growables(learner.model):
        if isinstance(matrix, StackedMatrix) and 2 in matrix.stages:
            kept = matrix.slice(2)
            dense = kept if isinstance(kept, Tensor) else kept.dense()
            assert _outside_of(spaces, name, matrix, dense.view(matrix.shape)) < 1e-4, name
            checked += 1
    assert checked > 5


def test_the_penalty_of_o_lora_is_zero_for_orthogonal_factors(tiny_store: Store) -> None:
    learner = learned(tiny_store, (("death",), ("days",)), {"name": "olora", "strength": 3.0, "rank": 1})
    context = context_of(learner, tiny_store, ("codes",))
    found = learner.method.penalty(context.model, [])
    assert found is not None
    expected = 0.0
    for _, part in growables(context.model):
        if isinstance(part, StackedMatrix) and part.delta_stage == 2 and 1 in part.stages:
            old, new = part.slice(1), part.update()
            if isinstance(old, LowRank) and isinstance(new, LowRank):
                for a, b in zip(old.b.reshape(-1, part.shape[-1]), new.b.reshape(-1, part.shape[-1]), strict=True):
                    expected += 3.0 * float((a @ b).detach()) ** 2
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    found.backward()
    assert context.model.get_parameter("blocks.0.pool.fc1.delta_b").grad is not None
    for _, part in growables(context.model):
        if isinstance(part, StackedMatrix) and part.delta_stage == 2 and 1 in part.stages:
            old, new = part.slice(1), part.update()
            if isinstance(old, LowRank) and isinstance(new, LowRank):
                with torch.no_grad():
                    along = old.b * (new.b * old.b).sum(-1, keepdim=True) / old.b.square().sum(-1, keepdim=True)
                    new.b.sub_(along)
    orthogonal = learner.method.penalty(context.model, [])
    assert orthogonal is not None
    assert orthogonal.item() < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lora_at_equal_parameters_stores_as_much_as_flame_and_no_more(tiny_store: Store, rank: int) -> None:
    """What both store is counted on models, not by the formula; every update and every copy is made to be kept."""

    def stored(method: dict[str, Any]) -> tuple[int, Learner]:
        learner = learned(tiny_store, TWO[:1], method)
        before = {name for name, _ in growables(learner.model)}
        context = context_of(learner, tiny_store, ("days",))
        with torch.no_grad():
            for p in context.model.parameters():
                if p.requires_grad:
                    p += 0.01 * torch.randn_like(p)
        learner.method.compress(context)
        learner.method.commit(context.model, 1)
        grown = [part for name, part in growables(context.model) if name in before]
        numbers = sum(t.numel() for p in grown for n, t in p.state_dict().items() if "slice1" in n or n == "copies.1")
        return numbers, learner

    flame, _ = stored({"name": "flame", "rank": rank})
    equal, learner = stored({"name": "lora_equal", "rank": rank})
    steps, ranks = [], []
    for _, part in growables(learner.model):
        if isinstance(part, StackedMatrix) and 1 in part.stages:
            kept = part.slice(1)
            if isinstance(kept, LowRank):
                ranks.append(kept.a.shape[-1])
                steps.append(part.matrices * sum(part.shape[-2:]))
    assert 0 <= flame - equal < max(steps)
    assert min(ranks) >= rank
    assert max(ranks) - min(ranks) <= 3
    assert equal > stored({"name": "lora", "rank": rank})[0]


def test_lora_at_equal_parameters_follows_a_budget_and_refuses_an_energy(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "flame"})
    context_of(learner, tiny_store, ("days",))
    dense = stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(rank=None))
    vectors = stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(rank=0))
    half = stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(keep="budget", budget=0.5))
    assert half == vectors + (dense - vectors) // 2
    assert stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(keep="budget", budget=700)) == vectors + 700
    with pytest.raises(RecipeError, match="energy"):
        make_method(MethodConfig(name="lora_equal", keep="energy"))


def test_ranks_grow_evenly_until_nothing_more_fits() -> None:
    shapes = {"a": torch.Size((4, 10, 6)), "b": torch.Size((8, 8)), "c": torch.Size((3, 1))}
    # One more rank costs 64, 16 and, beyond the dense 3 numbers of c, nothing.
    assert ranks_within(shapes, 0) == {"a": 1, "b": 1, "c": 1}
    assert ranks_within(shapes, 64 + 16 + 3) == {"a": 1, "b": 1, "c": 1}
    assert ranks_within(shapes, 2 * 64 + 2 * 16 + 3) == {"a": 2, "b": 2, "c": 1}
    assert ranks_within(shapes, 2 * 64 + 3 * 16 + 3 + 15) == {"a": 2, "b": 3, "c": 1}
    assert ranks_within(shapes, 10**6) == {"a": 6, "b": 8, "c": 1}
