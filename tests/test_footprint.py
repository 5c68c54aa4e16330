"""The sizes that are reported are those of the tensors that predicting really reads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from flame_moe.analysis.footprint import PartSize, footprint
from flame_moe.continual import METHODS, Learner
from flame_moe.continual.truncation import by_weight
from flame_moe.data.loader import Loader
from flame_moe.data.store import Store
from flame_moe.nn.stacked import StackedMatrix, StageVector, growables
from flame_moe.runs import MODEL, Run, run
from flame_moe.schema import MethodConfig
from flame_moe.training import memory
from flame_moe.training.memory import PeakMemory
from tests.tiny import recipe

SHOWN = ("flame", "finetune")


@pytest.fixture(scope="module", params=SHOWN)
def learner(request: pytest.FixtureRequest, tiny_store: Store) -> Learner:
    plan = recipe(method={"name": request.param}, train={"epochs": 1})
    found = Learner(plan)
    for stage in plan.stages:
        found.learn(tiny_store, stage)
    return found


def total(learner: Learner, size: str) -> int:
    return sum(getattr(part, size) for part in footprint(learner.model))


def logits(learner: Learner, store: Store) -> dict[str, torch.Tensor]:
    found = {}
    with torch.inference_mode():
        for name, task in learner.tasks.items():
            rows = store.indices(name, "train", modalities=task.modalities)[:24]
            (batch,) = Loader(store, learner.preprocessor, task, rows, 24).batches(None)
            found[name] = learner.model.eval()(batch, learner.cursor(name)).logits.clone()
    return found


def test_accounting_a_is_every_number_that_changes_some_prediction(learner: Learner, tiny_store: Store) -> None:
    before, read = logits(learner, tiny_store), {}
    for name, tensor in learner.model.state_dict().items():
        kept = tensor.clone()
        tensor.fill_(math.nan)
        after = logits(learner, tiny_store)
        read[name] = any(not torch.equal(after[task], before[task]) for task in before)
        tensor.copy_(kept)
    state = learner.model.state_dict()
    assert total(learner, "inference_parameters") == sum(
        state[name].numel() for name, is_read in read.items() if is_read
    )
    unread = {name for name, is_read in read.items() if not is_read}
    assert {name.rsplit(".", 1)[1] for name in unread} == {"noise", "absent"}
    (absent,) = [name for name in unread if name.endswith("absent")]
    assert absent.endswith("heads.codes.absent"), "it reads one modality"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in SHOWN])
def test_accounting_a_is_what_predictions_read_whatever_the_method(name: str, tiny_store: Store) -> None:
    plan = recipe(train={"epochs": 1})
    learner = Learner(plan)
    learner.learn(tiny_store, plan.stages[0])
    learner = learner.with_method(MethodConfig(name=name), tiny_store)
    for stage in plan.stages[1:]:
        learner.learn(tiny_store, stage)
    test_accounting_a_is_every_number_that_changes_some_prediction(learner, tiny_store)


def test_accounting_b_is_bases_slices_and_copies(learner: Learner) -> None:
    expected = 0
    for _, part in growables(learner.model):
        if isinstance(part, StackedMatrix):
            expected += part.base.numel()
            for stage, kind in part.structure()["slices"].items():
                *lead, out, width = part.base.shape
                expected += math.prod(lead) * (out * width if kind == "dense" else kind * (out + width))
                assert int(stage) > 0
        elif isinstance(part, StageVector):
            expected += sum(copy.numel() for copy in part.copies.values())
    assert total(learner, "method_parameters") == expected


def test_what_is_live_is_part_of_a_which_is_part_of_what_is_stored(learner: Learner) -> None:
    for part in footprint(learner.model):
        assert part.live_parameters <= part.inference_parameters <= part.stored_parameters, part
        assert part.method_parameters <= part.inference_parameters, part
    grown = {part.part: part for part in footprint(learner.model)}
    assert grown["heads"].method_parameters == grown["routers"].method_parameters == 0


def test_an_update_of_rank_r_costs_r_times_both_sides() -> None:
    learner = Learner(recipe())
    experts = _experts(learner)
    for _, matrix in growables(learner.model):
        if isinstance(matrix, StackedMatrix) and matrix.base.shape == (4, 8, 8):
            matrix.grow(1)
            assert matrix.delta is not None
            matrix.delta.data[:, 0, 0] = 1.0
            matrix.commit(by_weight(2))
    matrices = sum(isinstance(m, StackedMatrix) and m.base.shape == (4, 8, 8) for _, m in growables(learner.model))
    after = _experts(learner)
    assert matrices > 0
    assert after.method_parameters - experts.method_parameters == matrices * 4 * 2 * (8 + 8)
    assert after.live_parameters == experts.live_parameters


def _experts(learner: Learner) -> PartSize:
    return next(part for part in footprint(learner.model) if part.part == "experts")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell its peak memory")
def test_the_peak_of_memory_is_that_of_its_own_stretch() -> None:
    large = torch.ones(64 << 18)  # 64 MB
    first = PeakMemory()
    del large
    quiet = PeakMemory()
    before = quiet.bytes
    assert before is not None
    another = torch.ones(32 << 18)
    grown = quiet.bytes
    assert grown is not None
    assert grown - before >= another.numel() * 4 * 0.9
    assert first.bytes == grown, "there is one count per process, started anew by the last"


def test_a_system_that_does_not_tell_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)
    assert PeakMemory().bytes is None


def test_what_a_method_keeps_beside_the_model_is_counted_as_stored_and_no_more(
    tiny_store: Store, tmp_path: Path
) -> None:
    plan = recipe([["death"], ["stage"]], method={"name": "ewc", "rank": 16}, train={"epochs": 1, "bootstrap": 0})
    run(plan, tmp_path / "run", store=tiny_store)
    found = Run.open(tmp_path / "run")
    rows = [row for row in found.results.footprint if row.after_stage == 1]
    (kept,) = [row for row in rows if row.part == "memory"]
    state = found.learner.method.state().tensors
    assert kept.stored_parameters == sum(t.numel() for t in state.values()) > 0
    assert kept.stored_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert (kept.live_parameters, kept.inference_parameters, kept.method_parameters) == (0, 0, 0)
    tensors = safetensors.torch.load_file(tmp_path / "run" / MODEL / "tensors.safetensors")
    assert sum(row.stored_parameters for row in rows) == sum(t.numel() for t in tensors.values())
