"""The whole network: a sample's logits are its own, presets are what they say, and no weight is dead."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_moe.analysis.footprint import footprint
from flame_moe.batch import FlexiBatch, ModalityBatch, Sample
from flame_moe.data.loader import make_batch
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.errors import RecipeError
from flame_moe.nn import Flame
from flame_moe.nn.block import PRESETS
from flame_moe.nn.gating import Router
from flame_moe.schema import Task
from tests.methods import learned
from tests.tiny import BY_NAME, EVERYTHING, MODALITIES, STREAM, batch_of, flame, full_batch, sample

CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
NAMES = EVERYTHING.modalities
SUBSETS = [s for r in range(1, len(NAMES) + 1) for s in itertools.combinations(NAMES, r)]


def patients(seed: int = 0) -> list[Sample]:
    """One sample for each of the 2^M - 1 non-empty subsets of modalities."""
    generator = np.random.default_rng(seed)
    return [sample(i, generator, names) for i, names in enumerate(SUBSETS)]


def choices(model: Flame, batch: FlexiBatch) -> dict[tuple[int, str, str], list[int]]:
    """(block, modality, sample id) -> experts."""
    with torch.no_grad():
        routing = model(batch, 0).routing
    found = {}
    for b, routed in enumerate(routing):
        for name, r in routed.items():
            for row, chosen in zip(batch.modalities[name].rows.tolist(), r.chosen.tolist(), strict=True):
                found[b, name, batch.ids[row]] = chosen
    return found


def logits(model: Flame, batch: FlexiBatch) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(batch, 0).logits
    return out


def longer(part: ModalityBatch, extra: int) -> ModalityBatch:
    """The same sequences with more padding, filled with garbage that nothing may read."""

    def pad(x: Tensor | None, fill: float) -> Tensor | None:
        if x is None:
            return None
        shape = (x.shape[0], extra, *x.shape[2:])
        return torch.cat([x, torch.full(shape, fill, dtype=x.dtype)], dim=1)

    values = pad(part.values, 1e6)
    assert values is not None
    return part._replace(values=values, times=pad(part.times, 0.5), observed=pad(part.observed, 0.0), places=None)


@pytest.fixture(params=[{}, {"preset": "paper"}, {"blocks": 2, "readout": "attention"}, {"readout": "last"}])
def model(request: pytest.FixtureRequest) -> Flame:
    return flame(**request.param)


def test_all_subsets_of_modalities_in_one_batch_equal_each_sample_alone(model: Flame) -> None:
    samples = patients()
    together = logits(model, batch_of(samples))
    assert together.shape == (len(SUBSETS), 3)
    alone = torch.cat([logits(model, batch_of([s])) for s in samples])
    assert torch.allclose(together, alone, **CLOSE)


def test_the_routing_decision_does_not_depend_on_the_batch(model: Flame) -> None:
    samples = patients()
    together = choices(model, batch_of(samples))
    alone: dict[Any, list[int]] = {}
    for s in samples:
        alone |= choices(model, batch_of([s]))
    assert together == alone


def test_the_order_of_samples_changes_nothing(model: Flame) -> None:
    samples = patients()
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))
    shuffled = logits(model, batch_of([samples[i] for i in order.tolist()]))
    assert torch.allclose(shuffled, logits(model, batch_of(samples))[order], **CLOSE)


def test_padding_changes_nothing(model: Flame) -> None:
    batch = batch_of(patients())
    parts = {n: p if BY_NAME[n].kind == "table" else longer(p, 3) for n, p in batch.modalities.items()}
    padded = batch._replace(modalities=parts)
    assert torch.allclose(logits(model, padded), logits(model, batch), **CLOSE)
    assert choices(model, padded) == choices(model, batch)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_the_content_of_absent_values_changes_nothing_and_has_no_gradient(model: Flame, garbage: float) -> None:
    batch = batch_of(patients())
    parts, leaves = {}, {}
    for name, part in batch.modalities.items():
        there = part.mask[..., None].expand_as(part.values) if part.observed is None else part.observed
        values = torch.where(there, part.values, garbage).requires_grad_()
        parts[name], leaves[name] = part._replace(values=values), (values, there)
    out = model(batch._replace(modalities=parts), 0).logits
    assert torch.equal(out.detach(), logits(model, batch))
    out.square().sum().backward()
    for name, (values, there) in leaves.items():
        if BY_NAME[name].kind == "codes":
            assert values.grad is None, "whole numbers have no gradient"
            continue
        assert values.grad is not None
        assert not bool(values.grad[~there].any()), name
        assert bool(values.grad[there].any()), name
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), kept=st.lists(st.integers(0, len(SUBSETS) - 1), min_size=1, max_size=6, unique=True))
def test_batch_mates_change_nothing_whoever_they_are(seed: int, kept: list[int]) -> None:
    model, samples = flame(), patients(seed)
    some = logits(model, batch_of([samples[i] for i in kept]))
    assert torch.allclose(some, logits(model, batch_of(samples))[kept], **CLOSE)


def test_modalities_that_the_task_does_not_read_change_nothing() -> None:
    task = Task(name="two", kind="binary", modalities=("vitals", "static"), classes=("no", "yes"))
    model, generator = flame([task]), np.random.default_rng(0)
    batch = batch_of([sample(i, generator, NAMES) for i in range(4)], EVERYTHING)._replace(task="two")
    fewer = {name: batch.modalities[name] for name in task.modalities}
    assert torch.equal(logits(model, batch), logits(model, batch._replace(modalities=fewer)))
    assert set(model(batch, 0).routing[0]) == set(task.modalities)


def test_the_head_reads_modalities_in_the_tasks_order_whatever_the_batchs() -> None:
    model, batch = flame(), full_batch(4)
    turned = batch._replace(modalities=dict(reversed(batch.modalities.items())))
    assert torch.equal(logits(model, batch), logits(model, turned))
    other = EVERYTHING.model_copy(update={"name": "other", "modalities": tuple(reversed(NAMES))})
    model.add_task(other)
    model.eval()
    with torch.no_grad():
        mine, theirs = model.heads["everything"], model.heads["other"]
        theirs.absent.copy_(mine.absent.flip(0))
        theirs.linear.bias.copy_(mine.linear.bias)
        theirs.linear.weight.copy_(mine.linear.weight.unflatten(1, (len(NAMES), 8)).flip(1).flatten(1))
    assert torch.allclose(logits(model, batch), logits(model, batch._replace(task="other")), **CLOSE)


def test_the_vector_of_an_absent_modality_learns_only_where_it_is_absent() -> None:
    model, generator = flame(), np.random.default_rng(0)
    model(batch_of([sample(0, generator, NAMES), sample(1, generator, NAMES[:2])]), 0).logits.sum().backward()
    gradient = model.heads["everything"].absent.grad
    assert gradient is not None
    assert [bool(row.any()) for row in gradient] == [False, False] + [True] * (len(NAMES) - 2)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_gives_finite_logits_and_gradients_for_every_subset(preset: str) -> None:
    model = flame(preset=preset).train()
    output = model(batch_of(patients()), 0)
    (output.logits.square().sum() + output.aux).backward()
    assert bool(torch.isfinite(output.logits).all())
    assert bool(torch.isfinite(output.aux))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("change", [{"preset": p} for p in PRESETS] + [{"readout": "attention"}, {"blocks": 2}])
def test_no_weight_is_dead(change: dict[str, Any]) -> None:
    model = flame(dropout=0.0, **change).train()
    for seed in range(4):
        torch.manual_seed(seed)
        output = model(batch_of(patients(seed)), 0)
        ((output.logits * torch.randn(len(SUBSETS), 3)).sum() + output.aux).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize(("preset", "residual"), [("residual", True), ("paper", False), ("reference", False)])
def test_presets_have_or_have_no_residual_path(preset: str, residual: bool) -> None:
    model = flame(preset=preset)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output" in name or ".fc2" in name:
                parameter.zero_()
    changed = logits(model, full_batch(4, seed=1)) - logits(model, full_batch(4, seed=2))
    assert (float(changed.abs().max()) > 1e-4) is residual


def test_the_preset_without_experts_has_none() -> None:
    names = [name for name, _ in flame(preset="no_moe").named_parameters()]
    assert not any(".pool." in name or ".routers." in name for name in names)
    assert float(flame(preset="no_moe").train()(full_batch(), 0).aux) == 0.0


def test_dense_has_the_active_parameters_of_routed_minus_the_router() -> None:
    sizes = {p: {s.part: s.live_parameters for s in footprint(flame(preset=p))} for p in ("residual", "dense")}
    routed, dense = sizes["residual"], sizes["dense"]
    assert dense["experts"] == routed["experts"] * 2 // 4
    assert dense["routers"] == 0
    assert all(dense[part] == routed[part] for part in ("encoders", "attention", "heads"))


def test_dense_runs_its_experts_on_everybody() -> None:
    model = flame(preset="dense").train()
    model(full_batch(), 0).logits.sum().backward()
    pool = model.blocks[0].pool
    assert pool.conv.base.grad is not None
    assert all(bool(g.any()) for g in pool.conv.base.grad)
    assert len(pool.conv.base) == 2


def test_the_shared_router_is_one_and_the_others_are_one_per_modality() -> None:
    routers = {p: [m for m in flame(preset=p).modules() if isinstance(m, Router)] for p in PRESETS}
    counts, each = {p: len(found) for p, found in routers.items()}, len(NAMES)
    assert counts == {"residual": each, "paper": each, "reference": each, "no_moe": 0, "dense": 0, "shared_router": 1}
    assert not any(bool(h.gate.any()) for r in routers["reference"] for h in r.heads.values())


def test_only_the_residual_presets_know_positions() -> None:
    assert {name for name, preset in PRESETS.items() if not preset.positions} == {"paper", "reference"}
    assert {name for name, preset in PRESETS.items() if preset.readout == "last"} == {"paper", "reference"}


def test_the_auxiliary_loss_weighs_balance_and_interaction() -> None:
    values = {}
    for balance, interaction in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.01, 0.1)):
        model = flame(balance=balance, interaction=interaction)
        values[balance, interaction] = float(model(full_batch(), 0).aux.detach())
    assert values[0.0, 0.0] == 0.0
    assert values[0.01, 0.0] > 0
    assert values[0.01, 0.1] == pytest.approx(values[0.01, 0.0] + values[0.0, 0.1], rel=1e-5)


def test_evaluation_draws_no_random_number_and_training_does() -> None:
    model, batch = flame(), full_batch()
    state = torch.get_rng_state()
    assert torch.equal(logits(model, batch), logits(model, batch))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))


def test_unknown_tasks_and_modalities_are_named() -> None:
    model, batch = flame(), full_batch()
    with pytest.raises(RecipeError, match=r"no task 'everythin'\. Did you mean 'everything'"):
        model(batch._replace(task="everythin"), 0)
    with pytest.raises(RecipeError, match=r"unknown modality 'vital'.*Did you mean 'vitals'"):
        model.add_task(Task(name="new", kind="binary", modalities=("vital",), classes=("no", "yes")))


def test_state_dict_brings_the_logits_back() -> None:
    one, two = flame(seed=0), flame(seed=1)
    assert not torch.equal(logits(one, full_batch()), logits(two, full_batch()))
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(logits(one, full_batch()), logits(two, full_batch()))
    assert [m.name for m in MODALITIES] == list(one.modalities)


def test_tasks_at_different_cursors_in_one_pass_say_what_each_says_alone(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM, {"name": "flame", "rank": 2})
    model = learner.model.eval()
    cursors = {name: learner.cursor(name) for name in learner.tasks}
    assert len(set(cursors.values())) > 1
    preprocessor = Preprocessor.from_store(tiny_store)
    batches = [
        (make_batch(tiny_store, preprocessor, task, tiny_store.indices(name, "train")[:7]), cursors[name])
        for name, task in learner.tasks.items()
    ]
    with torch.inference_mode():
        for (batch, cursor), got in zip(batches, model.together(batches), strict=True):
            alone = model(batch, cursor)
            torch.testing.assert_close(got.logits, alone.logits, atol=1e-5, rtol=1e-5)
            chosen = [{n: r.chosen.tolist() for n, r in routed.items()} for routed in got.routing]
            assert chosen == [{n: r.chosen.tolist() for n, r in routed.items()} for routed in alone.routing]
    assert model.together([]) == []
