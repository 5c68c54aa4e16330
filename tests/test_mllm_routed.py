"""Routed LoRA experts: the invariants of the method, on a plain language model and four multimodal ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from flame_moe.errors import AdapterError
from flame_moe.mllm import RoutedLoraConfig
from flame_moe.mllm.adapters.gates import arrow_prototype
from flame_moe.mllm.adapters.scores import SCORES, pooled, scores, top_k_weights
from tests.tiny_mllm import MODELS, base, kinds, prompts
from tests.tiny_pool import TASKS, filled, logits, tensors

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pool() -> Any:
    """A pool that tests read and leave as it was."""
    return filled()


def step(model: Any, batch: dict[str, Tensor]) -> float:
    """One step of training by whatever is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in trained), "a trainable parameter without gradient stops DDP"
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# Scores and weights


@settings(deadline=None, max_examples=30)
@given(experts=st.integers(1, 6), k=st.integers(1, 8), kind=st.sampled_from(SCORES), seed=st.integers(0, 99))
def test_weights_are_a_softmax_over_the_chosen_scores(experts: int, k: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    score = scores(torch.randn(2, 5, 16), torch.randn(experts, 16), kind)
    weights = top_k_weights(score, k, temperature=0.5)
    assert ((weights > 0).sum(-1) == min(k, experts)).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    whole = (score / 0.5).softmax(-1)
    cut = torch.where(weights > 0, whole, 0.0)
    torch.testing.assert_close(weights, cut / cut.sum(-1, keepdim=True))


def test_scores_are_their_formulas() -> None:
    u, v = torch.randn(7, 16), torch.randn(3, 16)

    def standard(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(scores(u, v, "standardized"), standard(u) @ standard(v).T / 4)
    torch.testing.assert_close(scores(u, v, "cosine"), u @ v.T / u.norm(dim=-1)[:, None] / v.norm(dim=-1))
    torch.testing.assert_close(scores(u, v, "raw"), u @ v.T)
    torch.testing.assert_close(scores(u, v, "arrow"), (u @ v.T).abs())


def test_scale_and_shift_of_a_routing_vector_change_nothing() -> None:
    """Where its variance is far above the eps of the standardisation, which is why gates must not stay tiny."""
    u, v = torch.randn(9, 32), torch.randn(4, 32)
    torch.testing.assert_close(scores(u, v, "standardized"), scores(u, 7 * v + 3, "standardized"), atol=2e-4, rtol=1e-4)
    tiny = scores(u, 1e-4 * v, "standardized")
    assert (tiny - scores(u, v, "standardized")).abs().max() > 0.1


def test_padding_has_no_say_for_the_sequence() -> None:
    score, real = torch.randn(2, 4, 3), torch.tensor([[True, True, False, False], [False, True, True, True]])
    found = pooled(score, real)
    torch.testing.assert_close(found[0, 0], score[0, :2].mean(0))
    torch.testing.assert_close(found[1, 0], score[1, 1:].mean(0))


# Experts and gates


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_being_learned_changes(name: str) -> None:
    model, batch = filled(name, TASKS[:2]).train(), prompts(name)
    model.add_expert("new", lora_dropout=0.1)
    earlier = {key: value.clone() for key, value in model.state_dict().items() if ".new" not in key}
    model.train_expert("new")
    started = tensors(model, "new")
    step(model, batch)
    expert = tensors(model, "new")
    changed = {key.split(".")[-3] for key, value in expert.items() if not torch.equal(value, started[key])}
    assert changed == {"lora_B"}
    assert not any(expert[key].any() for key in expert if "lora_gate" in key)
    model.train_gate("new")
    step(model, batch)
    gated = tensors(model, "new")
    changed = {key for key, value in gated.items() if not torch.equal(value, expert[key])}
    assert changed == {key for key in gated if "lora_gate" in key}
    for key, value in model.state_dict().items():
        assert ".new" in key or torch.equal(value, earlier[key]), key


def test_one_expert_routed_is_that_expert_bit_for_bit() -> None:
    model, batch = filled(tasks=("alone",)), prompts("llama")
    routed = logits(model, batch)
    model.use_expert("alone")
    assert torch.equal(logits(model, batch), routed)


def test_a_gate_weighs_its_expert_by_a_sigmoid(pool: Any) -> None:
    layer, x = pool.get_submodule(f"base_model.model.{LAYER}"), torch.randn(2, 5, 32)
    pool.train_gate("charts")
    gate = torch.sigmoid(x @ layer.lora_gate["charts"])[..., None]
    delta = x @ layer.lora_A["charts"].weight.T @ layer.lora_B["charts"].weight.T * (16 / 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + gate * delta)
    pool.route()


def test_the_routed_sum_is_the_naive_one(pool: Any) -> None:
    layer, x = pool.get_submodule(f"base_model.model.{LAYER}"), torch.randn(1, 6, 32)
    got = layer(x)
    for t in range(6):
        u = x[0, t]
        ln = [torch.nn.functional.layer_norm(v, (32,)) for v in (u, *(layer.lora_gate[task] for task in TASKS))]
        p = torch.stack([ln[0] @ v for v in ln[1:]]).div(32**0.5).softmax(0)
        best = p.topk(2).indices.tolist()
        want = layer.base_layer(u)
        for i in best:
            task = TASKS[i]
            delta = layer.lora_B[task].weight @ (layer.lora_A[task].weight @ u) * (16 / 4)
            want = want + p[i] / p[best].sum() * delta
        torch.testing.assert_close(got[0, t], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["token", "sequence", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_the_full_forward(name: str, granularity: str) -> None:
    model, batch = filled(name, granularity=granularity), prompts(name, (5, 8), left=True)
    told = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    told |= {"eos_token_id": None, "suppress_tokens": [60, 61, 62, 63]}
    with torch.no_grad():
        cached = model.generate(**batch, **told)
        plain = model.generate(**batch, **told, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    grown = batch | kinds(name, cached.sequences)
    grown |= {
        "input_ids": cached.sequences,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1),
    }
    answer = cached.sequences.clone()
    answer[:, :-4] = -100
    with torch.no_grad():
        whole = model(**grown, labels=answer).logits[:, -5:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("granularity", ["token", "sequence", "model"])
def test_generation_is_the_same_whatever_the_cache(granularity: str) -> None:
    model, batch = filled(granularity=granularity), prompts("llama", (5, 8), left=True)
    told = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    for how in ({}, {"num_beams": 3}):
        with torch.no_grad():
            plain = model.generate(**batch, **told, **how, use_cache=False)
            assert torch.equal(model.generate(**batch, **told, **how), plain)
    with torch.no_grad():
        static = model.generate(**batch, **told, cache_implementation="static")
        assert torch.equal(static, model.generate(**batch, **told))


@pytest.mark.parametrize("granularity", ["sequence", "model"])
def test_a_cache_that_was_filled_before_experts_changed_is_refused(granularity: str) -> None:
    model, batch = filled(granularity=granularity), prompts("llama", (6,))
    with torch.no_grad():
        cache = model(**batch, use_cache=True).cache
        following = {"input_ids": batch["input_ids"][:, :1], "cache": cache}
        assert model(**following).logits.isfinite().all()
        model.delete_adapter("sums")
        model.add_expert("other")
        model.add_expert("more")
        model.set_adapter("default")
        with pytest.raises(AdapterError, match="routing kept with the cache does not fit"):
            model(**following)


def test_a_sample_does_not_depend_on_its_padding(pool: Any) -> None:
    for granularity in ("token", "sequence", "model"):
        pool.route(granularity=granularity)
        alone, padded = prompts("llama", (5,)), prompts("llama", (5, 9))
        torch.testing.assert_close(logits(pool, alone)[0], logits(pool, padded)[0, :5], atol=1e-5, rtol=1e-4)
    pool.route(granularity="token")


def test_all_layers_agree_on_a_sample() -> None:
    """By the mean of what each of them says of its prompt when tokens choose for themselves."""
    model, batch = filled(top_k=1), prompts("llama", (5, 9))
    heard: dict[str, list[Tensor]] = {}

    def listen(layer: Any, args: tuple[Tensor, ...]) -> None:
        gates = torch.stack([layer.lora_gate[task] for task in TASKS])
        score, mask = scores(args[0], gates, "standardized"), batch["attention_mask"][..., None]
        heard.setdefault(layer.layer_name, []).append((score * mask).sum(1) / mask.sum(1))

    handles = [layer.register_forward_pre_hook(listen) for _, layer in model.layers()]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    want = torch.stack([votes[0] for votes in heard.values()]).mean(0).argmax(-1)
    model.route(granularity="model")
    found = logits(model, batch)
    with model.recording() as record:
        logits(model, {key: value[:1] for key, value in batch.items()})
    assert {layer: max(mass, key=mass.get) for layer, mass in record.by_layer().items()} == dict.fromkeys(
        record.by_layer(), TASKS[int(want[0])]
    )
    for row, chosen in enumerate(want.tolist()):
        model.use_expert(TASKS[chosen])
        torch.testing.assert_close(logits(model, batch)[row], found[row], atol=1e-5, rtol=1e-4)
    model.route()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base("llama"), batch))


def test_every_option_of_routing_does_something(pool: Any) -> None:
    batch, seen = prompts("llama"), [logits(pool, prompts("llama"))]
    before = {"top_k": 2, "temperature": 1.0, "score": "standardized"}
    for options in ({"top_k": 1}, {"temperature": 0.2}, {"score": "cosine"}, {"score": "raw"}, {"score": "arrow"}):
        pool.route(**before | options)
        seen.append(logits(pool, batch))
    pool.route(**before)
    assert torch.equal(logits(pool, batch), seen[0])
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_what_the_routers_did_is_on_record(pool: Any) -> None:
    batch = prompts("llama", (4, 9))
    with pool.recording() as record:
        logits(pool, batch)
    assert set(record.mass()) == set(TASKS)
    assert sum(record.mass().values()) == pytest.approx(1)
    assert len(record.by_layer()) == 14
    assert 0 < record.entropy() < 0.7
    with pool.recording() as alone:
        for row, length in enumerate((4, 9)):
            logits(pool, {"input_ids": batch["input_ids"][row : row + 1, :length]})
    assert alone.mass() == pytest.approx(record.mass(), abs=1e-5), "padding has no routing mass"


# PEFT


@pytest.mark.parametrize("name", MODELS)
def test_the_pool_and_each_expert_come_back(name: str, tmp_path: Path) -> None:
    model, batch = filled(name, TASKS[:2]), prompts(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path)
    assert again.mode == ("routed", None)
    assert again.tasks == TASKS[:2]
    assert torch.equal(logits(again, batch), logits(model, batch))
    settings = json.loads((tmp_path / "charts" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    stock = PeftModel.from_pretrained(base(name), tmp_path / "charts")
    assert type(stock.base_model).__name__ == "LoraModel"
    model.use_expert("charts")
    assert torch.equal(logits(stock, batch), logits(model, batch))


def test_a_pool_of_another_name_and_in_little_memory_comes_back(tmp_path: Path) -> None:
    model = get_peft_model(base("llama"), RoutedLoraConfig(r=2), adapter_name="router")
    model.add_expert("charts")
    model.get_submodule(f"base_model.model.{LAYER}").lora_B["charts"].weight.data.fill_(0.1)
    model.route()
    model.save_pretrained(tmp_path)
    for little in (False, True):
        again = PeftModel.from_pretrained(base("llama"), tmp_path / "router", "router", low_cpu_mem_usage=little)
        assert torch.equal(logits(again, prompts("llama")), logits(model.eval(), prompts("llama")))


def test_a_plain_lora_of_anybody_becomes_an_expert(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    stranger = get_peft_model(base("llama"), config).eval()
    stranger.save_pretrained(tmp_path)
    model = filled()
    model.load_expert(str(tmp_path), "stranger")
    model.use_expert("stranger")
    assert torch.equal(logits(model, prompts("llama")), logits(stranger, prompts("llama")))
    with pytest.raises(AdapterError, match="'stranger' has no routing vector"):
        model.route()
    model.fill_gate("stranger", [prompts("llama")])
    model.route()
    with model.recording() as record:
        logits(model, prompts("llama"))
    held = {layer for layer, mass in record.by_layer().items() if "stranger" in mass}
    assert held == {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}


def test_an_expert_goes_to_another_pool_with_its_routing_vector(pool: Any, tmp_path: Path) -> None:
    pool.save_pretrained(tmp_path)
    other = filled(tasks=("own",))
    other.load_expert(str(tmp_path / "shapes"), "borrowed")
    for key, value in tensors(pool, "shapes").items():
        assert torch.equal(other.state_dict()[key.replace(".shapes", ".borrowed")], value)


def test_training_goes_on_from_a_checkpoint(pool: Any, tmp_path: Path) -> None:
    """As the Trainer of transformers does it: every expert's folder into the expert that is there."""
    pool.save_pretrained(tmp_path)
    again = filled()
    for task in TASKS:
        again.get_submodule(f"base_model.model.{LAYER}").lora_A[task].weight.data.zero_()
        again.load_adapter(tmp_path / task, task, is_trainable=True)
    assert torch.equal(logits(again.eval(), prompts("llama")), logits(pool, prompts("llama")))


def test_adapters_mean_what_peft_means_by_them(pool: Any) -> None:
    batch, plain = prompts("llama", (6, 6, 6)), logits(base("llama"), prompts("llama", (6, 6, 6)))
    routed = logits(pool, batch)
    with pool.disable_adapter():
        assert torch.equal(logits(pool, batch), plain)
    assert torch.equal(logits(pool, batch), routed)
    pool.set_adapter("charts")
    charts = logits(pool, batch)
    mixed = logits(pool, batch | {"adapter_names": ["charts", "__base__", "default"]})
    for row, want in enumerate((charts, plain, routed)):
        torch.testing.assert_close(mixed[row], want[row], atol=1e-5, rtol=1e-4)
    pool.base_model.set_adapter(["charts", "shapes"])
    assert pool.mode == ("sum", None)
    assert not torch.allclose(logits(pool, batch), charts)
    pool.route()
    assert torch.equal(logits(pool, batch), routed)


def test_one_expert_can_be_merged_and_a_routed_sum_cannot() -> None:
    model, batch = filled(), prompts("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for how in (
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: model.merge_adapter(["charts", "default"], safe_merge=True),
    ):
        with pytest.raises(AdapterError, match=r"'default' cannot be merged .* weighted anew for every token"):
            how()
    model.train_gate("charts")
    with pytest.raises(AdapterError, match="'charts' cannot be merged"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.use_expert("charts")
    want = logits(model, batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
    assert not merged._forward_pre_hooks
    assert not merged._forward_hooks


def test_an_expert_can_be_removed() -> None:
    model, batch = filled(), prompts("llama")
    model.delete_adapter("shapes")
    assert model.tasks == ("charts", "sums")
    assert not tensors(model, "shapes")
    without = filled()
    for key, value in model.state_dict().items():
        assert torch.equal(without.state_dict()[key], value)
    model.route(top_k=2)
    with model.recording() as record:
        logits(model, batch)
    assert set(record.mass()) == {"charts", "sums"}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for reentrant in (None, False, True):
        model = filled("llava").train()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train_gate("charts")
        batch = prompts("llava")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_keeps_routing_vectors_whole(autocast: bool, tmp_path: Path) -> None:
    model = get_peft_model(base("llama").bfloat16(), RoutedLoraConfig(r=4), autocast_adapter_dtype=autocast)
    for task in TASKS[:2]:
        model.add_expert(task)
        model.train_gate(task)
        for key, parameter in model.named_parameters():
            if f"lora_gate.{task}" in key:
                assert parameter.dtype == torch.float32
                torch.nn.init.normal_(parameter)
    model.route()
    found = logits(model.eval(), prompts("llama"))
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("llama").bfloat16(), tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in tensors(model, "charts").items())


def test_automatic_precision_leaves_scores_whole() -> None:
    u, v = torch.randn(3, 32), torch.randn(2, 32)
    whole = {kind: scores(u, v, kind) for kind in SCORES}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(scores(u, v, kind), whole[kind]) for kind in SCORES)
    model = filled().train()
    model.train_gate("charts")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**prompts("llama"), labels=prompts("llama")["input_ids"]).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# Vectors without training


def test_average_activation_is_the_mean_over_real_tokens() -> None:
    model = filled().train()
    model.train_expert("shapes")
    batches = [prompts("llama", (4, 9)), prompts("llama", (7,), seed=3)]
    model.fill_gate("charts", iter(batches))
    assert model.mode == ("expert", "shapes")
    assert model.training
    assert {k.split(".")[-2] for k, p in model.named_parameters() if p.requires_grad} == {"shapes"}
    seen: list[Tensor] = []
    layer = model.get_submodule(f"base_model.model.{LAYER}")
    model.use_expert("charts")
    model.eval()
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            logits(model, {"input_ids": ids[mask.bool()][None]})
    handle.remove()
    torch.testing.assert_close(layer.lora_gate["charts"].data, torch.cat(seen).mean(0), atol=1e-5, rtol=1e-4)


def test_the_arrow_prototype_is_the_first_right_singular_vector(pool: Any) -> None:
    layer = pool.get_submodule(f"base_model.model.{LAYER}")
    whole = layer.lora_B["charts"].weight @ layer.lora_A["charts"].weight
    want = torch.linalg.svd(whole).Vh[0]
    assert abs(float(arrow_prototype(layer, "charts") @ want)) == pytest.approx(1, abs=1e-5)
    model = copy.deepcopy(pool)
    model.fill_gate("charts")
    found = model.get_submodule(f"base_model.model.{LAYER}").lora_gate["charts"]
    assert abs(float(found.detach() @ want)) == pytest.approx(1, abs=1e-5)


def test_the_null_expert_takes_its_share_of_the_foundation(tmp_path: Path) -> None:
    model = filled()
    batches = [prompts("llama", (9, 12), seed=seed) for seed in range(4)]
    model.fit_null(batches, share=0.75)
    model.route(top_k=1)
    model.save_pretrained(tmp_path)
    first = "model.layers.0.self_attn.q_proj"
    for routed in (model, PeftModel.from_pretrained(base("llama"), tmp_path)):
        with routed.recording() as record:
            for batch in batches:
                logits(routed, batch)
        assert record.by_layer()[first]["(null)"] == pytest.approx(0.75, abs=0.03)
    model.fit_null(batches, share=0.999)
    for _, layer in model.layers():
        layer.lora_null["default"].offset.fill_(1e9)
    assert torch.equal(logits(model, batches[0]), logits(base("llama"), batches[0])), "no expert: the base itself"


def test_stored_are_the_experts_alone(pool: Any, tmp_path: Path) -> None:
    pool.save_pretrained(tmp_path)
    router = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in router} == {"vector", "offset", "fitted"}
    one = safetensors.torch.load_file(tmp_path / "charts" / "adapter_model.safetensors")
    assert sum(value.numel() for key, value in one.items() if "lora_gate" in key) == 12 * 32 + 2 * 48
    assert len(one) == 4 * 14
