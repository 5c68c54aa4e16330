"""The stream of the room mllm: its data, its base model and its scores, on the reduced tier."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flame_moe.errors import CheckpointError, DataError

pytest.importorskip("peft", reason="the extra mllm is not installed")

from flame_moe.mllm.stream.base import Base
from flame_moe.mllm.stream.encode import IGNORED, shuffled, together
from flame_moe.mllm.stream.foundation import SKILLS, foundation
from flame_moe.mllm.stream.generated import TASKS, generate
from flame_moe.mllm.stream.llava import SLOTS, pixel_values, slots
from flame_moe.mllm.stream.pictures import shrink
from flame_moe.mllm.stream.recorded import easy_vqa, nlvr
from flame_moe.mllm.stream.samples import Item, Samples
from flame_moe.mllm.stream.score import answer_loss, ask, exact, graded
from flame_moe.mllm.stream.texts import FORMS, general_questions, own_answers, text_task
from flame_moe.mllm.stream.tiers import TIERS, Stream, open_stream
from flame_moe.mllm.stream.words import NUMBER_OF, WORDS, WordReader, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


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
