"""The model does no more than it did: counted operations against committed ones, and nothing waits for the device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import operations
from flame_moe.batch import FlexiBatch
from flame_moe.nn import moe
from flame_moe.nn.block import PRESETS
from flame_moe.nn.blocks import by_blocks
from flame_moe.nn.losses import task_loss
from flame_moe.nn.model import Flame
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.schema import Task
from tests.syncs import ALLOWED, Sync, Syncs
from tests.tiny import EVERYTHING, batch_of, flame, sample


def test_a_model_does_at_most_a_quarter_more_than_the_committed_counts() -> None:
    """`python -m benchmarks.operations --renew` renews them, which the commit has to justify."""
    committed = json.loads(operations.COMMITTED.read_text(encoding="utf-8"))
    found = operations.counts()
    assert {case: list(row) for case, row in found.items()} == {case: list(row) for case, row in committed.items()}
    assert operations.excess(found, committed) == []


def test_a_count_that_grew_by_more_than_a_quarter_is_told() -> None:
    committed = {"model": {"operations": 100, "nodes": 100}}
    assert operations.excess({"model": {"operations": 125, "nodes": 126}}, committed) == [
        "model: 126 nodes, 1.26 times the committed 100"
    ]


ONE, TWO, MANY = torch.tensor(1.0), torch.tensor([2, 1]), torch.arange(4.0)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("tolist", lambda: MANY.tolist()),
        ("item", lambda: ONE.item()),
        ("__float__", lambda: float(ONE)),
        ("__int__", lambda: int(ONE)),
        ("__bool__", lambda: 1 if ONE > 0 else 0),
        ("__index__", lambda: [0, 1, 2][TWO[0]]),
        ("numpy", lambda: MANY.numpy()),
        ("nonzero", lambda: MANY.nonzero()),
        ("nonzero", lambda: torch.where(MANY > 1)),
        ("masked_select", lambda: torch.masked_select(MANY, MANY > 1)),
        ("equal", lambda: torch.equal(MANY, MANY)),
        ("bincount", lambda: torch.bincount(TWO)),
        ("repeat_interleave", lambda: torch.repeat_interleave(TWO)),
        ("boolean index", lambda: MANY[MANY > 1]),
        ("boolean index", lambda: MANY.clone().index_put_((MANY > 1,), ONE)),
    ],
)
def test_whatever_waits_for_the_device_is_seen(what: str, call: Callable[[], object]) -> None:
    with Syncs() as syncs:
        call()
    assert syncs.found == [Sync("", "", what)]


def test_what_does_not_wait_is_not_taken_for_it() -> None:
    with Syncs() as syncs:
        torch.where(MANY > 1, MANY, 0.0).masked_fill(MANY > 2, 1.0).index_select(0, TWO)[TWO - 1].sort()
        torch.repeat_interleave(TWO, output_size=3)
    assert syncs.found == []


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_a_model_waits_for_the_device_once_per_block_for_the_rows_of_its_experts(preset: str, mode: str) -> None:
    found = waits(flame((EVERYTHING,), preset=preset, blocks=2), EVERYTHING, mode)
    blocks = 0 if PRESETS[preset].experts == "none" else 2
    assert found == {place: blocks for place in ALLOWED if blocks}


def test_a_later_stage_waits_no_more_than_the_first() -> None:
    model = flame((EVERYTHING,))
    for stage in (1, 2):
        model.add_router_heads(EVERYTHING.modalities, stage)
        for _, part in model.growables(EVERYTHING.modalities):
            part.grow(stage)
            if stage == 1:
                part.commit()
    assert waits(model, EVERYTHING, "training", cursor=2) == dict.fromkeys(ALLOWED, 1)


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_the_pass_for_a_gpu_waits_for_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "apply_experts", by_blocks)
    assert waits(flame((EVERYTHING,), blocks=2), EVERYTHING, mode) == {}


def test_the_mixture_waits_once() -> None:
    model = flame((EVERYTHING,))
    block, ready = next(iter(model.before_experts(ragged(EVERYTHING), 0)))
    assert block.pool is not None
    with Syncs() as syncs:
        routings = block.route(ready, 0)
        out = mixture({name: Sequences(*z) for name, z in ready.items()}, routings, block.pool, 0)
    assert set(out) == set(EVERYTHING.modalities)
    assert syncs.found == list(ALLOWED)


def ragged(task: Task) -> FlexiBatch:
    """A batch of different lengths, some modalities missing."""
    generator = np.random.default_rng(0)
    names = task.modalities
    return batch_of([sample(i, generator, names[i % 3 :] or names) for i in range(6)], task)


def waits(model: Flame, task: Task, mode: str, cursor: int = 0) -> Counter[Sync]:
    """Of a forward pass in evaluation mode; or of forward, backward and clipping in training mode."""
    batch = ragged(task)
    model.train(mode == "training")
    with Syncs() as syncs, torch.set_grad_enabled(mode == "training"):
        out = model(batch, cursor)
        if mode == "training":
            loss: Tensor = task_loss(task, out.logits, batch.target).mean() + out.aux
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return Counter(syncs.found)
