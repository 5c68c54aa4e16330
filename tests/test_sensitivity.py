"""What the loss feels: squared gradients against their definition, and that nothing else is touched."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from flame_moe.continual import Learner
from flame_moe.continual.methods import base as module
from flame_moe.continual.sensitivity import squared_gradients
from flame_moe.data.store import Store
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.training.seeding import generator
from tests.methods import context_of, learned

TASKS = ("days", "death")


@pytest.fixture
def begun(tiny_store: Store) -> Learner:
    return learned(tiny_store, [("stage", "codes")], {"name": "flame", "rank": 2})


def test_they_are_the_mean_square_of_each_rows_gradient_over_drawn_batches(
    begun: Learner, tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLED", 6)
    context = context_of(begun, tiny_store, TASKS)
    model = context.model
    parts = {n: p for n, p in growables(model) if isinstance(p, StackedMatrix) and p.delta is not None}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    got = squared_gradients(context, parts)
    assert model.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    expected = {n: torch.zeros(p.matrices, p.shape[-2]).double() for n, p in parts.items()}
    batches = 0
    for name, problem in context.problems.items():
        draw = generator(context.seed, "truncation", context.stage, name)
        for batch in islice(problem.train.batches(draw), 3):
            batches += 1
            loss = problem.task.weight * problem.losses(model(batch, 1).logits, batch.target).mean()
            deltas = [p.delta for p in parts.values()]
            grads = torch.autograd.grad(loss, [d for d in deltas if d is not None], allow_unused=True)
            for n, grad in zip(parts, grads, strict=True):
                if grad is not None:
                    expected[n] += grad.double().square().sum(-1).view(expected[n].shape)
    assert any(e.any() for e in expected.values())
    for n in parts:
        torch.testing.assert_close(got[n], expected[n] / batches, rtol=1e-4, atol=1e-12)


def test_they_do_not_depend_on_chance_outside_of_the_seed(begun: Learner, tiny_store: Store) -> None:
    context = context_of(begun, tiny_store, TASKS)
    parts = {n: p for n, p in growables(context.model) if isinstance(p, StackedMatrix) and p.delta is not None}
    torch.manual_seed(1)
    one = squared_gradients(context, parts)
    torch.manual_seed(2)
    two = squared_gradients(context, parts)
    assert all(torch.equal(one[n], two[n]) for n in parts)
