"""Later stages change nothing for earlier tasks, bit for bit; what should train does train."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_moe.analysis.footprint import footprint
from flame_moe.batch import Sample
from flame_moe.continual import Learner
from flame_moe.continual.methods import make_method
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, RecipeError
from flame_moe.nn.gating import Router
from flame_moe.nn.stacked import StackedMatrix, StageVector, growables
from flame_moe.runs import run
from flame_moe.schema import MethodConfig, Recipe, Stage
from flame_moe.training.monitor import Monitor
from tests.example_stores import random_samples, write
from tests.tiny import STREAM, recipe

Logits = NDArray[np.float32]
FLAME_STREAMS: dict[str, dict[str, Any]] = {
    "rank 0": {"method": {"rank": 0}},
    "rank 4": {"method": {"rank": 4}},
    "dense": {"method": {"rank": None}},
    "strong decay": {"train": {"weight_decay": 1.0}},
    "no decay": {"train": {"weight_decay": 0.0}},
    "shared router": {"model": {"preset": "shared_router"}},
    "two blocks of the paper": {"model": {"preset": "paper", "blocks": 2}},
    "no experts": {"model": {"preset": "no_moe"}},
    "attention read-out": {"model": {"readout": "attention"}},
    "codes, pictures and signals": {"stages": (("block",), ("death",), ("dose", "stage"))},
    "codes, pictures and signals, dense": {"stages": (("dose",), ("block",)), "method": {"rank": None}},
}


def everyone(learner: Learner, store: Store) -> dict[str, Logits]:
    """Logits of every task learned so far, on all samples that it can read."""
    found = {}
    for name, task in learner.tasks.items():
        found[name] = learner.predict(store, name, store.indices(modalities=task.modalities)).logits
    return found


def bits(logits: Logits) -> bytes:
    return logits.tobytes()


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


class Stages:
    """A learned stream: the learner, and every task's logits right after its own stage."""

    def __init__(self, plan: Recipe, store: Store) -> None:
        self.learner = Learner(plan)
        self.first: dict[str, Logits] = {}
        self.after: list[dict[str, Logits]] = []
        for stage in plan.stages:
            self.learner.learn(store, stage)
            self.after.append(everyone(self.learner, store))
            self.first = {**self.after[-1], **self.first}


@pytest.fixture(scope="module")
def flame(tiny_store: Store) -> Stages:
    return Stages(recipe(), tiny_store)


@pytest.fixture(scope="module")
def fine(tiny_store: Store) -> Stages:
    return Stages(recipe((("death",), ("days",)), method={"name": "finetune"}), tiny_store)


@pytest.mark.parametrize("kind", list(FLAME_STREAMS))
def test_old_tasks_keep_their_logits_bit_for_bit_after_every_later_stage(
    tiny_store: Store, tmp_path: Path, kind: str
) -> None:
    stages = Stages(recipe(**FLAME_STREAMS[kind]), tiny_store)
    for later in stages.after:
        for task, logits in later.items():
            assert bits(logits) == bits(stages.first[task]), task
    loaded = everyone(Learner.load(stages.learner.save(tmp_path / "model")), tiny_store)
    assert {t: bits(z) for t, z in loaded.items()} == {t: bits(z) for t, z in stages.first.items()}


def test_a_new_process_reads_the_same_bits(flame: Stages, tiny_store: Store, tmp_path: Path) -> None:
    flame.learner.save(tmp_path / "model")
    code = (
        "import sys; from flame_moe.continual import Learner; from flame_moe.data.store import Store\n"
        "from tests.test_continual import bits, digest, everyone; import torch\n"
        "found = everyone(Learner.load(sys.argv[1]), Store.open(sys.argv[2]))\n"
        "print(' '.join(t + '=' + digest(torch.from_numpy(z)) for t, z in sorted(found.items())))"
    )
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tiny_store.path)]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert out == [f"{t}={digest(torch.from_numpy(z))}" for t, z in sorted(flame.first.items())]


def test_fine_tuning_does_change_them(fine: Stages) -> None:
    """Otherwise the check above could not fail."""
    assert float(np.abs(fine.after[1]["death"] - fine.after[0]["death"]).max()) > 1e-3


def test_each_task_is_read_at_its_own_stage(flame: Stages) -> None:
    assert {t: flame.learner.cursor(t) for t in flame.learner.tasks} == {"death": 0, "stage": 1, "days": 2, "codes": 2}
    with pytest.raises(RecipeError, match=r"no task 'deth'\. Did you mean 'death'"):
        flame.learner.cursor("deth")


class Inspect(Monitor):
    """Looks at the model before training, after the first backward pass, and at the end of the stage."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.frozen: dict[str, str] = {}
        self.before: dict[str, Tensor] = {}
        self.first: dict[str, bool] | None = None

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        self.before = {name: p.detach().clone() for name, p in self.learner.model.named_parameters()}
        self.frozen = self.hashes()

    def step(self) -> None:
        if self.first is None:
            self.first = {
                name: p.grad is not None and bool(p.grad.any())
                for name, p in self.learner.model.named_parameters()
                if p.requires_grad
            }

    def hashes(self) -> dict[str, str]:
        model = self.learner.model
        kept = {name: digest(p) for name, p in model.named_parameters() if not p.requires_grad}
        return kept | {name: digest(b) for name, b in model.named_buffers()}

    def end(self) -> None:
        self.ended = self.hashes()
        self.gradients = [n for n, p in self.learner.model.named_parameters() if p.grad is not None]
        self.requires = [n for n, p in self.learner.model.named_parameters() if p.requires_grad]


@pytest.fixture(scope="module", params=[1.0, 0.0])
def inspected(request: pytest.FixtureRequest, tiny_store: Store) -> Inspect:
    """A third stage on known modalities, watched."""
    plan = recipe((("death",), ("stage",), ("days",)), train={"weight_decay": request.param})
    learner = Learner(plan)
    for stage in plan.stages[:-1]:
        learner.learn(tiny_store, stage)
    watch = Inspect(learner)
    learner.learn(tiny_store, plan.stages[-1], monitor=watch)
    return watch


def test_frozen_tensors_do_not_move(inspected: Inspect) -> None:
    assert inspected.frozen
    assert inspected.ended == inspected.frozen


def test_nothing_frozen_gets_a_gradient(inspected: Inspect) -> None:
    assert set(inspected.gradients) <= set(inspected.requires)


def test_everything_that_should_train_has_a_gradient_at_the_very_first_step(inspected: Inspect) -> None:
    assert inspected.first is not None
    assert [name for name, moved in inspected.first.items() if not moved] == []
    kinds = {"delta", "copies", "routers", "heads"}
    assert {kind for kind in kinds if any(kind in name.split(".") for name in inspected.first)} == kinds


def test_what_trains_is_new_and_belongs_to_the_stage(inspected: Inspect) -> None:
    for name in inspected.requires:
        where = name.split(".")
        new = where[-1] == "delta" or (where[-2] == "copies" and where[-1] == "2")
        router = "routers" in where and where[-2] == "2"
        assert new or router or name.startswith("heads.days"), name
        unread = {"notes", "static"} & set(where)
        assert not unread, name


@pytest.mark.parametrize("stream", [(("death",), ("stage",)), (("death",), ("codes",))])
def test_a_new_modality_trains_whole_at_its_first_stage(tiny_store: Store, stream: Any) -> None:
    plan = recipe(stream)
    learner = Learner(plan)
    learner.learn(tiny_store, plan.stages[0])
    watch = Inspect(learner)
    record = learner.learn(tiny_store, plan.stages[1], monitor=watch)
    assert watch.first is not None
    for modality in record.new_modalities:
        own = [n for n in watch.before if f".{modality}." in n]
        assert own
        assert set(own) <= set(watch.first)
        assert all(watch.first[name] for name in own)
        moved = dict(learner.model.named_parameters())
        assert all(not torch.equal(moved[name], watch.before[name]) for name in own)


def test_a_stage_that_does_not_use_a_weight_costs_nothing(flame: Stages) -> None:
    """Stage 1 reads image and notes only: paths of vitals and static have no slice of it."""
    for name, part in growables(flame.learner.model):
        if isinstance(part, StackedMatrix) and (".vitals." in name or ".static." in name):
            assert 1 not in part.stages
        if isinstance(part, StackedMatrix) and ".static." in name:
            assert part.stages == ()
    parts = {name: part for name, part in growables(flame.learner.model) if isinstance(part, StackedMatrix)}
    assert parts["blocks.0.pool.conv"].stages == (1, 2)
    assert parts["paths.image.encoder.project.weight"].base_stage == 1


def test_each_stage_has_router_heads_for_its_own_modalities_only(flame: Stages) -> None:
    heads = {
        name.split(".")[-1]: sorted(map(int, r.heads))
        for name, r in flame.learner.model.named_modules()
        if isinstance(r, Router)
    }
    assert heads == {"vitals": [0, 2], "static": [0], "image": [1, 2], "notes": [1, 2]}


def test_fine_tuning_keeps_one_router_head(fine: Stages, tiny_store: Store) -> None:
    heads = [len(r.heads) for r in fine.learner.model.modules() if isinstance(r, Router)]
    assert set(heads) == {1}
    assert not any(part.stages for _, part in growables(fine.learner.model) if isinstance(part, StackedMatrix))


@pytest.mark.parametrize("rank", [None, 8, 99])
def test_a_lossless_commit_leaves_the_new_tasks_logits_at_full_rank(tiny_store: Store, rank: int | None) -> None:
    plan = recipe((("death",), ("days",)), method={"rank": rank})
    learner, full = Learner(plan), {}
    learner.learn(tiny_store, plan.stages[0])
    learner.learn(tiny_store, plan.stages[1], before_commit=lambda it: full.update(everyone(it, tiny_store)))
    assert {t: bits(z) for t, z in everyone(learner, tiny_store).items()} == {t: bits(z) for t, z in full.items()}
    assert all(c.relative_error == 0.0 for c in learner.stages[1].commits)


def test_a_commit_of_low_rank_costs_what_it_says(flame: Stages) -> None:
    for part in [p for _, p in growables(flame.learner.model) if isinstance(p, StackedMatrix)]:
        *lead, out, width = part.base.shape
        for stage in part.stages:
            stored = part.slice(stage)
            numbers = sum(t.numel() for t in (stored if isinstance(stored, tuple) else (stored,)))
            assert numbers == int(np.prod(lead)) * min(2 * (out + width), out * width)
    errors = [c.relative_error for s in flame.learner.stages for c in s.commits]
    assert errors
    assert all(0.0 <= e <= 1.0 for e in errors)


def test_rank_zero_keeps_only_vectors_routers_and_heads(tiny_store: Store) -> None:
    learner = Stages(recipe(STREAM[:2], method={"rank": 0}), tiny_store).learner
    assert not any(p.stages for _, p in growables(learner.model) if isinstance(p, StackedMatrix))
    assert any(len(p.copies) > 1 for _, p in growables(learner.model) if isinstance(p, StageVector))
    assert {c.rank for c in learner.stages[1].commits} == {0}


def test_a_copy_with_another_method_starts_from_the_same_bits_and_shares_nothing(tiny_store: Store) -> None:
    plan = recipe((("death",), ("days",)))
    learner = Learner(plan)
    learner.learn(tiny_store, plan.stages[0])
    before = everyone(learner, tiny_store)["death"]
    twin = learner.with_method(MethodConfig(name="finetune"))
    assert bits(everyone(twin, tiny_store)["death"]) == bits(before)
    twin.learn(tiny_store, plan.stages[1])
    assert bits(everyone(learner, tiny_store)["death"]) == bits(before)
    assert bits(everyone(twin, tiny_store)["death"]) != bits(before)


def test_trainable_counts_are_what_the_stage_trained(flame: Stages) -> None:
    for stage in flame.learner.stages:
        assert set(stage.trainable) == {p.part for p in footprint(flame.learner.model)}
        assert stage.trainable["experts"] > 0
    model = flame.learner.model
    assert flame.learner.stages[2].trainable["heads"] == sum(
        p.numel() for t in ("days", "codes") for p in model.heads[t].parameters()
    )


def test_stages_that_do_not_fit_change_nothing(flame: Stages, tiny_store: Store) -> None:
    before = {n: digest(t) for n, t in flame.learner.model.state_dict().items()}
    for stage, message in (
        (Stage(tasks=("death",)), "task 'death' was learned in stage 0"),
        (Stage(tasks=("deths",)), r"unknown task 'deths'.*Did you mean 'death'"),
    ):
        with pytest.raises(RecipeError, match=message):
            flame.learner.learn(tiny_store, stage)
    assert {n: digest(t) for n, t in flame.learner.model.state_dict().items()} == before
    assert len(flame.learner.stages) == 3


def test_a_modality_of_another_shape_is_refused(tiny_store: Store, flame: Stages) -> None:
    learner = Learner(recipe())
    learner.learn(tiny_store, recipe().stages[0])
    vitals = learner.model.modalities["vitals"]
    learner.model.modalities["vitals"] = vitals.model_copy(update={"features": 9})
    with pytest.raises(DataError, match="modality 'vitals' is series with 3 features here, the model learned it as"):
        learner.learn(tiny_store, recipe().stages[2])


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown method 'flam'.*Did you mean 'flame'"):
        make_method(MethodConfig(name="flam"))


def test_there_is_nothing_to_load_where_nothing_was_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Learner.load(tmp_path)


def test_a_stage_that_fails_leaves_the_learner_as_it_was(tiny_store: Store) -> None:
    class Stop(Monitor):
        def step(self) -> None:
            raise KeyboardInterrupt

    plan = recipe()
    learner = Learner(plan)
    learner.learn(tiny_store, plan.stages[0])
    test = tiny_store.indices("death", "test")
    before, state = learner.predict(tiny_store, "death", test), dict(learner.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        learner.learn(tiny_store, plan.stages[1], monitor=Stop())
    assert len(learner.stages) == 1
    assert learner.model.state_dict().keys() == state.keys()
    assert np.array_equal(learner.predict(tiny_store, "death", test).logits, before.logits)
    straight = Learner(plan)
    straight.learn(tiny_store, plan.stages[0])
    for one in (learner, straight):
        one.learn(tiny_store, plan.stages[1])
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(learner.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ("hr", "temp", "sbp")}, r"has channel 1 'temp' here, 'sbp' where the model learned it"),
        ({"channels": ()}, r"names 0 channels here, 3 where the model learned it"),
        ({"units": ("bpm", "mmHg", "C")}, r"names 3 units here, 0 where the model learned it"),
        ({"kind": "timed"}, r"is timed with 3 features here, the model learned it as series with 3"),
        ({"features": 2, "channels": ("hr", "sbp")}, r"is series with 2 features here"),
        ({"rate": 250.0}, r"has rate 250.0 here, None where the model learned it"),
    ],
)
def test_a_known_modality_that_is_something_else_is_refused_for_learning_and_predicting(
    flame: Stages, tiny_store: Store, change: dict[str, Any], message: str
) -> None:
    other = Store(tiny_store.path, tiny_store.manifest)
    other.modalities["vitals"] = other.modalities["vitals"].model_copy(update=change)
    learner = Learner(recipe((("death",),), train={"epochs": 1}))
    learner.learn(tiny_store, learner.recipe.stages[0])
    before = {n: digest(t) for n, t in learner.model.state_dict().items()}
    with pytest.raises(DataError, match=f"modality 'vitals' {message}"):
        learner.learn(other, Stage(tasks=("days",)))
    with pytest.raises(DataError, match=f"modality 'vitals' {message}"):
        learner.predict(other, "death", tiny_store.indices("death", "test"))
    assert {n: digest(t) for n, t in learner.model.state_dict().items()} == before
    assert list(learner.tasks) == ["death"]


def test_a_declared_modality_without_any_training_sample_is_refused(tmp_path: Path) -> None:
    def without(sample: Sample) -> Sample:
        return sample._replace(modalities={n: part for n, part in sample.modalities.items() if n != "image"})

    samples = [without(s) for s in random_samples(60)]
    store = write(tmp_path / "store", [s for s in samples if s.modalities])
    learner = Learner(recipe((("death",),), train={"epochs": 1}))
    learner.learn(store, learner.recipe.stages[0])
    with pytest.raises(DataError, match=r"no training sample of task 'days' has the modality 'image'.*tasks\.days"):
        learner.learn(store, Stage(tasks=("days",)))
    with pytest.raises(DataError, match="no training sample of task 'days' has the modality 'image'"):
        run(recipe((("death",), ("days",))), tmp_path / "run", store=store)
    assert [f.name for f in tmp_path.iterdir()] == ["store"]
