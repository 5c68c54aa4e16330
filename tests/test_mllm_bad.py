"""What users of the adapters can do wrong, and what they are told; and which layers are adapted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from flame_moe.errors import AdapterError, CheckpointError, DataError, FlameError
from flame_moe.mllm import PassMoeConfig, RoutedLoraConfig, check_tokenizer
from flame_moe.mllm.adapters.targets import language_model, matched, resolve_targets
from tests.tiny_mllm import IMAGE, MODELS, base, prompts

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def refused(action: Callable[[], Any], message: str, kind: type[FlameError] = AdapterError) -> str:
    with pytest.raises(kind, match=message) as caught:
        action()
    said = str(caught.value)
    assert "\n" not in said
    assert caught.value.mend, said
    return said


def pool(name: str = "llama", **options: Any) -> Any:
    return get_peft_model(base(name), RoutedLoraConfig(r=2, **options))


# Targets


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [RoutedLoraConfig, PassMoeConfig])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj"]])
def test_only_the_language_model_is_adapted(name: str, config: Any, targets: Any) -> None:
    model = get_peft_model(base(name), config(r=2, target_modules=targets))
    names = {layer for layer, _ in model.layers()}
    wanted = LINEAR if not isinstance(targets, list) else set(targets)
    assert {layer.rpartition(".")[2] for layer in names} == wanted
    assert len(names) == 2 * len(wanted)
    assert not any("vision" in layer or "visual" in layer or "connector" in layer for layer in names)
    assert all(layer.startswith(f"{language_model(base(name))}.") for layer in names)


def test_other_layers_are_adapted_when_asked_for() -> None:
    tower = r"model\.vision_tower\..*fc1"
    refused(lambda: pool("llava", target_modules=tower), "outside the language model: .*vision_tower")
    model = pool("llava", target_modules=tower, language_only=False)
    assert [layer for layer, _ in model.layers()] == ["model.vision_tower.encoder.layers.0.mlp.fc1"]
    refused(lambda: pool("llava", target_modules=["fc1"]), "'fc1' matches layers outside the language model")
    refused(lambda: pool("llava", target_modules=".*q_proj"), "outside the language model")


def test_targets_that_match_nothing_are_told() -> None:
    refused(lambda: pool(target_modules=["q_porj", "k_proj"]), "'q_porj' matches no layer .*q_proj")
    refused(lambda: pool(target_modules="layers.9.*"), "matches no layer")
    refused(lambda: pool(target_modules="(q_proj"), "no regular expression")
    refused(lambda: pool(target_modules=["embed_tokens"]), "'model.embed_tokens' is a Embedding")
    refused(lambda: pool(target_modules=["q_proj"], exclude_modules=["q_proj"]), "matches no layer")


def test_single_layers_can_be_chosen() -> None:
    model = base("llama")
    assert matched(model, resolve_targets(model, r".*layers\.1\.mlp\.(up|down)_proj")) == {
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }
    part = resolve_targets(model, ["layers.0.mlp.up_proj", "q_proj"], exclude=r".*layers\.1.*")
    assert matched(model, part) == {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("config", [RoutedLoraConfig(r=2), PassMoeConfig(r=2, experts=2)])
def test_layers_with_transposed_weights_are_adapted(config: Any) -> None:
    small = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = get_peft_model(GPT2LMHeadModel(small), config)
    if isinstance(config, RoutedLoraConfig):
        model.add_expert("alone")
        model.train_expert("alone")
    ids = torch.randint(0, 32, (1, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(list(model.layers())) == 4


# Experts and options


def test_unknown_names_are_told() -> None:
    model = pool()
    refused(lambda: model.route(), "there is no expert to route to")
    model.add_expert("charts")
    for action in (
        model.train_expert,
        model.train_gate,
        model.use_expert,
        model.fill_gate,
        model.base_model.set_adapter,
    ):
        refused(lambda a=action: a("chart"), "there is no expert 'chart'.*Did you mean 'charts'")
    refused(lambda: model.route(topk=1), "unknown option 'topk' .*Did you mean 'top_k'")
    refused(lambda: model.delete_adapter("default"), "router cannot be deleted")
    refused(lambda: model.base_model.set_adapter(["charts", "default"]), "cannot be summed")


@pytest.mark.parametrize("task", ["charts", "default", "a.b", "", "layers", "0", "keys", "lora_", "a/b", "mlp"])
def test_names_that_no_expert_can_have_are_refused(task: str) -> None:
    model = pool()
    model.add_expert("charts")
    refused(lambda: model.add_expert(task), "cannot be the name|already an expert")
    assert model.tasks == ("charts",)


def test_more_choices_than_experts_are_refused_when_asked_for() -> None:
    model = pool()
    model.add_expert("charts")
    refused(lambda: model.route(top_k=2), "top_k is 2, but there are 1 experts")
    model.route()
    assert model.options.top_k == 2, "the default waits for more experts"
    model.add_expert("shapes")
    refused(lambda: model.route(), "'charts' has no routing vector")
    refused(lambda: model.route(null_expert=True), "null expert was never fitted")
    refused(lambda: model.fit_null([]), "saw no token")
    refused(lambda: model.fit_null([prompts("llama")], share=1.0), "share is 1.0")
    refused(lambda: model.fill_gate("charts", []), "saw no token")
    refused(lambda: model.add_adapter("second", RoutedLoraConfig()), "has a router already")


def test_discriminants_of_what_there_is_not() -> None:
    refused(lambda: pool(score="discriminant"), "of whole prompts, not of tokens")
    model, batch = pool(), prompts("llama")
    model.add_expert("charts")
    model.add_expert("shapes")
    refused(lambda: model.fit_gate("charts", [batch], [batch]), "of whole prompts, not of tokens")
    model.options.granularity = "model"
    refused(lambda: model.fit_gate("other", [batch], [batch]), "no expert 'other'")
    refused(lambda: model.fit_gate("charts", [batch], [batch], ridge=0), "ridge is 0")
    refused(lambda: model.fit_gate("charts", [], [batch]), "saw no token")
    refused(lambda: model.fit_gate("charts", [batch], []), "saw no token")
    refused(lambda: model.fit_gate("charts", [batch], [prompts("llama", (5,))]), "background is a single prompt")
    model.fit_gate("charts", [batch], [prompts("llama", seed=1)])
    model.fill_gate("shapes", [batch])
    refused(lambda: model.route(score="discriminant"), "'shapes' is no discriminant")
    model.fit_gate("shapes", [prompts("llama", seed=2)], [prompts("llama", seed=1)])
    model.route(score="discriminant", null_expert=True)
    refused(lambda: model.fit_null([batch]), "needs no fitting")
    refused(lambda: model.route(granularity="token"), "of whole prompts, not of tokens")


OPTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "score": (lambda: RoutedLoraConfig(score="cosin"), "unknown score 'cosin'.*Did you mean 'cosine'"),
    "granularity": (lambda: RoutedLoraConfig(granularity="word"), "unknown granularity"),
    "temperature": (lambda: RoutedLoraConfig(temperature=0), "temperature is 0"),
    "top_k": (lambda: RoutedLoraConfig(top_k=0), "top_k is 0"),
    "rank": (lambda: RoutedLoraConfig(r=0), "r is 0"),
    "dora": (lambda: RoutedLoraConfig(use_dora=True), "'use_dora' cannot be used"),
    "bias": (lambda: PassMoeConfig(bias="all"), "biases belong to all experts"),
    "saved modules": (lambda: PassMoeConfig(modules_to_save=["lm_head"]), "'modules_to_save' cannot be used"),
    "init": (lambda: RoutedLoraConfig(init_lora_weights="pissa"), "changes the base"),
    "joint init": (lambda: PassMoeConfig(init_lora_weights="orthogonal"), "all experts for one"),
    "router": (lambda: PassMoeConfig(router="soft"), "unknown router 'soft'"),
    "k of the mixture": (lambda: PassMoeConfig(router="topk", experts=2, top_k=3), "top_k is 3, but there are 2"),
    "experts": (lambda: PassMoeConfig(experts=0), "experts is 0"),
    "share": (lambda: PassMoeConfig(top_share=1.5), "top_share is 1.5"),
    "lambda": (lambda: PassMoeConfig(lambda_a=-1.0), "lambda_a is -1.0"),
    "anchor": (lambda: PassMoeConfig(anchor="last"), "unknown anchor"),
    "preset": (lambda: PassMoeConfig.from_preset("papr"), "Did you mean 'paper'"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_make_no_sense_are_refused(case: str) -> None:
    refused(*OPTIONS[case])


def test_a_task_without_training_is_not_finished() -> None:
    model = get_peft_model(base("llama"), PassMoeConfig(r=2, experts=2))
    refused(model.finish_task, "the task has no statistics")
    refused(lambda: model.set_progress(1.1), "progress is 1.1")
    model.eval()
    model(**prompts("llama"))
    refused(model.finish_task, "the task has no statistics")


# Adapters of another base


def saved(tmp_path: Path, config: Any, name: str = "llama", **changes: Any) -> Path:
    model = get_peft_model(base(name), config)
    if isinstance(config, RoutedLoraConfig):
        model.add_expert("charts")
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", [RoutedLoraConfig(r=2), PassMoeConfig(r=2, experts=2)])
def test_an_adapter_of_another_base_is_refused(config: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, config)
    refused(lambda: PeftModel.from_pretrained(base("llama", seed=1), folder), "trained on another base model")
    PeftModel.from_pretrained(base("llama").bfloat16(), folder)
    free = type(config).from_pretrained(folder)
    free.base_fingerprint = None
    PeftModel.from_pretrained(base("llama", seed=1), folder, config=free)
    refused(lambda: PeftModel.from_pretrained(base("llava"), folder), "made for another base")


def test_an_expert_that_does_not_fit_leaves_the_pool_as_it_was(tmp_path: Path) -> None:
    wide = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    get_peft_model(wide, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)).save_pretrained(
        tmp_path / "gpt"
    )
    get_peft_model(base("llava"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "llava")
    get_peft_model(base("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(
        tmp_path / "dora"
    )
    get_peft_model(base("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    get_peft_model(base("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "fine")
    saved(tmp_path / "pool", RoutedLoraConfig(r=2))
    model = pool(target_modules=["q_proj"])
    model.add_expert("charts")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name, message, kind in (
        ("gpt", "matches no layer", AdapterError),
        ("llava", "weights that this base lacks", AdapterError),
        ("dora", "'use_dora' cannot be used", AdapterError),
        ("ia3", "is no plain LoRA but .*IA3", AdapterError),
        ("pool", "is no plain LoRA", AdapterError),
        ("pool/charts", "has the layer .*, which has no router", AdapterError),
        ("nowhere", "cannot be read", CheckpointError),
    ):
        refused(lambda n=name: model.load_expert(str(tmp_path / n), "new"), message, kind)
        assert model.tasks == ("charts",)
        assert set(model.peft_config) == {"default", "charts"}
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    (tmp_path / "fine" / "adapter_model.safetensors").write_bytes(b"broken")
    refused(lambda: model.load_expert(str(tmp_path / "fine"), "new"), "cannot be read", CheckpointError)


def test_a_pool_without_one_of_its_experts_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path, RoutedLoraConfig(r=2))
    config = PeftConfig.from_pretrained(folder)
    refused(lambda: PeftModel.from_pretrained(base("llama"), folder, config=config), "cannot be found this way")
    (folder / "charts").rename(folder / "gone")
    refused(lambda: PeftModel.from_pretrained(base("llama"), folder), "'charts' cannot be read", CheckpointError)


def test_an_expert_of_a_base_of_another_name_is_refused(tmp_path: Path) -> None:
    one, other = base("llama"), base("llama")
    one.name_or_path, other.name_or_path = "somebody/small-one", "somebody/small-two"
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(one, config).save_pretrained(tmp_path, save_embedding_layers=False)
    model = get_peft_model(other, RoutedLoraConfig(r=2))
    refused(lambda: model.load_expert(str(tmp_path), "new"), "trained on 'somebody/small-one', this model is")
    model.load_expert(str(tmp_path), "new", check_base=False)


# Inputs


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_a_prompt_without_its_image_is_told(name: str) -> None:
    model, batch = pool(name), prompts(name)
    del batch["pixel_values"]
    refused(lambda: model(**batch), r"places for image tokens \(id 60\), but no images", DataError)
    refused(lambda: model.generate(**batch, max_new_tokens=1), "but no images came with them", DataError)
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    assert model(**text).logits.isfinite().all(), "a prompt without a place for an image needs none"


def test_ids_outside_the_vocabulary_are_told() -> None:
    refused(lambda: pool()(input_ids=torch.tensor([[5, 64]])), "holds the id 64, the model has embeddings for 64")


def tokenizer(size: int, **special: str) -> Any:
    words = {f"w{i}": i for i in range(size)} | {"<image>": IMAGE}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), **special)


def test_a_tokenizer_that_does_not_fit_is_told() -> None:
    model = pool("llava")
    fits = {"pad_token": "w0", "eos_token": "w2", "extra_special_tokens": {"image_token": "<image>"}}
    check_tokenizer(model, tokenizer(60, **fits))
    refused(lambda: check_tokenizer(model, tokenizer(80, **fits)), "has 8. tokens, the model embeddings for 64")
    refused(lambda: check_tokenizer(model, tokenizer(60, eos_token="w2")), "no padding token")
    wrong = fits | {"extra_special_tokens": {"image_token": "w7"}}
    refused(lambda: check_tokenizer(model, tokenizer(60, **wrong)), "image token has id 7, .* id 60")
    refused(lambda: check_tokenizer(model, tokenizer(60, **fits | {"eos_token": "w5"})), "ends a text with id 5")


def test_names_by_sample_need_routing_by_token() -> None:
    model = pool(granularity="sequence").eval()
    model.add_expert("charts")
    batch = prompts("llama") | {"adapter_names": ["default", "charts"]}
    refused(lambda: model(**batch), "adapter_names cannot be mixed with routing by sequence")


# Imports


def test_the_missing_extra_is_named_and_nothing_heavy_is_imported_early() -> None:
    code = (
        "import sys\n"
        "import flame_moe.mllm as room\n"
        "assert not {'peft', 'torch', 'transformers'} & set(sys.modules)\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'peft' else find(name, *rest)\n"
        "try:\n    room.RoutedLoraConfig\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ExtraMissingError")
    assert "pip install 'flame-moe[mllm]'" in done.stdout


def test_every_public_name_of_the_room_exists_and_is_documented() -> None:
    import flame_moe.mllm as room

    assert sorted(room.__all__) == list(room.__all__)
    for name in room.__all__:
        assert getattr(room, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'RoutedLora'"):
        _ = room.RoutedLora
