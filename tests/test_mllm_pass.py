"""PASs-MoE: the invariants of the method, and what its memory holds."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from flame_moe.errors import AdapterError
from flame_moe.mllm import PassMoeConfig
from flame_moe.mllm.adapters.pass_config import PRESETS
from tests.tiny_mllm import MODELS, base, prompts

LAYER = "base_model.model.model.layers.0.mlp.up_proj"
E, R = 3, 4


def mixture(name: str = "llama", **options: Any) -> Any:
    """A mixture whose experts all do something."""
    model = get_peft_model(base(name), PassMoeConfig(**({"experts": E, "r": R, "lora_alpha": 8} | options)))
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def layer_of(model: Any) -> Any:
    return model.get_submodule(LAYER)


def memory_of(model: Any) -> Any:
    return layer_of(model).lora_memory["default"]


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


def learn(model: Any, batch: dict[str, Tensor], steps: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        (run(model, batch) + model.stabilisation_loss()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()


def test_the_mixture_is_its_formula() -> None:
    model, x = mixture(temperature=0.7), torch.randn(2, 5, 32)
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight.view(E, R, 32), layer.lora_B["default"].weight.view(48, E, R)
    z = torch.einsum("btn,ern->bter", x, a)
    pi = (z.square().sum(-1) / R / 0.7).softmax(-1)
    want = layer.base_layer(x) + 8 / R * torch.einsum("bte,oer,bter->bto", pi, b, z)
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pi.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("router", ["softmax", "topk"])
def test_a_learned_router_is_its_formula(router: str) -> None:
    model, x = mixture(router=router), torch.randn(2, 5, 32)
    layer = layer_of(model)
    pi = (x @ layer.lora_router["default"].weight.T).softmax(-1)
    if router == "topk":
        best = pi.topk(2).values[..., -1:]
        pi = torch.where(pi >= best, pi, 0.0)
        pi = pi / pi.sum(-1, keepdim=True)
    z = (x @ layer.lora_A["default"].weight.T).view(2, 5, E, R)
    want = layer.base_layer(x) + 2 * (pi[..., None] * z).flatten(-2) @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_one_expert_is_plain_lora_bit_for_bit() -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=R, lora_alpha=8, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    plain = get_peft_model(base("llama"), config)
    one = get_peft_model(
        base("llama"), PassMoeConfig(experts=1, r=R, lora_alpha=8, target_modules=["up_proj", "q_proj"])
    )
    state = {key: value for key, value in plain.state_dict().items() if "lora_" in key}
    assert set(state) == {key for key, value in one.named_parameters() if "lora_" in key}
    one.load_state_dict(state, strict=False)
    batch = prompts("llama")
    assert torch.equal(one(**batch).logits, plain(**batch).logits)


def test_the_order_of_experts_means_nothing() -> None:
    one, other = mixture(), mixture()
    order = torch.tensor([2, 0, 1])
    ranks = (order[:, None] * R + torch.arange(R)).flatten()
    for _, layer in other.layers():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data, b.data = a.data[ranks].clone(), b.data[:, ranks].clone()
    batch = prompts("llama")
    torch.testing.assert_close(run(one, batch), run(other, batch))
    torch.testing.assert_close(memory_of(one).current[order], memory_of(other).current, atol=1e-6, rtol=1e-4)


def test_parameters_are_those_of_all_experts_and_stay_so() -> None:
    model, plain = mixture(), get_peft_model(base("llama"), LoraConfig(r=R, target_modules="all-linear"))
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, plain)]
    assert counts[0] == E * counts[1]
    for seed in range(2):
        model.start_task()
        learn(model, prompts("llama", seed=seed))
        model.finish_task()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts[0]
    learned = mixture(router="softmax")
    inputs = sum(layer.in_features for _, layer in learned.layers())
    assert sum(p.numel() for p in learned.parameters() if p.requires_grad) == counts[0] + E * inputs


def naive(model: Any, batches: list[dict[str, Tensor]]) -> tuple[Tensor, int]:
    """Importance of a layer's ranks from its inputs, token by token of each prompt alone."""
    seen: list[Tensor] = []
    handle = layer_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach()))
    model.eval()
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])
    handle.remove()
    model.train()
    h = torch.cat(seen)
    z = (h @ layer_of(model).lora_A["default"].weight.T).view(-1, E, R)
    pi = z.square().mean(-1).softmax(-1)
    return (pi[..., None] * z.square()).mean(0).detach(), len(h)


def test_importance_is_the_expectation_over_real_tokens() -> None:
    model, batches = mixture(), [prompts("llama", (4, 9)), prompts("llama", (11,), seed=2, left=True)]
    for batch in batches:
        run(model, batch)
    want, tokens = naive(model, batches)
    assert int(memory_of(model).tokens) == tokens == 24
    torch.testing.assert_close(memory_of(model).current, want, atol=1e-6, rtol=1e-4)


def test_importance_of_the_released_code_is_a_running_product_of_means() -> None:
    model, x = mixture(importance="product", mask_padding=False), [prompts("llama", seed=s) for s in (0, 1)]
    want = torch.zeros(E, R)
    seen: list[Tensor] = []
    handle = layer_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for i, batch in enumerate(x):
        run(model, batch)
        z = (seen[-1].flatten(0, 1) @ layer_of(model).lora_A["default"].weight.T).view(-1, E, R)
        product = z.square().mean(-1).softmax(-1).mean(0)[:, None] * z.square().mean(0)
        want = product if i == 0 else 0.9 * want + 0.1 * product
    handle.remove()
    torch.testing.assert_close(memory_of(model).current, want.detach(), atol=1e-6, rtol=1e-4)


def test_a_rank_without_direction_has_no_importance() -> None:
    model = mixture()
    layer_of(model).lora_A["default"].weight.data[5] = 0
    run(model, prompts("llama"))
    importance = memory_of(model).current.flatten()
    assert importance[5] == 0
    assert (importance[:5] > 0).all()


def test_nothing_is_counted_that_is_no_training() -> None:
    model, batch = mixture(), prompts("llama")
    model.eval()
    run(model, batch)
    with model.disable_adapter():
        model.train()
        run(model, batch)
    assert int(memory_of(model).tokens) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_counts_once_and_learns_the_same(reentrant: bool) -> None:
    plain, checked, batch = mixture("llava"), mixture("llava"), prompts("llava")
    checked.activation_checkpointing_enable({"use_reentrant": reentrant})
    checked.enable_input_require_grads()
    for model in (plain, checked):
        run(model, batch).backward()
    for (name, one), (_, other) in zip(plain.layers(), checked.layers(), strict=True):
        first, second = one.lora_memory["default"], other.lora_memory["default"]
        assert int(first.tokens) == int(second.tokens) == 21, name
        torch.testing.assert_close(first.current, second.current)
        torch.testing.assert_close(one.lora_A["default"].weight.grad, other.lora_A["default"].weight.grad)


# Stabilisation


def finished(**options: Any) -> Any:
    """A mixture that has finished a task and moved on since."""
    model = mixture(**options)
    model.start_task()
    run(model, prompts("llama"))
    model.finish_task()
    for _, layer in model.layers():
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    return model


def test_the_first_task_is_not_stabilised() -> None:
    model = mixture()
    run(model, prompts("llama"))
    assert model.stabilisation_loss().item() == 0
    model.finish_task()
    assert model.stabilisation_loss().item() == 0, "the experts are where the task left them"
    assert finished(lambda_a=0.0, lambda_b=0.0).stabilisation_loss().item() == 0


def test_the_pull_on_a_rank_is_twice_its_weighted_way() -> None:
    model = finished(lambda_a=7.0, lambda_b=3.0)
    model.stabilisation_loss().backward()
    ranks = 14 * E * R
    layer, memory = layer_of(model), memory_of(model)
    w = (memory.importance / memory.importance.mean()).flatten()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(a.grad, 2 * 7 * w[:, None] * (a - memory.anchor_a).detach() / ranks)
    torch.testing.assert_close(b.grad, 2 * 3 * w[None] * (b - memory.anchor_b).detach() / ranks)
    before, at = model.stabilisation_loss().detach().double(), (5, 7)
    a.data[at] += 1e-2
    moved = (model.stabilisation_loss().detach().double() - before) / 1e-2
    bend = 7 * w[5] * 1e-2 / ranks
    assert float(moved) == pytest.approx(float(a.grad[at] + bend), rel=2e-2)


def test_a_stabilised_expert_moves_less() -> None:
    ways = []
    for strength in (0.0, 1e2, 1e4):
        model = mixture(lambda_a=strength, lambda_b=strength)
        learn(model, prompts("llama"))
        model.finish_task()
        model.start_task()
        learn(model, prompts("llama", seed=4), steps=3)
        memory = memory_of(model)
        ways.append(
            float(
                (
                    memory.importance.flatten()[:, None]
                    * (layer_of(model).lora_A["default"].weight - memory.anchor_a) ** 2
                )
                .sum()
                .detach()
            )
        )
    assert ways[0] > ways[1] > ways[2]


def test_importances_add_up_and_anchors_follow() -> None:
    found = {}
    for anchor in ("previous", "running"):
        model = mixture(anchor=anchor)
        shares, places = [], []
        for seed in range(2):
            model.start_task()
            learn(model, prompts("llama", seed=seed))
            shares.append(memory_of(model).current.flatten().clone())
            places.append(layer_of(model).lora_A["default"].weight.detach().clone())
            model.finish_task()
        torch.testing.assert_close(memory_of(model).importance.flatten(), shares[0] + shares[1])
        mean = (shares[0][:, None] * places[0] + shares[1][:, None] * places[1]) / (shares[0] + shares[1])[:, None]
        torch.testing.assert_close(memory_of(model).anchor_a, places[1] if anchor == "previous" else mean)
        found[anchor] = memory_of(model).anchor_a
        assert model.finished_tasks == 2
    assert not torch.equal(found["previous"], found["running"])


def test_weights_are_capped_cut_and_shuffled_as_asked() -> None:
    plain = memory_of(finished()).weights("x")
    assert float(plain.mean()) == pytest.approx(1, abs=1e-5)
    capped = memory_of(finished(weight_cap=1.2)).weights("x")
    torch.testing.assert_close(capped, plain.clamp_max(1.2))
    cut = memory_of(finished(top_share=0.25)).weights("x")
    assert int((cut > 0).sum()) == 3
    torch.testing.assert_close(cut[cut > 0].sort().values, plain.flatten().topk(3).values.sort().values)
    shuffled = [memory_of(finished(importance="random", seed=seed)).weights("x") for seed in (0, 0, 1)]
    torch.testing.assert_close(shuffled[0].flatten().sort().values, plain.flatten().sort().values)
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    assert not torch.equal(shuffled[0], plain)
    even = memory_of(finished(importance="even")).weights("x")
    assert torch.equal(even, torch.ones(E, R))


def test_the_released_code_anneals_and_ramps() -> None:
    options = PRESETS["reference_code"] | {"experts": E, "r": R, "lora_alpha": 2 * R, "lambda_a": 10.0}
    config = PassMoeConfig.from_preset("reference_code", **{k: v for k, v in options.items() if k != "lambda_b"})
    assert config.lambda_b == pytest.approx(0.5)
    model = mixture(**{k: v for k, v in vars(config).items() if k in PRESETS["reference_code"]}, lambda_a=10.0)
    variant = layer_of(model).lora_variant["default"]
    for progress, tau in ((0.0, 1.6), (0.5, 1.15), (1.0, 0.7)):
        model.set_progress(progress)
        assert variant.temperature(True) == pytest.approx(tau)
        assert variant.temperature(False) == 0.7
    run(model, prompts("llama"))
    only = model.stabilisation_loss().item()
    assert only > 0, "the orthogonality term, which is on from the first task"
    model.finish_task()
    model.start_task()
    with pytest.raises(AdapterError, match="progress of the task is not known"):
        model.stabilisation_loss()
    layer_of(model).lora_A["default"].weight.data += 1
    losses = []
    for progress in (0.0, 0.15, 0.3, 1.0):
        model.set_progress(progress)
        losses.append(model.stabilisation_loss().item())
    assert losses[2] == losses[3]
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-4)


def test_the_extra_term_of_the_released_code_is_its_formula() -> None:
    model = mixture(lambda_a=2.0, lambda_b=1.0, orthogonality=1.0)
    want = []
    for _, layer in model.layers():
        rows = torch.nn.functional.normalize(layer.lora_A["default"].weight.view(E, R, -1), dim=-1)
        off = rows @ rows.mT - torch.eye(R)
        want.append(2 * off.square().mean() + layer.lora_B["default"].weight.square().mean())
    torch.testing.assert_close(model.stabilisation_loss(), torch.stack(want).mean())


# Entropy


def test_uniform_routing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flame_moe.mllm")
    flat = mixture(init_std=0.01, temperature=1e4)
    run(flat, prompts("llama"))
    assert flat.routing_entropy() > 0.999
    flat.finish_task()
    assert "entropy of the routing" in caplog.text
    assert "stayed uniform" in caplog.text
    caplog.clear()
    sharp = mixture(temperature=0.02)
    run(sharp, prompts("llama"))
    assert sharp.finish_task() < 0.9
    assert "stayed uniform" not in caplog.text


def test_entropy_is_that_of_the_weights_on_record() -> None:
    model, batch = mixture(), prompts("llama", (4, 9))
    with model.recording() as record:
        run(model, batch)
    assert record.entropy() / math.log(E) == pytest.approx(model.routing_entropy(), rel=1e-4)
    assert sum(record.mass().values()) == pytest.approx(1)


# PEFT


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_goes_on_exactly_where_it_was_saved(name: str, tmp_path: Path) -> None:
    model, batch = mixture(name), prompts(name)
    learn(model, batch)
    model.finish_task()
    model.start_task()
    learn(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path, is_trainable=True).train()
    assert again.finished_tasks == 1
    for one in (model, again):
        learn(one, batch)
        one.finish_task()
    for (key, value), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_the_full_forward(name: str) -> None:
    model, batch = mixture(name).eval(), prompts(name, (5, 8), left=True)
    told = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, plain = (model.generate(**batch, **told, eos_token_id=None, use_cache=c) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)


def test_a_mixture_is_disabled_but_not_merged() -> None:
    model, batch = mixture().eval(), prompts("llama")
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base("llama")(**batch).logits)
    with pytest.raises(AdapterError, match="cannot be merged"):
        model.merge_and_unload()
    model.delete_adapter("default")
    assert not [key for key in model.state_dict() if "lora_" in key]


def test_half_precision_keeps_statistics_whole(tmp_path: Path) -> None:
    model = get_peft_model(base("llama").bfloat16(), PassMoeConfig(experts=2, r=2)).train()
    run(model, prompts("llama")).backward()
    model.finish_task()
    memory = memory_of(model)
    assert {buffer.dtype for buffer in memory.buffers()} == {torch.float32, torch.int64}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("llama").bfloat16(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(memory_of(again).importance, memory.importance)


class Prompts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = prompts("llama", (6,), seed=index)
        return {key: value[0] for key, value in batch.items()} | {"labels": batch["input_ids"][0]}


class Stabilised(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        loss = super().compute_loss(model, inputs, **rest)
        return loss + self.accelerator.unwrap_model(model).stabilisation_loss()


def test_the_trainer_of_transformers_trains_it_and_goes_on(tmp_path: Path) -> None:
    told = {"max_steps": 4, "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    told |= {"per_device_train_batch_size": 2, "activation_checkpointing": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), **told)
    whole, again = mixture(), mixture()
    Stabilised(whole, arguments, train_dataset=Prompts()).train()
    Stabilised(again, arguments, train_dataset=Prompts()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert int(memory_of(whole).tokens) == 4 * 2 * 6
    for (key, value), (_, other) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), key
    assert whole.finish_task() > 0


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_data_parallel_training_keeps_each_process_its_statistics() -> None:
    model, batch = mixture(), prompts("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert {key for key, _ in wrapped.named_buffers() if "lora_memory" in key} == {
        f"module.{key}" for key in wrapped.parameters_to_ignore if "lora_memory" in key
    }
    for _ in range(2):
        run(wrapped, batch).backward()
    tokens, current = int(memory_of(model).tokens), memory_of(model).current.clone()
    model.finish_task()
    assert tokens == 2 * 13
    torch.testing.assert_close(memory_of(model).importance, current)


def _one_of_two(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = mixture()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    run(wrapped, prompts("llama", (4, 9) if rank else (7,), seed=rank)).backward()
    model.finish_task()
    torch.save(memory_of(model).importance, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    del wrapped, model
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_put_their_statistics_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    model = mixture()
    for rank in range(2):
        run(model, prompts("llama", (4, 9) if rank else (7,), seed=rank))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, memory_of(model).current, atol=1e-6, rtol=1e-4)
