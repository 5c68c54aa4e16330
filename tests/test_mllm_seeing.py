"""A language model trained elsewhere behind the tiny model's tower; a small Llama stands in for SmolLM2."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_moe.errors import CheckpointError

pytest.importorskip("peft", reason="the extra mllm is not installed")

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from flame_moe.mllm.run import learn_stream
from flame_moe.mllm.stream import seeing
from flame_moe.mllm.stream.encode import encode
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.generated import generate
from flame_moe.mllm.stream.llava import TinyConfig, foundation_data, pixel_values
from flame_moe.mllm.stream.samples import Item
from flame_moe.mllm.stream.score import answer_loss
from flame_moe.mllm.stream.seeing import IMAGE, SeeingBase, SeeingConfig
from flame_moe.mllm.stream.tiers import TIERS, open_stream
from flame_moe.mllm.stream.words import WORDS, ChatReader
from tests.mllm_stream import small_stream

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE)


def tower() -> TinyConfig:
    config = TIERS["tiny-ci"].config
    assert isinstance(config, TinyConfig)
    return config


CONFIG = SeeingConfig(tower=tower(), samples=300, base_steps=60)


def chat_tokenizer() -> Any:
    words = [*SPECIAL, "user", "assistant", *WORDS]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    more = {"additional_special_tokens": list(SPECIAL)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **more)


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What stands in for SmolLM2."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + 2 + len(WORDS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False).eval()
    monkeypatch.setattr(seeing, "load", lambda cache, wheel, say: (copy.deepcopy(model), chat_tokenizer()))
    return model


@pytest.fixture
def cache(mllm_cache: Path, tmp_path: Path) -> Path:
    """A cache of the test's own that holds the tiny model, whose tower is taken."""
    small_stream(mllm_cache)
    for folder in mllm_cache.glob("tiny-llava-*"):
        if (folder / "manifest.json").is_file():
            (tmp_path / folder.name).symlink_to(folder)
    return tmp_path


@pytest.fixture
def base(language: Any, cache: Path) -> SeeingBase:
    return SeeingBase.of(CONFIG, cache, None, lambda text, share: None)


def test_only_the_projector_learns_and_it_does(base: SeeingBase, language: Any, mllm_cache: Path) -> None:
    model, untrained = base.model(), base._joined()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, value in language.model.named_parameters():
        assert torch.equal(value, model.model.language_model.get_parameter(name))
    for name, value in small_stream(mllm_cache).model().model.vision_tower.named_parameters():
        assert torch.equal(value, model.model.vision_tower.get_parameter(name))
    assert set(base.load()[0]) == {name for name, _ in model.model.multi_modal_projector.named_parameters()}
    assert not any(p.requires_grad for p in model.parameters())
    losses = []
    for one in (untrained, model):
        held = foundation_data(one, foundation("val", 90, 16, base.skills), base.reader)
        batch = held.batch(torch.arange(len(held)), one.get_input_embeddings())
        with torch.no_grad():
            said = one(inputs_embeds=batch.embeds, attention_mask=batch.mask).logits
        losses.append(float(answer_loss(said, batch.labels)))
    assert losses[1] < 0.9 * losses[0]


def test_what_is_judged_has_pictures(base: SeeingBase) -> None:
    assert base.skills == ("shapes",)
    manifest = base.manifest()
    assert set(manifest["foundation_by_kind"]) == {"shape claim", "shape describe", "shape name"}
    assert 0 <= manifest["foundation_validation"] <= 1


def test_features_are_what_the_model_sees_in_the_pixels(base: SeeingBase) -> None:
    model, samples = base.model(), generate("shapes", "test", 8, 16)
    assert samples.pictures is not None
    data = encode(samples.items, base.reader, base.features(model, "shapes", samples.pictures))
    rows = torch.arange(8)
    batch, ids = data.batch(rows, model.get_input_embeddings()), data.tokens(rows).ids
    assert int((ids == model.config.image_token_id).sum()) == 8 * 4
    with torch.no_grad():
        cached = model(inputs_embeds=batch.embeds, attention_mask=batch.mask).logits
        pixels = pixel_values(samples.pictures)
        direct = model(input_ids=ids, pixel_values=pixels, attention_mask=batch.mask).logits
    here = batch.mask.bool()
    assert torch.allclose(cached[here], direct[here], atol=0.03)


def test_a_chat_shows_the_picture_or_tells_its_scene() -> None:
    reader = ChatReader(chat_tokenizer(), image=IMAGE)
    item = Item("", "what color", "red", scene="a red circle")
    shown, told = (reader.tokenizer.decode(reader.prompt(item, patches)) for patches in (2, 0))
    assert shown.count(IMAGE) == 2
    assert "circle" not in shown
    assert "circle" in told
    assert IMAGE not in told
    assert ChatReader(chat_tokenizer()).image == -1


def test_it_is_made_once_and_damage_is_seen(base: SeeingBase, cache: Path) -> None:
    again = SeeingBase.of(CONFIG, cache, None, lambda text, share: pytest.fail("made again"))
    one, other = (b.model().model.multi_modal_projector.linear_1.weight for b in (base, again))
    assert torch.equal(one, other)
    tensors = base.folder / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="do not match the manifest"):
        base.model()


def test_a_stream_is_learned_on_it(base: SeeingBase, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = TIERS["smollm2-vision"]
    small = replace(tier, tasks=("shapes", "math"), counts=(60, 10, 20, 12), config=CONFIG)
    monkeypatch.setitem(TIERS, "smollm2-vision", small)
    stream = open_stream("smollm2-vision", "b", cache)
    assert [task.name for task in stream.tasks] == ["math", "shapes"]
    assert stream.about["config"] == CONFIG.plain()
    outcome = learn_stream(stream, "routed", changes={"steps": 2, "gate_steps": 2, "batch": 6})
    adapted = {name for name, _ in outcome.method.model.named_parameters() if ".shapes." in name}
    assert len(adapted) > 0
    assert all("language_model" in name for name in adapted)
    assert {e.task for e in outcome.results.evaluations} == {"math", "shapes"}
