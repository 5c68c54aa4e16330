"""The certificate: what is in it decides the predictions, all of it and nothing else, and any change is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from flame_moe import certification
from flame_moe.batch import collate
from flame_moe.certification import certify, verify
from flame_moe.continual import Learner, certificate, probes
from flame_moe.continual.certificate import Entry, compare
from flame_moe.data.loader import make_batch
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, FlameError
from flame_moe.nn import products
from flame_moe.nn.reads import reads, tensors_of
from flame_moe.results import Results
from flame_moe.runs import extend, run
from flame_moe.training import checkpoint
from flame_moe.training.checkpoint import hash_tensor
from tests.test_cli import flame, refused
from tests.test_errors import rewrite
from tests.test_runs import tree
from tests.tiny import recipe

pytestmark = pytest.mark.usefixtures("no_figures")

HERE = {"torch": "2", "cpu": "this", "threads": 1}
STAGES = (("death", "block"), ("stage",), ("days", "codes"))


@pytest.fixture(scope="module")
def learner(tiny_store: Store) -> Learner:
    plan = recipe(STAGES, train={"epochs": 1})
    learner = Learner(plan)
    for stage in plan.stages:
        learner.learn(tiny_store, stage)
    return learner


def entry_of(learner: Learner, task: str) -> Entry:
    inputs = probes.synthetic(learner.tasks[task], learner.model.modalities, learner.preprocessor)
    return certificate.issue(learner, task, inputs, probes="synthetic", environment=HERE, issued="today")


@pytest.fixture(scope="module")
def entries(learner: Learner) -> dict[str, Entry]:
    return {task: entry_of(learner, task) for task in learner.tasks}


@contextmanager
def changed(tensor: Tensor, change: Callable[[Tensor], Any]) -> Iterator[None]:
    """A tensor of the model with other values, for a while."""
    before = tensor.detach().clone()
    with torch.no_grad():
        change(tensor)
        try:
            yield
        finally:
            tensor.copy_(before)


def flip(tensor: Tensor) -> None:
    """One bit of the middle number: the lowest of its mantissa."""
    tensor.detach().view(-1).view(torch.int32)[tensor.numel() // 2] ^= 1


def everything(learner: Learner, store: Store, task: str) -> Tensor:
    indices = store.indices(modalities=learner.tasks[task].modalities)
    return torch.from_numpy(learner.predict(store, task, indices).logits)


NEVER_NEEDED = {"heads.codes.absent"}
"""Read, and then put out of use in every row: a task of one modality has no sample without it."""


@pytest.mark.parametrize("task", ["death", "block", "stage", "days", "codes"])
def test_tensors_that_are_not_listed_cannot_change_a_prediction_and_those_listed_do(
    learner: Learner, entries: dict[str, Entry], tiny_store: Store, task: str
) -> None:
    """NaN goes through everything that is computed from it, so it shows what is."""
    before = everything(learner, tiny_store, task)
    tensors, listed = dict(tensors_of(learner.model)), entries[task].tensors
    others = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in listed}
    assert others
    with torch.no_grad():
        for name in others:
            tensors[name].fill_(math.nan)
        after = everything(learner, tiny_store, task)
        for name, tensor in others.items():
            tensors[name].copy_(tensor)
    assert torch.equal(after, before)
    for name in listed:
        with changed(tensors[name], lambda t: t.fill_(math.nan)):
            assert everything(learner, tiny_store, task).isnan().any() or name in NEVER_NEEDED, name


KINDS = {
    "base": ("days", "blocks.0.pool.conv.base"),
    "slice a": ("days", "blocks.0.pool.conv.slice1_a"),
    "slice b": ("days", "blocks.0.pool.conv.slice2_b"),
    "dense slice": ("codes", "paths.notes.encoder.attention.query.weight.slice2_dense"),
    "bias copy": ("days", "blocks.0.pool.fc1_bias.copies.2"),
    "norm": ("death", "paths.vitals.enter.weight.copies.0"),
    "encoder": ("stage", "paths.image.encoder."),
    "embedding of codes": ("block", "paths.events.encoder."),
    "grid": ("death", "paths.vitals.encoder."),
    "router query": ("stage", "blocks.0.routers.notes.heads.1.query"),
    "router gate": ("days", "blocks.0.routers.vitals.heads.2.gate"),
    "head": ("stage", "heads.stage.linear.weight"),
    "absent": ("days", "heads.days.absent"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_flipped_bit_is_caught_and_named(learner: Learner, entries: dict[str, Entry], kind: str) -> None:
    task, start = KINDS[kind]
    name = next(name for name in entries[task].tensors if name.startswith(start))
    assert compare(entries[task], learner, HERE).holds
    with changed(dict(tensors_of(learner.model))[name], flip):
        for other, entry in entries.items():
            found = compare(entry, learner, HERE)
            assert found.holds is (name not in entry.tensors), other
            if not found.holds:
                assert found.differences[0][:2] == ("tensor", name)
                assert found.differences[0].said == "has other bits"


def test_no_bit_of_any_listed_tensor_can_be_flipped_unseen(learner: Learner, entries: dict[str, Entry]) -> None:
    tensors = dict(tensors_of(learner.model))
    for name, stated in entries["days"].tensors.items():
        with changed(tensors[name], flip):
            assert hash_tensor(tensors[name]) != stated["sha256"]
        assert hash_tensor(tensors[name]) == stated["sha256"]


def test_other_statistics_descriptions_and_logits_are_named(learner: Learner, entries: dict[str, Entry]) -> None:
    entry, fitted = entries["days"], learner.preprocessor
    scaler = fitted.scalers["vitals"]
    moved = replace(scaler, mean=scaler.mean + np.array([0, 1e-12, 0]))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("scalers", {**fitted.scalers, "vitals": moved}, "scaling of 'vitals'"),
        ("labels", {**fitted.labels, "days": {**fitted.labels["days"], "std": [3.25]}}, "labels of 'days'"),
    ]
    for key, value, name in cases:
        learner.preprocessor = replace(fitted, **{key: value})
        found = compare(entry, learner, HERE)
        learner.preprocessor = fitted
        assert [d[:2] for d in found.differences] == [("statistics", name)]
    task = learner.model.tasks["days"]
    learner.model.tasks["days"] = task.model_copy(update={"classes": ("weeks",)})
    (changed_output,) = compare(entry, learner, HERE).differences
    learner.model.tasks["days"] = task
    assert changed_output[:2] == ("description", "task.classes")
    logits = entry.logits.clone()
    logits[5, 0] += 0.25
    logits[7, 0] -= 0.125
    found = compare(replace(entry, logits=logits), learner, HERE)
    assert [d[:2] for d in found.differences] == [("logit", "probe 5, output 0")]
    assert found.largest == pytest.approx(0.25, rel=1e-5)
    del learner.model.tasks["days"]
    assert compare(entry, learner, HERE).differences[0].said == "the model has no such task"
    learner.model.tasks["days"] = task


def test_elsewhere_logits_may_differ_a_little_but_tensors_not_at_all(
    learner: Learner, entries: dict[str, Entry]
) -> None:
    entry, elsewhere = entries["stage"], {**HERE, "cpu": "that"}
    for step, holds_here, holds_there in ((0.0, True, True), (5e-5, False, True), (0.01, False, False)):
        near = replace(entry, logits=entry.logits + step)
        assert compare(near, learner, HERE).holds is holds_here
        found = compare(near, learner, elsewhere)
        assert found.holds is holds_there
        assert found.environment == ("cpu: that, was this",)
        assert found.bitwise is (step == 0.0)
    with changed(learner.model.heads["stage"].linear.bias, flip):
        assert [d[:2] for d in compare(entry, learner, elsewhere).differences] == [
            ("tensor", "heads.stage.linear.bias")
        ]


def test_synthetic_probes_have_every_pattern_and_lie_where_the_training_data_do(
    learner: Learner, tiny_store: Store
) -> None:
    for task in learner.tasks.values():
        made = probes.synthetic(task, learner.model.modalities, learner.preprocessor)
        sets = [tuple(s.modalities) for s in made]
        assert len(made) >= probes.COUNT
        assert sets[0] == task.modalities
        assert {(name,) for name in task.modalities} <= set(sets)
        again = probes.synthetic(task, learner.model.modalities, learner.preprocessor)
        assert probes.pack(made).keys() == probes.pack(again).keys()
        assert all(
            torch.equal(a, b) for a, b in zip(probes.pack(made).values(), probes.pack(again).values(), strict=True)
        )
        for s in made:
            for name, part in s.modalities.items():
                assert part.values.dtype == np.dtype(learner.model.modalities[name].storage)
                scaled = learner.preprocessor.apply(name, part.values, part.observed)
                assert name == "events" or np.abs(scaled).max() < 6
    train = tiny_store.gather("static", tiny_store.indices(split="train"))
    drawn = learner.preprocessor.scalers["static"].draw(np.random.default_rng(0), 4000, 2)
    for c in range(2):
        seen = train.values[train.observed[:, c], c]
        assert np.allclose(np.quantile(drawn[:, c], [0.25, 0.5, 0.75]), np.quantile(seen, [0.25, 0.5, 0.75]), atol=0.35)


def test_real_probes_are_samples_of_the_split_without_their_names(learner: Learner, tiny_store: Store) -> None:
    task = learner.tasks["stage"]
    chosen = probes.taken(task, tiny_store, "val")
    assert all(s.id.startswith("probe") and not s.subject and not s.targets for s in chosen)
    assert {tuple(s.modalities) for s in chosen} == {("image",), ("notes",), ("image", "notes")}
    val = [tiny_store.sample(int(i)) for i in tiny_store.indices(None, "val", modalities=task.modalities)]
    for s in chosen:
        assert any(
            set(v.modalities) & set(task.modalities) == set(s.modalities)
            and all(np.array_equal(v.modalities[m].values, part.values) for m, part in s.modalities.items())
            for v in val
        )
    with pytest.raises(DataError, match="probes from the test split"):
        probes.taken(task, tiny_store, "test")


def test_a_batch_of_probes_is_that_of_the_loader(learner: Learner, tiny_store: Store) -> None:
    task = learner.tasks["block"]
    indices = tiny_store.indices(None, "val", modalities=task.modalities)[:5]
    ours = probes.to_batch([tiny_store.sample(int(i)) for i in indices], task, learner.preprocessor)
    theirs = make_batch(tiny_store, learner.preprocessor, task, indices)
    assert ours.modalities.keys() == theirs.modalities.keys()
    for name, part in ours.modalities.items():
        for a, b in zip(part, theirs.modalities[name], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name
    logits, _ = reads(learner.model, ours, learner.cursor("block"))
    assert logits.numpy().tobytes() == learner.predict(tiny_store, "block", indices).logits.tobytes()
    assert collate([s for s in probes.taken(task, tiny_store, "val")], "block", task.modalities, 1).size >= 5


@pytest.fixture(scope="module")
def certified(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, certified after each."""
    plan = recipe((("death",),), train={"epochs": 1}, method={"rank": 2})
    path = run(plan, tmp_path_factory.mktemp("certified") / "run", store=tiny_store).path
    certify(path)
    extend(path, ["days"])
    certify(path, probes="train")
    return path


@pytest.fixture
def copy(certified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(certified, tmp_path / "run"))


def test_a_certificate_holds_after_later_stages_and_says_which_tasks_it_is_of(copy: Path) -> None:
    before = tree(copy / "certificate")
    extend(copy, ["stage", "codes"], epochs=1)
    assert tree(copy / "certificate") == before
    found = verify(copy)
    assert found.holds
    assert [(v.task, v.bitwise, v.environment) for v in found.verdicts] == [("death", True, ()), ("days", True, ())]
    assert found.uncertified == ("stage", "codes")
    said = flame("verify", copy)
    assert said.exit_code == 0
    assert "death: " in said.stdout
    assert "equal bit for bit" in said.stdout
    assert "stage: not certified, it was learned later" in said.stdout
    assert "holds for all 2 tasks" in said.stdout


def test_verifying_multiplies_as_was_certified(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not products.exact():
        pytest.skip("oneDNN is not exact on this processor, or this PyTorch has no switch for it")
    shutil.rmtree(copy / "certificate")
    used: list[str] = []
    monkeypatch.setattr(certification, "compare", lambda *given: (used.append(products.in_use()), compare(*given))[1])
    with products.using("onednn"):
        certify(copy)
    verdicts = verify(copy).verdicts
    assert set(used) == {"onednn"}
    assert all(verdict.bitwise and not verdict.environment for verdict in verdicts)


def test_verifying_writes_nothing(copy: Path) -> None:
    before = tree(copy)
    assert verify(copy).holds
    assert flame("verify", copy, "--json").exit_code == 0
    assert tree(copy) == before


def test_certifying_again_keeps_what_was_certified(copy: Path) -> None:
    first = {e.task: e for e in certificate.load(copy / "certificate")}
    before = tree(copy)
    certify(copy)
    assert tree(copy) == before
    extend(copy, ["stage"], epochs=1)
    summary = certify(copy)
    second = {e.task: e for e in certificate.load(copy / "certificate")}
    assert list(second) == ["death", "days", "stage"]
    assert [second[t].probes for t in second] == ["synthetic", "train", "synthetic"]
    for task, entry in first.items():
        assert second[task].tensors == entry.tensors
        assert second[task].issued == entry.issued
        assert torch.equal(second[task].logits, entry.logits)
    found = Results.load(copy / "results.json")
    assert found.certificate == summary
    assert summary.digest in (copy / "report.html").read_text()
    assert verify(copy).digest == summary.digest


def test_a_fine_tuned_model_fails_and_the_first_tensor_is_named(tiny_store: Store, tmp_path: Path) -> None:
    plan = recipe((("death",),), train={"epochs": 1}, method={"name": "finetune"})
    path = run(plan, tmp_path / "run", store=tiny_store).path
    assert flame("certify", path).exit_code == 0
    extend(path, ["days"])
    said = flame("verify", path)
    assert said.exit_code == 1
    assert "death: DIFFERS, tensor paths.vitals.encoder." in said.stdout
    assert "largest difference of a logit" in said.stdout
    assert "does not hold for death" in said.stdout
    plain = json.loads(flame("verify", path, "--json").stdout)
    assert not plain["holds"]
    assert plain["tasks"][0]["largest"] > 1e-4
    refused(flame("certify", path), "of task 'death' does not hold any more", "move the certificate away")


def test_one_flipped_bit_in_the_saved_model_is_named_with_and_without_care_for_the_hashes(copy: Path) -> None:
    model = copy / "model"
    tensors = safetensors.torch.load_file(model / checkpoint.TENSORS)
    name = "blocks.0.pool.fc2.slice1_a"
    flip(tensors[name])
    safetensors.torch.save_file(tensors, model / checkpoint.TENSORS)
    for careful in (False, True):
        if careful:
            rewrite(model)
        said = flame("verify", copy)
        assert said.exit_code == 1, said.output
        assert f"days: DIFFERS, tensor {name} has other bits" in said.stdout
        assert "does not hold for days." in said.stdout


def test_a_changed_statistic_of_the_saved_model_is_named(copy: Path) -> None:
    manifest = json.loads((copy / "model" / checkpoint.MANIFEST).read_text())
    fitted = manifest["preprocessor"]
    fitted["modalities"]["vitals"]["mean"][0] = float(np.nextafter(fitted["modalities"]["vitals"]["mean"][0], 9e9))
    rewrite(copy / "model", preprocessor=fitted)
    said = flame("verify", copy)
    assert said.exit_code == 1
    assert "death: DIFFERS, statistics scaling of 'vitals' is not what it was" in said.stdout


@pytest.mark.parametrize("part", ["logits", "inputs/3/vitals/values"])
def test_a_changed_certificate_is_refused(copy: Path, part: str) -> None:
    place = copy / "certificate"
    tensors = safetensors.torch.load_file(place / checkpoint.TENSORS)
    flip(next(t for name, t in tensors.items() if name.startswith("death/") and name.endswith(part)))
    safetensors.torch.save_file(tensors, place / checkpoint.TENSORS)
    refused(flame("verify", copy), "the tensors do not match the manifest", "certificate")
    rewrite(place)
    what = "logits" if part == "logits" else "probes"
    refused(flame("verify", copy), f"the certificate's {what} of task 'death' are not those it was written with")


def test_a_changed_digit_of_the_certificate_is_refused(copy: Path) -> None:
    file = copy / "certificate" / checkpoint.MANIFEST
    text = file.read_text()
    at = text.index('"sha256": "') + len('"sha256": "')
    file.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    refused(flame("verify", copy), "the manifest was changed after it was written")
    refused(flame("certify", copy), "the manifest was changed after it was written")


def test_what_cannot_be_certified_or_verified_is_told(tiny_store: Store, tmp_path: Path) -> None:
    path = run(recipe((("death",),), train={"epochs": 1}), tmp_path / "run", store=tiny_store).path
    before = tree(path)
    refused(flame("verify", path), "the run has no certificate", "flame certify")
    refused(flame("verify", tmp_path / "none"), "there is no such run")
    refused(flame("certify", tmp_path / "none"), "there is no such run")
    refused(flame("certify", path, "--probes", "test"), "unknown probes 'test'")
    refused(flame("certify", path, "--probes", "val", "--store", tmp_path / "none"), "no sample store")
    assert tree(path) == before
    with pytest.raises(CheckpointError):
        certificate.load(path / "model")
    with pytest.raises(FlameError):
        certify(path / "model")
